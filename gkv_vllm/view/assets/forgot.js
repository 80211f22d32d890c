const record = JSON.parse(byId("data").textContent);
const heads = record.layers * record.kv_heads;
const text = byId("text"), slider = byId("slider");
// Few heads hold any one token: by the square root one of twelve differs from none at a glance.
const FORGOTTEN = 0.3;
let left, scores, ranks, state, at = null;

/** One element for each token, and a line where the answer begins. */
const spans = record.texts.map((piece, position) => {
  if (position === record.prompt_tokens) {
    const line = document.createElement("div");
    line.className = "boundary";
    line.textContent = "prompt above, generated below";
    text.append(line);
  }
  const span = document.createElement("span");
  span.dataset.at = position;
  // A token without text of its own is part of a character that a later one completes.
  if (piece === "") span.classList.add("odd");
  span.textContent = piece === "" ? "·" : piece.replaceAll("\n", "⏎\n");
  text.append(span);
  return span;
});

/** Of each token, how many heads hold it, and whether one lost it in this very eviction. */
function count() {
  const held = new Uint16Array(record.tokens), lost = new Uint8Array(record.tokens);
  const now = state.before || state.end ? null : state.event;
  for (let head = 0; head < heads; head++) {
    const from = (state.epoch * heads + head) * record.tokens;
    for (let position = 0; position < state.computed; position++) {
      const event = left[from + position];
      if (state.holds(event)) held[position]++;
      else if (event === now) lost[position] = 1;
    }
  }
  return { held, lost };
}

function holds(head, position) {
  return state.holds(left[(state.epoch * heads + head) * record.tokens + position]);
}

/** Set only what differs: a page of a long text stays quick. */
const worn = spans.map(() => []);
function wear(position, ...looks) {
  const span = spans[position], before = worn[position];
  if (looks[0] !== before[0]) span.className = looks[0];
  if (looks[1] !== before[1]) span.style.color = looks[1];
  if (looks[2] !== before[2]) span.style.background = looks[2];
  worn[position] = looks;
}

function show() {
  state = new State(record, Number(slider.value));
  const { held, lost } = count();
  let forgotten = 0, partly = 0;
  for (let position = 0; position < record.tokens; position++) {
    if (position >= state.computed) {
      wear(position, "future", "", "");
      continue;
    }
    const rank = state.event >= 0 ? ranks[state.event * record.tokens + position] : 255;
    const of = held[position];
    let name = record.texts[position] === "" ? "odd" : "";
    if (lost[position]) name += " now";
    if (position < state.protected) name += " protected";
    else if (position >= state.recent) name += " recent";
    // Not opacity: thousands of elements of their own transparency make a page slow.
    const ink = FORGOTTEN + (1 - FORGOTTEN) * Math.sqrt(of / heads);
    wear(
      position, name,
      of === heads ? "" : `rgba(var(--pen), ${ink.toFixed(2)})`,
      rank === 255 ? "" : `rgba(var(--heat), ${((rank / 254) * 0.8 * ink).toFixed(2)})`
    );
    forgotten += of === 0;
    partly += of > 0 && of < heads;
  }
  byId("where").textContent = `${state.text}; ${number(forgotten)} forgotten by every head, ${number(partly)} by some`;
  slider.setAttribute("aria-valuetext", state.text);
  inspect();
}

/** The boxes of the heads: columns are layers, rows are KV heads. */
const boxes = Array.from({ length: heads }, (_, cell) => {
  const box = document.createElement("i");
  const layer = cell % record.layers, head = Math.floor(cell / record.layers);
  box.title = `layer ${layer}, KV head ${head}`;
  box.dataset.head = layer * record.kv_heads + head;
  return box;
});
byId("heads").style.gridTemplateColumns = `repeat(${record.layers}, 11px)`;
byId("heads").append(...boxes);

function inspect() {
  const line = byId("token");
  const shown = at !== null && at < state.computed;
  for (const box of boxes) box.className = shown && holds(Number(box.dataset.head), at) ? "on" : "";
  if (!shown) {
    line.textContent = "Point at a token, or move with the arrow keys, to see who still holds it.";
    return;
  }
  const score = state.event >= 0 ? scores[state.event * record.tokens + at] : NaN;
  const rank = state.event >= 0 ? ranks[state.event * record.tokens + at] : 255;
  const named = [];
  let held = 0;
  for (let layer = 0; layer < record.layers; layer++) {
    const on = [...Array(record.kv_heads).keys()].filter((head) => holds(layer * record.kv_heads + head, at));
    held += on.length;
    if (on.length) named.push(`L${layer}: ${on.length === record.kv_heads ? "all" : on.join(" ")}`);
  }
  // Many heads are told by their boxes alone.
  const list = heads <= 64 && held > 0 && held < heads ? ` (${named.join(", ")})` : "";
  const who = held === 0 ? "no head" : held === heads ? `all ${heads} heads` : `${held} of ${heads} heads${list}`;
  const competed = Number.isNaN(score) ? "did not compete" : `score ${score.toPrecision(4)}, above ${Math.round(rank / 2.54)} % of the others`;
  const part = at < record.prompt_tokens ? "prompt" : "generated";
  line.textContent = `Position ${number(at)} (${part}), token ${JSON.stringify(record.texts[at])} (id ${record.ids[at]}); ${competed}; seen by ${who}`;
}

function select(position) {
  if (at !== null) spans[at].removeAttribute("aria-selected");
  at = Math.max(0, Math.min(position, state.computed - 1));
  spans[at].setAttribute("aria-selected", "true");
  inspect();
}

text.addEventListener("mouseover", (event) => {
  if (event.target.dataset.at !== undefined) select(Number(event.target.dataset.at));
});
text.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -20, ArrowDown: 20, Home: -Infinity, End: Infinity }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  select(at === null ? 0 : at + step);
  spans[at].scrollIntoView({ block: "nearest" });
});

(async () => {
  [left, scores, ranks] = await Promise.all([record.left, record.scores, record.ranks].map(unpack));
  byId("about").textContent = describe(record);
  byId("warning").textContent = warnings(record);
  slider.max = record.events.length ? record.events.length + 1 : 0;
  const asked = fromAddress();
  slider.value = asked.eviction ?? slider.max;
  slider.addEventListener("input", oncePerFrame(show));
  show();
  if (asked.position !== undefined) {
    select(asked.position);
    spans[at].scrollIntoView({ block: "center" });
  }
})();
