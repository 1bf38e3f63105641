// Leads from addresses that MLflow's client prints, /#/experiments/0/runs/ID, to the page that they mean.
function follow() {
  const [, path] = /^#(\/(?:experiments|models)\/[^?]+)/.exec(location.hash) || [];
  if (path) location.replace(path);
}

if (location.pathname === "/") {
  follow();
  addEventListener("hashchange", follow);
}
