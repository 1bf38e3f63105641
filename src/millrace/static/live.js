// Keeps a page true: when something happens, the parts that are marked are read again from the server.
const root = document.querySelector("[data-live]");
const QUIET_MS = 700, OLD_MS = 60000, BUSY_MS = 4000;
const seen = new WeakMap();
let stream, timer, loading = false, again = false;

function remember(part) {
  return {
    checked: new Set([...part.querySelectorAll("input:checked")].map((one) => one.name + one.value)),
    open: new Set([...part.querySelectorAll("details[open][id]")].map((one) => one.id)),
    focus: part.contains(document.activeElement) ? document.activeElement.id : "",
    left: [...part.querySelectorAll(".scroll")].map((one) => one.scrollLeft),
    rows: new Map([...part.querySelectorAll("tr[id]")].map((one) => [one.id, one.dataset.v])),
  };
}

function recall(part, was) {
  for (const one of part.querySelectorAll("input[type=checkbox]")) one.checked = was.checked.has(one.name + one.value);
  for (const one of part.querySelectorAll("details[id]")) one.open = was.open.has(one.id);
  part.querySelectorAll(".scroll").forEach((one, at) => { one.scrollLeft = was.left[at] || 0; });
  for (const row of part.querySelectorAll("tr[id]")) if (was.rows.get(row.id) !== row.dataset.v) row.classList.add("fresh");
  if (was.focus) document.getElementById(was.focus)?.focus();
}

async function refresh() {
  if (loading) { again = true; return; }
  loading = true;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (answer.ok) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const shape = (page) => page.querySelector("main").dataset.shape;
      if (shape(fresh) !== shape(document)) { location.reload(); return; } // another chart, or another step's log
      for (const part of document.querySelectorAll("[data-part]")) {
        const other = fresh.querySelector(`[data-part="${part.dataset.part}"]`);
        if (!other || other.innerHTML === seen.get(part)) continue;
        const was = remember(part);
        seen.set(part, other.innerHTML);
        part.replaceChildren(...other.childNodes);
        recall(part, was);
      }
      document.dispatchEvent(new Event("parts"));
    }
  } catch { /* the server is gone for a moment: the stream says when it is back */ } finally { loading = false; }
  if (again) { again = false; soon(); }
  else plan(document.querySelector("[data-part] .state.running") ? BUSY_MS : OLD_MS);
}

function plan(wait) { clearTimeout(timer); timer = setTimeout(refresh, wait); }
function soon() { plan(QUIET_MS); }

// A hidden page lets go of its connection: a browser has six for one server.
function follow() {
  stream?.close();
  if (document.hidden) { clearTimeout(timer); return; }
  stream = new EventSource(root.dataset.live);
  stream.onmessage = (message) => { root.dataset.live = root.dataset.live.replace(/since=\d+/, `since=${message.lastEventId}`); soon(); };
  stream.addEventListener("end", () => { stream.close(); soon(); });
  plan(OLD_MS);
}

if (root) {
  follow();
  document.addEventListener("visibilitychange", () => { follow(); if (!document.hidden) soon(); });
  addEventListener("pagehide", () => stream?.close());
  addEventListener("pageshow", (event) => { if (event.persisted) { follow(); soon(); } });
  if (document.querySelector("[data-part] .state.running")) plan(BUSY_MS);
}
