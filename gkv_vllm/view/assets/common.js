"use strict";

const byId = (id) => document.getElementById(id);
const number = (n) => n.toLocaleString("en");
const NEVER = 65535;

const KINDS = { uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array };

/** What `pack` of page.py made of an array: its numbers, flat. */
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new KINDS[packed.dtype](await new Response(inflated).arrayBuffer());
}

/** What stands about a request above every picture. */
function describe(record) {
  const form = record.granularity === "token" ? `tokens, one kept set per ${record.scope}` : `blocks of ${record.block_size}`;
  const scope = record.scope === "all" ? "tokens, one kept set for all heads" : form;
  const lines = [
    `${record.policy} (${record.granularity === "token" ? scope : form}), budget ${number(record.budget)}, ` +
      `interval ${number(record.interval)}, protect=${record.protect}; ${record.layers} layers × ${record.kv_heads} KV heads`,
    `${number(record.prompt_tokens)} prompt tokens, ${number(record.tokens - record.prompt_tokens)} generated; ` +
      `${number(record.events.length)} evictions; ${record.finish.replaceAll("_", " ")}; request ${record.request_id}`,
  ];
  return lines.join("\n");
}

/** What the slider says: before any eviction (0), after the i-th (i), or at the end (one more). */
class State {
  constructor(record, at) {
    const events = record.events;
    this.before = at === 0;
    this.end = at > events.length;
    this.event = Math.min(at, events.length) - 1;
    const numbers = events[Math.max(this.event, 0)];
    this.epoch = this.end ? record.preemptions : numbers?.epoch ?? 0;
    this.computed = this.end || !numbers ? record.tokens : numbers.num_tokens;
    this.protected = numbers?.protected ?? 0;
    this.recent = this.end ? this.computed : numbers?.recent ?? record.tokens;
    this.last = events.length;
  }

  /** Whether a head that lost the token in event `left` still held it. */
  holds(left) {
    return left > this.event;
  }

  get text() {
    if (this.last === 0) return `nothing was evicted; ${number(this.computed)} tokens`;
    if (this.before) return `before the first eviction: ${number(this.computed)} tokens computed`;
    if (this.end) return `at the end: ${number(this.computed)} tokens`;
    const again = this.epoch ? `, started over ${this.epoch}×` : "";
    return `eviction ${this.event + 1} of ${this.last}: ${number(this.computed)} tokens computed${again}`;
  }
}

function warnings(record) {
  const said = [];
  if (record.truncated) said.push("This record was cut off: later evictions are missing.");
  if (record.preemptions) said.push(`The request was preempted ${record.preemptions}× and started over with all its tokens.`);
  return said.join(" ");
}

/** What an address like `page.html#eviction=12&position=300` asks to show. */
function fromAddress() {
  const asked = [...new URLSearchParams(location.hash.slice(1))];
  return Object.fromEntries(asked.filter(([, value]) => /^\d+$/.test(value)).map(([name, value]) => [name, Number(value)]));
}

/** At most one call for each picture that the screen shows, however fast a slider is dragged. */
function oncePerFrame(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  };
}
