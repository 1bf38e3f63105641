// The Compare button counts what is ticked; menus close when one clicks elsewhere or presses Escape.
const button = document.querySelector("#compare");
function count() {
  const ticked = document.querySelectorAll("input[name=runs]:checked").length;
  button.disabled = ticked < 2;
  button.textContent = ticked < 2 ? "Compare" : `Compare ${ticked}`;
}
if (button) {
  document.addEventListener("change", count);
  document.addEventListener("parts", count);
  addEventListener("pageshow", count);
  count();
}
const menus = document.querySelectorAll("details.menu");
document.addEventListener("click", (event) => { for (const menu of menus) if (!menu.contains(event.target)) menu.open = false; });
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of menus) if (menu.open) { menu.open = false; menu.querySelector("summary").focus(); }
});
for (const one of document.querySelectorAll("select[data-submit]")) one.addEventListener("change", () => one.form.requestSubmit());
