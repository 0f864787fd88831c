"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("scheme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.scheme ? root.dataset.scheme === "dark" : dark.matches);
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.scheme = isDark() ? "light" : "dark"; name(); });
  dark.addEventListener("change", name);
  name();

  const short = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(4)).toString());
  for (const chart of document.querySelectorAll(".chart[data-series]")) {
    const series = JSON.parse(chart.dataset.series);
    const svg = chart.querySelector("svg"), cursor = chart.querySelector(".cursor"), readout = chart.querySelector(".readout");
    const longest = series.reduce((a, b) => (b.points.length > a.points.length ? b : a)).points;
    const resting = readout.textContent;
    let index = longest.length - 1;
    const show = () => {
      const [step, , x] = longest[index];
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      const values = series.map((line) => {
        const near = line.points.reduce((a, b) => (Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a));
        return `${line.name} ${short(near[1])}`;
      });
      readout.textContent = `Step ${Math.round(step)}: ${values.join(", ")}`;
    };
    const rest = () => {
      cursor.setAttribute("x1", -9);
      cursor.setAttribute("x2", -9);
      readout.textContent = resting;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      index = longest.reduce((best, point, i) => (Math.abs(point[2] - x) < Math.abs(longest[best][2] - x) ? i : best), 0);
      show();
    });
    svg.addEventListener("pointerleave", rest);
    svg.addEventListener("blur", rest);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      index = Math.max(0, Math.min(longest.length - 1, index + move));
      show();
    });
  }
})();
