// Sends the fields of a model's page, draws the answer as bars and shows the equal command.
const form = document.querySelector("form.try");
if (form) start();

function start() {
  const picture = document.querySelector("#picture");
  const answer = document.querySelector("#answer");
  const took = document.querySelector("#took");
  const command = document.querySelector("#command");
  const url = location.origin + form.dataset.url;

  function row() {
    const values = {};
    for (const field of form.querySelectorAll("[data-column]")) {
      const text = field.value;
      if (field.type !== "number") values[field.dataset.column] = text;
      else values[field.dataset.column] = text === "" ? null : Number(text);
    }
    for (const field of form.querySelectorAll("[data-tensor]")) values[field.dataset.tensor] = JSON.parse(field.value);
    return values;
  }
  const file = () => picture && picture.files[0];
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

  function show() {
    if (file()) {
      command.textContent = `curl ${quoted(url)} \\\n  -H 'Content-Type: ${file().type}' --data-binary @${quoted(file().name)}`;
      return;
    }
    try {
      command.textContent = `curl ${quoted(url)} \\\n  -d ${quoted(JSON.stringify({ instances: [row()] }))}`;
    } catch (error) {
      command.textContent = `a field is not JSON: ${error.message}`;
    }
  }

  function element(name, attributes, text) {
    const made = document.createElementNS(name === "svg" || name === "rect" ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function bar(label, share, isFirst) {
    const line = element("tr", {});
    line.append(element("th", { scope: "row" }, label));
    const cell = element("td", { class: "wide" });
    const meter = element("svg", { class: "meter", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    meter.append(element("rect", { class: "track", width: 100, height: 10 }));
    meter.append(element("rect", { class: isFirst ? "on" : "on faint", width: 100 * (share || 0), height: 10 }));
    cell.append(meter);
    line.append(cell, element("td", { class: "n" }, share === null ? "–" : `${(100 * share).toFixed(1)} %`));
    return line;
  }

  function draw(prediction) {
    answer.replaceChildren(element("p", { class: "result" }, String(prediction.label ?? prediction.value)));
    if (!prediction.probabilities) return;
    const table = element("table", { class: "bars" });
    const body = element("tbody", {});
    const shares = Object.entries(prediction.probabilities).sort((one, other) => other[1] - one[1]);
    shares.slice(0, 20).forEach(([label, share], at) => body.append(bar(label, share, at === 0)));
    table.append(body);
    answer.append(table);
    if (shares.length > 20) answer.append(element("p", { class: "note" }, `and ${shares.length - 20} less likely ones`));
  }

  function complain(text) {
    answer.replaceChildren(element("p", { class: "said", role: "alert" }, text));
  }

  async function send() {
    const began = performance.now();
    let response;
    try {
      const body = file() ? file() : JSON.stringify({ instances: [row()] });
      const type = file() ? file().type : "application/json";
      response = await fetch(form.dataset.url, { method: "POST", body, headers: { "Content-Type": type, Accept: "application/json" } });
    } catch (error) {
      complain(error instanceof SyntaxError ? `a field is not JSON: ${error.message}` : "the server cannot be reached");
      return;
    }
    const said = await response.json();
    took.textContent = `${(performance.now() - began).toFixed(0)} ms`;
    if (response.ok) draw(said.predictions[0]);
    else complain(said.error);
  }

  const canvas = document.querySelector("#drawn");
  function sketch() {
    const values = JSON.parse(form.querySelector("[data-tensor]").value);
    const channels = Number(canvas.dataset.channels);
    if (values.length !== canvas.width * canvas.height * channels) return;
    const brightest = Math.max(...values, 1e-9);
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(canvas.width, canvas.height);
    for (let at = 0; at < canvas.width * canvas.height; at++) {
      for (let part = 0; part < 3; part++) {
        pixels.data[4 * at + part] = 255 * values[at * channels + (channels >= 3 ? part : 0)] / brightest;
      }
      pixels.data[4 * at + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  }
  async function sketchFile() {
    try {
      const image = await createImageBitmap(file());
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    } catch {
      complain(`${file().name} is no picture that can be shown`);
    }
  }

  form.addEventListener("submit", (event) => { event.preventDefault(); send(); });
  form.addEventListener("input", show);
  if (picture) picture.addEventListener("change", () => { show(); if (file()) sketchFile(); else sketch(); });
  document.querySelector("#copy").addEventListener("click", async (event) => {
    await navigator.clipboard.writeText(command.textContent);
    event.target.textContent = "Copied";
  });
  if (canvas) sketch();
  show();
}
