const { records } = JSON.parse(byId("data").textContent);
const chooser = byId("record"), slider = byId("slider"), canvas = byId("map");
const unpacked = new Map(), cells = document.createElement("canvas");
const MARGIN = { left: 64, top: 18, bottom: 34, right: 8 };
let record = records[0], left, state, cursor = null;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

const FATES = ["paper", "before", "now", "kept", "protected", "recent"];
const SAID = ["not computed yet", "evicted before", "evicted now", "kept", "protected", "too recent to compete"];

/** What a head did with a token: its place in FATES. */
function fate(row, position) {
  if (position >= state.computed) return 0;
  if (position < state.protected) return 4;
  if (position >= state.recent) return 5;
  const event = left[(state.epoch * rows() + row) * record.tokens + position];
  if (!state.before && !state.end && event === state.event) return 2;
  return state.holds(event) ? 3 : 1;
}

const rows = () => record.layers * record.kv_heads;

function geometry() {
  const width = canvas.clientWidth, gap = record.layers > 1 ? 3 : 0;
  const height = Math.max(3, Math.min(18, Math.floor(560 / rows())));
  return {
    width, gap, height,
    plot: width - MARGIN.left - MARGIN.right,
    total: MARGIN.top + MARGIN.bottom + rows() * height + (record.layers - 1) * gap,
    y: (row) => MARGIN.top + row * height + Math.floor(row / record.kv_heads) * gap,
    x: (position) => MARGIN.left + (position / record.tokens) * (width - MARGIN.left - MARGIN.right),
  };
}

/** The cells of all rows as an image, one pixel high and at most as wide as the plot: where several
 * positions share a pixel their colours mix. */
function paint() {
  const g = geometry(), scale = window.devicePixelRatio || 1;
  const colours = FATES.map((name) => rgb(colour(name)));
  const width = Math.min(record.tokens, Math.round(g.plot * scale));
  const image = new ImageData(width, rows());
  for (let row = 0, i = 0; row < rows(); row++)
    for (let column = 0; column < width; column++, i += 4) {
      const from = Math.floor((column * record.tokens) / width), to = Math.floor(((column + 1) * record.tokens) / width);
      const mixed = [0, 0, 0];
      for (let position = from; position < to; position++) {
        const [r, g, b] = colours[fate(row, position)];
        mixed[0] += r; mixed[1] += g; mixed[2] += b;
      }
      for (let k = 0; k < 3; k++) image.data[i + k] = mixed[k] / (to - from);
      image.data[i + 3] = 255;
    }
  cells.width = width;
  cells.height = rows();
  cells.getContext("2d").putImageData(image, 0, 0);
  draw();
}

function draw() {
  const g = geometry(), scale = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
  canvas.style.height = `${g.total}px`;
  canvas.width = Math.round(g.width * scale);
  canvas.height = Math.round(g.total * scale);
  pen.scale(scale, scale);
  pen.imageSmoothingEnabled = false;
  for (let layer = 0; layer < record.layers; layer++) {
    const first = layer * record.kv_heads;
    pen.drawImage(cells, 0, first, cells.width, record.kv_heads, MARGIN.left, g.y(first), g.plot, record.kv_heads * g.height);
  }
  axes(pen, g);
}

