// Parallel coordinates of the table's rows that differ: one axis per row, one line per run.
const box = document.querySelector("[data-parallel]");
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 1100, HEIGHT = 300, TOP = 44, BOTTOM = 28, SIDE = 80;

function make(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function cut(text, most) { return text.length > most ? text.slice(0, most - 1) + "…" : text; }

// Numbers by size, texts evenly spaced in their order; what is absent lies at the bottom, off the axis.
function scale(values) {
  const known = values.filter((value) => value !== "");
  const numbers = known.map(Number);
  const height = HEIGHT - TOP - BOTTOM;
  if (known.length && numbers.every(Number.isFinite)) {
    const low = Math.min(...numbers), high = Math.max(...numbers);
    const at = (value) => TOP + height * (1 - (high > low ? (Number(value) - low) / (high - low) : 0.5));
    const ends = [...new Set([low, high])];
    return { at, marks: ends.map((value) => [at(value), Number(value.toPrecision(4)).toString()]) };
  }
  const names = [...new Set(known)].sort();
  const at = (value) => TOP + height * (names.length > 1 ? names.indexOf(value) / (names.length - 1) : 0.5);
  const every = Math.ceil(names.length / 8);
  return { at, marks: names.filter((_, index) => index % every === 0).map((name) => [at(name), cut(name, 14)]) };
}

function draw() {
  const rows = [...document.querySelectorAll("tr[data-axis]")];
  const runs = [...document.querySelectorAll(".legend li")];
  if (rows.length < 2) return;
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${runs.length} runs over ${rows.length} axes; the tables below have the numbers` });
  const step = (WIDTH - 2 * SIDE) / (rows.length - 1);
  const lines = runs.map(() => []);
  rows.forEach((row, index) => {
    const x = SIDE + step * index;
    const values = [...row.querySelectorAll("td")].map((cell) => cell.dataset.value ?? cell.textContent.trim());
    const { at, marks } = scale(values);
    svg.append(make("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM, class: "axis" }));
    svg.append(make("text", { x, y: 18, "text-anchor": "middle", class: "title" }, cut(row.dataset.axis, Math.floor(step / 7))));
    for (const [y, text] of marks) svg.append(make("text", { x: x + 6, y: y + 4 }, text));
    values.forEach((value, run) => lines[run].push([x, value === "" ? HEIGHT - 8 : at(value)]));
  });
  const paths = lines.map((points, run) => {
    const path = make("path", { d: "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L"), class: `s${run % 10}` });
    path.append(make("title", {}, runs[run].textContent.trim()));
    return path;
  });
  svg.prepend(...paths);
  const show = (chosen) => paths.forEach((path, run) => path.classList.toggle("dim", chosen !== null && run !== chosen));
  [...paths, ...runs].forEach((element, index) => {
    element.addEventListener("pointerenter", () => show(index % runs.length));
    element.addEventListener("pointerleave", () => show(null));
  });
  runs.forEach((run, index) => { run.addEventListener("focusin", () => show(index)); run.addEventListener("focusout", () => show(null)); });
  box.replaceChildren(svg);
  box.closest(".card").hidden = false;
}

if (box) draw();
