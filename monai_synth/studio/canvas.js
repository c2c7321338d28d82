// Paints a label map: one label a pixel, without blurred edges, by mouse, finger or keys.
// props.value is JSON, {"size": [rows, columns], "runs": [[label, count], ...]}, row by row; see canvas.py.
const canvas = element.querySelector("canvas");
const context = canvas.getContext("2d");
const ring = element.querySelector(".ring");
const place = element.querySelector(".place");
const width = element.querySelector("input[type=range]");
const colours = JSON.parse(canvas.dataset.colours);
const names = JSON.parse(canvas.dataset.names);
const MOST_UNDO = 20;
let rows = 0, columns = 0, pixels = new Uint8Array(0);
let cursor = [0, 0], last = null, before = [];

function read() {
  const given = JSON.parse(props.value);
  if (given.size[0] !== rows || given.size[1] !== columns) {
    [rows, columns] = given.size;
    cursor = [Math.floor(rows / 2), Math.floor(columns / 2)];
    before = [];
    canvas.width = columns;
    canvas.height = rows;
  }
  pixels = new Uint8Array(rows * columns);
  let at = 0;
  for (const [label, count] of given.runs) {
    pixels.fill(label, at, at + count);
    at += count;
  }
  show();
}

function write() {
  const runs = [];
  for (const label of pixels) {
    const end = runs[runs.length - 1];
    if (end && end[0] === label) end[1] += 1;
    else runs.push([label, 1]);
  }
  props.value = JSON.stringify({ size: [rows, columns], runs });
  tell();
}

function show() {
  const image = context.createImageData(columns, rows);
  for (let i = 0; i < pixels.length; i += 1) {
    const colour = colours[pixels[i]] || [255, 0, 255];
    image.data.set([colour[0], colour[1], colour[2], 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  tell();
}

function tell() {
  const there = [...new Set(pixels)].sort((a, b) => a - b).map((label) => names[label]).join(", ");
  place.textContent =
    `Row ${Math.round(cursor[0])}, column ${Math.round(cursor[1])} of ${rows} x ${columns}. On the map: ${there}.`;
  const box = canvas.getBoundingClientRect(), outer = canvas.parentElement.getBoundingClientRect();
  const side = (Math.max(1, Number(width.value)) * box.width) / columns;
  ring.style.width = ring.style.height = `${side}px`;
  ring.style.left = `${box.left - outer.left + ((cursor[1] + 0.5) * box.width) / columns - side / 2}px`;
  ring.style.top = `${box.top - outer.top + ((cursor[0] + 0.5) * box.height) / rows - side / 2}px`;
}

function keep() {
  before.push(pixels.slice());
  if (before.length > MOST_UNDO) before.shift();
}

function undo() {
  if (!before.length) return;
  pixels = before.pop();
  show();
  write();
}

// A disc around each point of the line, as monai_synth.studio.maps.stamp draws it.
function paint(from, to) {
  const label = Number(element.querySelector("input[type=radio]:checked").value);
  const radius = Number(width.value) / 2;
  const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1])));
  for (let step = 0; step <= steps; step += 1) {
    const row = from[0] + ((to[0] - from[0]) * step) / steps;
    const column = from[1] + ((to[1] - from[1]) * step) / steps;
    for (let r = Math.max(0, Math.floor(row - radius)); r <= Math.min(rows - 1, Math.ceil(row + radius)); r += 1) {
      const end = Math.min(columns - 1, Math.ceil(column + radius));
      for (let c = Math.max(0, Math.floor(column - radius)); c <= end; c += 1) {
        const within = (r - row) ** 2 + (c - column) ** 2 <= radius ** 2;
        if (within || (r === Math.round(row) && c === Math.round(column))) pixels[r * columns + c] = label;
      }
    }
  }
  show();
}

function at(event) {
  const box = canvas.getBoundingClientRect();
  const row = ((event.clientY - box.top) * rows) / box.height - 0.5;
  const column = ((event.clientX - box.left) * columns) / box.width - 0.5;
  return [Math.min(rows - 1, Math.max(0, row)), Math.min(columns - 1, Math.max(0, column))];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  keep();
  last = cursor = at(event);
  paint(last, cursor);
});
canvas.addEventListener("pointermove", (event) => {
  cursor = at(event);
  if (last === null) return tell();
  paint(last, cursor);
  last = cursor;
});
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (last === null) return;
    last = null;
    write();
  });
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (move) {
    const far = event.shiftKey ? 8 : 1;
    cursor = [
      Math.min(rows - 1, Math.max(0, Math.round(cursor[0]) + far * move[0])),
      Math.min(columns - 1, Math.max(0, Math.round(cursor[1]) + far * move[1])),
    ];
    tell();
  } else if (event.key === " " || event.key === "Enter") {
    cursor = cursor.map(Math.round);
    keep();
    paint(cursor, cursor);
    write();
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
    undo();
  } else {
    return;
  }
  event.preventDefault();
});
element.querySelector(".undo").addEventListener("click", undo);
width.addEventListener("input", tell);
new ResizeObserver(tell).observe(canvas);
watch("value", read);
read();
