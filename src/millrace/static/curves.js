// Draws metric curves with uPlot; each is fetched when it comes into view.
const box = document.querySelector("[data-curves]");
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();
const options = new URLSearchParams(location.search);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const exact = (value) => (value == null ? "" : Number(value.toPrecision(5)).toString());

function say(plot, text) {
  const line = document.createElement("p");
  line.className = "said";
  line.textContent = text;
  plot.replaceChildren(line);
}

function axis(name) { return { stroke: colour("--soft"), grid: { stroke: colour("--rule"), width: 1 }, ticks: { show: false }, font: "11px system-ui", ...name }; }

function draw(figure, found) {
  const plot = figure.querySelector(".plot"), readout = figure.querySelector("output");
  const series = found.series.filter((one) => one.x.length);
  drawn.get(figure)?.destroy();
  drawn.delete(figure);
  if (!series.length) { say(plot, "no points yet"); return; }
  const many = found.series.length > 1;
  if (series.every((one) => one.x.length === 1)) {
    say(plot, many ? "one point per run: see the table" : `${exact(series[0].y[0]) || "not a number"} at ${found.x} ${exact(series[0].x[0])}`);
    return;
  }
  const data = many ? uPlot.join(series.map((one) => [one.x, one.y])) : [series[0].x, series[0].y];
  const isLog = options.get("scale") === "log" && series.every((one) => one.y.every((value) => value === null || value > 0));
  const lines = series.map((one) => ({
    label: one.name || one.run.slice(0, 12),
    stroke: colour(`--c${found.series.indexOf(one) % 10}`),
    width: 1.6,
    points: { show: one.x.length < 40, size: 4 },
  }));
  const rest = series.map((one) => (one.missing ? `${one.missing} not a number` : "")).filter(Boolean).join(", ");
  readout.value = rest;
  plot.replaceChildren();
  const chart = new uPlot({
    width: plot.clientWidth, height: plot.clientHeight,
    legend: { show: false },
    cursor: { sync: { key: "curves", setSeries: false }, focus: { prox: many ? 24 : -1 }, points: { size: 6 }, drag: { x: true, y: false } },
    focus: { alpha: many ? 0.25 : 1 },
    scales: { x: { time: false }, y: { distr: isLog ? 3 : 1 } },
    axes: [axis({ size: 26 }), axis({ size: 54, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : exact(tick))) })],
    series: [{}, ...lines],
    hooks: { setCursor: [(u) => {
      const at = u.cursor.idx;
      if (at == null || u.cursor.left < 0) { readout.value = rest; return; }
      const place = found.x === "step" ? `step ${exact(u.data[0][at])}` : `${exact(u.data[0][at])} s`;
      const focused = many ? u.series.findIndex((one, index) => index && one._focus) : 1;
      const value = focused > 0 ? u.data[focused][at] : null;
      readout.value = value == null ? place : `${many ? u.series[focused].label + " · " : ""}${place} · ${exact(value)}`;
    }] },
  }, data, plot);
  drawn.set(figure, chart);
}

async function load(figure) {
  figure.dataset.asked = "1";
  const query = new URLSearchParams({ metric: figure.dataset.metric, runs: box.dataset.runs, x: options.get("x") || "step" });
  try {
    const answer = await fetch(`${box.dataset.curves}?${query}`);
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.detail || answer.statusText);
    figure.found = found;
    draw(figure, found);
  } catch (error) { if (!drawn.has(figure)) say(figure.querySelector(".plot"), String(error.message || error)); }
}

if (box) {
  const figures = [...box.querySelectorAll("figure")];
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      entry.target.visible = entry.isIntersecting;
      if (entry.isIntersecting && !entry.target.dataset.asked) load(entry.target);
    }
  }, { rootMargin: "200px" });
  figures.forEach((figure) => seen.observe(figure));
  const again = () => figures.forEach((figure) => { if (figure.visible) load(figure); else delete figure.dataset.asked; });
  for (const one of document.querySelectorAll("select[data-curve-option]")) {
    one.value = options.get(one.dataset.curveOption) || one.options[0].value;
    one.addEventListener("change", () => {
      options.set(one.dataset.curveOption, one.value);
      if (one.selectedIndex === 0) options.delete(one.dataset.curveOption);
      history.replaceState(null, "", options.size ? `?${options}` : location.pathname);
      again();
    });
  }
  new ResizeObserver(() => drawn.forEach((chart, figure) => {
    const plot = figure.querySelector(".plot");
    if (plot.clientWidth !== chart.width) chart.setSize({ width: plot.clientWidth, height: plot.clientHeight });
  })).observe(box);
  dark.addEventListener("change", () => drawn.forEach((_, figure) => draw(figure, figure.found)));
  setInterval(() => { if (!document.hidden && document.querySelector("[data-part=state] .state.running")) again(); }, 3000);
}
