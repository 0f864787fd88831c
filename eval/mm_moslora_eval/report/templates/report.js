"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("scheme");
  const dark = () => root.dataset.scheme ? root.dataset.scheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { root.dataset.scheme = dark() ? "light" : "dark"; name(); });
  name();
  for (const gallery of document.querySelectorAll(".gallery")) {
    const buttons = [...gallery.querySelectorAll("[data-filter]")], search = gallery.querySelector("input");
    const cards = [...gallery.querySelectorAll("article")], none = gallery.querySelector(".none");
    const apply = () => {
      const kind = buttons.find(b => b.getAttribute("aria-pressed") === "true").dataset.filter;
      const words = search.value.toLowerCase();
      let shown = 0;
      for (const card of cards) {
        const fits = (kind === "all" || card.dataset.verdict === kind) && card.textContent.toLowerCase().includes(words);
        card.hidden = !fits;
        shown += fits;
      }
      none.hidden = shown > 0;
    };
    for (const b of buttons) b.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === b));
      apply();
    });
    search.addEventListener("input", apply);
  }
})();
