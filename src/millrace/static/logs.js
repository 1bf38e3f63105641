// Goes on with a log from where the page stopped, for as long as the step prints.
const log = document.querySelector("[data-tail]");
const MOST = 400000;
let tail;

function append(text) {
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 24;
  log.append(text);
  if (log.textContent.length > MOST) log.textContent = log.textContent.slice(-MOST / 2);
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function follow() {
  tail?.close();
  if (document.hidden) return;
  tail = new EventSource(log.dataset.tail);
  tail.onmessage = (message) => {
    const part = JSON.parse(message.data);
    log.dataset.tail = log.dataset.tail.replace(/offset=\d+/, `offset=${part.next_offset}`);
    append(part.text);
  };
  tail.addEventListener("end", () => { tail.close(); log.removeAttribute("data-tail"); });
}

const box = document.querySelector("pre.log");
if (box) box.scrollTop = box.scrollHeight;
if (log) {
  follow();
  document.addEventListener("visibilitychange", () => { if (log.dataset.tail) follow(); });
  addEventListener("pagehide", () => tail?.close());
}
for (const one of document.querySelectorAll("select[data-submit]")) one.addEventListener("change", () => one.form.requestSubmit());