function axes(pen, g) {
  pen.fillStyle = pen.strokeStyle = colour("soft");
  pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const every = Math.ceil(14 / (record.kv_heads * g.height + g.gap));
  for (let layer = 0; layer < record.layers; layer += every)
    pen.fillText(`layer ${layer}`, MARGIN.left - 8, g.y(layer * record.kv_heads) + (record.kv_heads * g.height) / 2);
  const bottom = g.total - MARGIN.bottom;
  pen.textAlign = "center";
  pen.textBaseline = "top";
  const step = [1, 2, 5].flatMap((n) => [1, 10, 100, 1e3, 1e4].map((d) => n * d)).sort((a, b) => a - b).find((n) => record.tokens / n <= 10) ?? 1e5;
  for (let position = 0; position <= record.tokens; position += step) {
    pen.fillRect(Math.round(g.x(position)), bottom, 1, 4);
    pen.fillText(number(position), Math.min(g.x(position), g.width - 20), bottom + 6);
  }
  pen.fillText("position", MARGIN.left + g.plot / 2, bottom + 20);
  const end = Math.round(g.x(record.prompt_tokens)) + 0.5;
  pen.strokeStyle = colour("ink");
  pen.setLineDash([4, 3]);
  pen.beginPath();
  pen.moveTo(end, MARGIN.top - 6);
  pen.lineTo(end, bottom);
  pen.stroke();
  pen.setLineDash([]);
  pen.textBaseline = "bottom";
  pen.textAlign = "left";
  pen.fillStyle = colour("ink");
  pen.fillText("generated from here", end + 4, MARGIN.top - 4);
  if (cursor) {
    pen.strokeStyle = colour("ink");
    pen.lineWidth = 2;
    const width = Math.max(5, g.plot / record.tokens);
    pen.strokeRect(g.x(cursor.position) - 1, g.y(cursor.row) - 1, width + 2, g.height + 2);
  }
}

function point(row, position) {
  cursor = { row: Math.max(0, Math.min(row, rows() - 1)), position: Math.max(0, Math.min(position, record.tokens - 1)) };
  inspect();
  draw();
}

function inspect() {
  const line = byId("cell");
  if (!cursor) {
    line.textContent = "Point at the map, or move with the arrow keys, to read a cell.";
    return;
  }
  const { row, position } = cursor, which = fate(row, position);
  const event = left[(state.epoch * rows() + row) * record.tokens + position];
  const when = which === 1 ? ` (eviction ${event + 1})` : "";
  line.textContent =
    `Layer ${Math.floor(row / record.kv_heads)}, KV head ${row % record.kv_heads}, position ${number(position)}: ` +
    SAID[which] + when;
}

function show() {
  state = new State(record, Number(slider.value));
  const anywhere = new Uint8Array(state.computed);
  let held = 0;
  for (let row = 0; row < rows(); row++) {
    const from = (state.epoch * rows() + row) * record.tokens;
    for (let position = 0; position < state.computed; position++)
      if (state.holds(left[from + position])) {
        anywhere[position] = 1;
        held += row === 0; // equally many everywhere
      }
  }
  const gone = anywhere.reduce((sum, any) => sum + !any, 0);
  byId("where").textContent = `${state.text}; each head holds ${number(held)}; ${number(gone)} are held by none`;
  slider.setAttribute("aria-valuetext", state.text);
  inspect();
  paint();
}

async function choose() {
  record = records[chooser.selectedIndex];
  if (!unpacked.has(record)) unpacked.set(record, await unpack(record.left));
  left = unpacked.get(record);
  cursor = null;
  byId("about").textContent = describe(record);
  byId("warning").textContent = warnings(record);
  slider.max = record.events.length ? record.events.length + 1 : 0;
  // The same part of the way in each record, so that policies can be compared.
  slider.value = asked.eviction ?? Math.round(part * slider.max);
  show();
  if (asked.position !== undefined) point(asked.head ?? 0, asked.position);
  asked = {};
}

let part = 1, asked = fromAddress();
for (const { label } of records) chooser.add(new Option(label));
chooser.selectedIndex = Math.min(asked.record ?? 0, records.length - 1);
chooser.addEventListener("change", choose);
slider.addEventListener("input", oncePerFrame(() => {
  part = slider.max > 0 ? slider.value / slider.max : 1;
  show();
}));
canvas.addEventListener("mousemove", (event) => {
  const g = geometry();
  const position = Math.floor(((event.offsetX - MARGIN.left) / g.plot) * record.tokens);
  let row = 0;
  while (row + 1 < rows() && g.y(row + 1) <= event.offsetY) row++;
  point(row, position);
});
canvas.addEventListener("keydown", (event) => {
  const far = event.shiftKey ? 32 : 1;
  const [down, right] = { ArrowLeft: [0, -far], ArrowRight: [0, far], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [0, 0];
  if (!down && !right) return;
  event.preventDefault();
  const from = cursor ?? { row: 0, position: 0 };
  point(from.row + down, from.position + right);
});
new ResizeObserver(() => left && paint()).observe(canvas.parentElement);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
choose();
