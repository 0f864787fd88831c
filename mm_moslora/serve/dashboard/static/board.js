"use strict";
(() => {
  // State: the rows of all runs, the chosen runs, and their fetched details. Texts are always set as text, never as
  // markup, since questions and answers come from data sets and models.
  const COLOURS = 6, W = 440, H = 240, LEFT = 54, RIGHT = 20, TOP = 10, BOTTOM = 26;
  const at = (id) => document.getElementById(id);
  let rows = [], chosen = [], details = new Map(), tab = "curves", smoothing = 0.6, logScale = false, first = true;

  const make = (tag, attributes = {}, ...children) => {
    const node = ["svg", "line", "polyline", "text", "circle"].includes(tag)
      ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  };
  const short = (value) => (value === null || value === undefined ? "·" : Math.abs(value) >= 10000 ? Math.round(value).toLocaleString("en")
    : Math.abs(value) < 1e-3 && value !== 0 ? value.toExponential(2) : Number(value.toPrecision(4)).toString());
  const duration = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`);
  const colour = (id) => `c${chosen.indexOf(id) % COLOURS}`;
  const missing = (text) => make("p", { class: "missing" }, text);
  const row = (id) => rows.find((item) => item.id === id);
  const title = (id) => row(id)?.name ?? id;

  // ---------------------------------------------------------------- the list
  const score = (item) => Math.max(-1, ...Object.values(item.scores));
  const orders = {
    changed: (a, b) => b.changed - a.changed, name: (a, b) => a.name.localeCompare(b.name),
    loss: (a, b) => (a.loss ?? Infinity) - (b.loss ?? Infinity), score: (a, b) => score(b) - score(a),
  };
  const matches = (item, words) => words.every((word) => {
    const [key, value] = word.split("=");
    if (value !== undefined) return Object.entries(item.recipe).some(([name, text]) => name.toLowerCase().endsWith(key) && text.toLowerCase() === value);
    return `${item.name} ${item.title} ${item.state}`.toLowerCase().includes(word);
  });
  const describe = (item) => {
    const parts = [];
    if (item.stage) parts.push(item.stage);
    if (item.step !== null) parts.push(item.total ? `step ${item.step} of ${item.total}` : `step ${item.step}`);
    if (item.loss !== null && item.loss !== undefined) parts.push(`loss ${short(item.loss)}`);
    if (item.state === "running" && item.eta_seconds) parts.push(`${duration(item.eta_seconds)} left`);
    if (item.reason) parts.push(item.reason);
    for (const [task, text] of Object.entries(item.shown)) parts.push(`${task} ${text}`);
    return parts.join(" · ");
  };
  const listed = (item) => {
    const box = make("input", { type: "checkbox", value: item.id, checked: chosen.includes(item.id), onchange: () => choose(item.id, box.checked) });
    return make("li", {}, make("label", {},
      chosen.includes(item.id) ? make("span", {}, box, make("i", { class: `key ${colour(item.id)}` })) : make("span", {}, box),
      make("b", {}, item.name), make("span", { class: `state ${item.state}` }, item.state),
      make("small", { class: item.fault ? "fault" : "", title: item.fault ?? item.reason }, item.fault ?? describe(item)),
      item.total && item.state === "running" ? progress(item.step / item.total) : null));
  };
  const progress = (share) => {
    const bar = make("i");
    bar.style.width = `${Math.min(100, 100 * share)}%`;
    return make("span", { class: "progress" }, bar);
  };
  const drawList = () => {
    const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = rows.filter((item) => matches(item, words)).sort(orders[at("sort").value]);
    at("count").textContent = `${shown.length} of ${rows.length} runs`;
    at("runs").replaceChildren(...shown.map(listed));
  };
  const choose = async (id, on) => {
    chosen = on ? [...chosen, id] : chosen.filter((other) => other !== id);
    drawList();
    await fetchDetails([id]);
    drawPanel();
  };

  // ---------------------------------------------------------------- the views
  const drawCurves = () => {
    const charts = new Map();
    for (const id of chosen) for (const stage of details.get(id)?.stages ?? []) for (const [key, points] of Object.entries(stage.curves)) {
      const name = (details.get(id).stages.length > 1 ? `${stage.name}: ` : "") + key;
      if (!charts.has(name)) charts.set(name, []);
      charts.get(name).push({ id, points });
    }
    const rank = (name) => ["loss", "validation_loss", "token_accuracy", "grad_norm", "tokens_per_second", "wall_seconds"].findIndex((key) => name.endsWith(key));
    const names = [...charts.keys()].sort((a, b) => ((rank(a) + 99) % 99) - ((rank(b) + 99) % 99) || a.localeCompare(b));
    at("tools").replaceChildren(
      make("label", {}, "Smoothing ", make("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: smoothing, oninput: (event) => { smoothing = Number(event.target.value); drawPanelOnly(); } })),
      make("label", {}, make("input", { type: "checkbox", checked: logScale, onchange: (event) => { logScale = event.target.checked; drawPanelOnly(); } }), " logarithmic"));
    return names.length ? make("div", { class: "charts" }, ...names.map((name) => chart(name, charts.get(name)))) : missing("No metrics yet.");
  };
  const smoothed = (points) => {
    let total = 0, weight = 0;
    return points.map(([x, y]) => { total = smoothing * total + (1 - smoothing) * y; weight = smoothing * weight + 1 - smoothing; return [x, total / weight]; });
  };
  const ticks = (low, high) => {
    if (!(high > low)) return [low];
    const raw = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 2.5, 5, 10].find((factor) => raw <= factor * unit * 1.0001);
    const marks = [];
    for (let mark = Math.ceil(low / step - 1e-9) * step; mark <= high + step * 1e-9; mark += step) marks.push(mark);
    return marks;
  };
  const chart = (name, series) => {
    const lines = series.map((line) => ({ ...line, raw: line.points, points: smoothed(line.points) }));
    const all = lines.flatMap((line) => line.points), log = logScale && all.every(([, y]) => y > 0);
    const level = (y) => (log ? Math.log10(y) : y);
    let [x0, x1] = [Math.min(...all.map(([x]) => x)), Math.max(...all.map(([x]) => x))];
    let [y0, y1] = [Math.min(...all.map(([, y]) => level(y))), Math.max(...all.map(([, y]) => level(y)))];
    if (x1 === x0) x1 = x0 + 1;
    if (y1 === y0) { y0 -= Math.abs(y0) * 0.1 || 1; y1 += Math.abs(y1) * 0.1 || 1; }
    const px = (x) => LEFT + ((x - x0) / (x1 - x0)) * (W - LEFT - RIGHT), py = (y) => H - BOTTOM - ((level(y) - y0) / (y1 - y0)) * (H - TOP - BOTTOM);
    const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${name} of ${lines.map((line) => title(line.id)).join(", ")}` });
    for (const mark of ticks(y0, y1)) {
      const value = log ? 10 ** mark : mark, y = py(value);
      svg.append(make("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y, y2: y }), make("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, short(value)));
    }
    for (const mark of ticks(x0, x1)) svg.append(make("text", { x: px(mark), y: H - 8, "text-anchor": "middle" }, short(mark)));
    svg.append(make("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM }));
    for (const line of lines) svg.append(line.points.length === 1
      ? make("circle", { class: colour(line.id), cx: px(line.points[0][0]), cy: py(line.points[0][1]), r: 3 })
      : make("polyline", { class: colour(line.id), points: line.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ") }));
    // The measured value first, as in the list of runs, then the smoothed one.
    const value = (line, index) => `${title(line.id)} ${short(line.raw[index][1])}${smoothing > 0 && line.raw.length > 1 ? ` (smoothed ${short(line.points[index][1])})` : ""}`;
    const last = lines.map((line) => value(line, line.raw.length - 1)).join(", ");
    const readout = make("p", { class: "readout" }, last);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = x0 + (((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT) * (x1 - x0);
      const near = ({ raw }) => raw.reduce((best, point, index) => (Math.abs(point[0] - x) < Math.abs(raw[best][0] - x) ? index : best), 0);
      readout.textContent = `Step ${Math.round(lines[0].raw[near(lines[0])][0])}: ${lines.map((line) => value(line, near(line))).join(", ")}`;
    });
    svg.addEventListener("pointerleave", () => { readout.textContent = last; });
    return make("figure", { class: "card chart" }, make("figcaption", {}, name), svg, readout);
  };

  const drawScores = () => {
    const tasks = new Map();
    for (const id of chosen) for (const task of details.get(id)?.tasks ?? []) {
      if (!tasks.has(task.name)) tasks.set(task.name, []);
      tasks.get(task.name).push(...task.rows.map((item) => ({ id, top: task.top, ...item })));
    }
    if (!tasks.size) return missing("None of the chosen runs has been evaluated yet.");
    return make("div", {}, ...[...tasks].map(([name, items]) => make("div", { class: "card" }, make("b", {}, name || "Evaluation"),
      ...items.sort((a, b) => (b.name === "tuned") - (a.name === "tuned")).map((item, _, all) => {
        const top = Math.max(...all.map((other) => other.top));
        const fill = make("span", { class: `fill ${colour(item.id)} ${item.name === "tuned" ? "" : "other"}` }), whisker = make("span", { class: "whisker" });
        fill.style.width = `${100 * Math.max(0, item.mean) / top}%`;
        whisker.style.left = `${100 * Math.max(0, item.low) / top}%`;
        whisker.style.right = `${100 - 100 * Math.min(1, item.high / top)}%`;
        return make("div", { class: "score" }, make("span", {}, title(item.id), make("small", {}, `${item.label}, n = ${item.n}`)),
          make("span", { class: "track" }, fill, whisker), make("b", {}, item.shown, make("small", {}, item.interval)));
      }))));
  };

  const drawGallery = () => {
    const cards = chosen.flatMap((id) => (details.get(id)?.samples ?? []).map((sample) => make("article", { class: "sample" },
      sample.picture ? make("img", { src: `api/picture?id=${encodeURIComponent(id)}&number=${sample.number}`, alt: `Picture of: ${sample.question}`, loading: "lazy" }) : null,
      make("div", {}, make("i", { class: `key ${colour(id)}`, title: title(id) }), make("b", {}, sample.question), make("dl", {}, make("dt", {}, "Expected"), make("dd", {}, sample.answer),
        ...(sample.before === null ? [] : [make("dt", {}, "Before"), make("dd", {}, sample.before.trim() || "(nothing)")]),
        ...(sample.after === null ? [] : [make("dt", {}, "After"), make("dd", { class: sample.kind }, sample.after.trim() || "(nothing)")]))))));
    return cards.length ? make("div", { class: "gallery" }, ...cards) : missing("The chosen runs have no samples.");
  };

  const heatMap = (matrix, scale) => {
    const canvas = make("canvas", { width: matrix[0].length, height: matrix.length }), context = canvas.getContext("2d"), image = context.createImageData(matrix[0].length, matrix.length);
    matrix.flat().forEach((value, index) => image.data.set([...(value >= 0 ? [217, 95, 14] : [37, 99, 235]), Math.round(255 * Math.sqrt(Math.min(1, Math.abs(value) / (scale || 1))))], 4 * index));
    context.putImageData(image, 0, 0);
    return canvas;
  };
  const drawMixers = () => {
    const cards = chosen.flatMap((id) => (details.get(id)?.mixers ?? []).slice(0, 12).map((mixer) => {
      const scale = Math.max(...[...(mixer.before ?? []), ...mixer.after].flat().map(Math.abs));
      const maps = make("div", { class: "maps" });
      if (mixer.before) maps.append(make("div", {}, heatMap(mixer.before, scale), "before"));
      maps.append(make("div", {}, heatMap(mixer.after, scale), "after"));
      if (mixer.pairs) maps.append(make("div", {}, heatMap(mixer.pairs, Math.max(...mixer.pairs.flat())), "pairs"));
      return make("figure", { class: "card" }, make("figcaption", {}, make("i", { class: `key ${colour(id)}` }), " ", make("code", {}, mixer.path)), maps,
        make("p", { class: "readout" }, Object.entries(mixer.figures).map(([key, value]) => `${key.replaceAll("_", " ")} ${short(value)}`).join(", ")));
    }));
    const lens = chosen.flatMap((id) => (details.get(id)?.lens ?? []).map((map) => {
      const largest = Math.max(...map.cells.flat()), layers = [map.columns[0], map.columns.at(-1)].filter(Boolean);
      return make("figure", { class: "card lens" }, make("figcaption", {}, make("i", { class: `key ${colour(id)}` }), ` ${map.title}`),
        make("div", {}, make("ol", {}, ...map.rows.map((name) => make("li", {}, name))),
          heatMap(map.cells.map((line) => line.map((value) => value * value)), largest * largest)), // without the root that helps mixers
        make("p", { class: "readout" }, `${layers.length > 1 ? `layers ${layers.join(" to ")}, ` : ""}0 is pale, ${short(largest)} is full colour`));
    }));
    const all = [...lens, ...cards];
    return all.length ? make("div", { class: "charts" }, ...all) : missing("The chosen runs have no mixers yet.");
  };

  const drawRecipes = () => {
    const keys = [...new Set(chosen.flatMap((id) => Object.keys(row(id)?.recipe ?? {})))].sort();
    const lines = keys.map((key) => [key, chosen.map((id) => row(id)?.recipe[key] ?? "·")]).filter(([, cells]) => chosen.length < 2 || new Set(cells).size > 1);
    if (!lines.length) return missing(chosen.length > 1 ? "The recipes are equal, or missing." : "This run has no recipe in its folder.");
    return make("div", { class: "card scroll" }, make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, chosen.length > 1 ? "Differing key" : "Key"), ...chosen.map((id) => make("th", {}, title(id))))),
      make("tbody", {}, ...lines.map(([key, cells]) => make("tr", {}, make("td", {}, make("code", {}, key)), ...cells.map((cell) => make("td", {}, cell)))))));
  };

  const views = { curves: drawCurves, scores: drawScores, gallery: drawGallery, mixers: drawMixers, recipes: drawRecipes };
  const notes = () => chosen.flatMap((id) => [row(id)?.fault, row(id)?.reason, ...(details.get(id)?.notes ?? [])].filter(Boolean).map((text) =>
    make("p", { class: "note" }, make("i", { class: `key ${colour(id)}` }), ` ${title(id)}: ${text}`)));
  const drawPanel = () => {
    if (tab !== "curves") at("tools").replaceChildren();
    at("panel").replaceChildren(...(tab === "curves" ? notes() : []), chosen.length ? views[tab]() : missing("Choose one or several runs on the left."));
    at("panel").dataset.tab = tab;
  };
  const drawPanelOnly = () => {
    const kept = [...at("tools").childNodes];
    drawPanel();
    at("tools").replaceChildren(...kept); // the slider under the pointer stays the same element
  };

  // ---------------------------------------------------------------- the server
  const fetchDetails = (ids) => Promise.all(ids.map(async (id) => {
    const answer = await fetch(`api/run?id=${encodeURIComponent(id)}`).catch(() => null); // the server is gone, which the header shows
    if (answer?.ok) details.set(id, await answer.json());
  }));
  const take = async (state) => {
    const before = new Map(rows.map((item) => [item.id, item.changed]));
    rows = state.runs;
    at("folder").textContent = state.folder;
    chosen = chosen.filter((id) => row(id));
    if (first && rows.length) { first = false; chosen = [rows[0].id]; }
    drawList();
    const stale = chosen.filter((id) => !details.has(id) || before.get(id) !== row(id).changed);
    if (stale.length || !chosen.length) { await fetchDetails(stale); drawPanel(); }
  };
  const status = (state, text) => { at("live").dataset.state = state; at("live").textContent = text; };
  const source = new EventSource("events");
  source.addEventListener("open", () => status("live", "live"));
  source.addEventListener("error", () => status("lost", "connection lost, trying again…"));
  source.addEventListener("runs", (event) => take(JSON.parse(event.data)));

  at("filter").addEventListener("input", drawList);
  at("sort").addEventListener("change", drawList);
  for (const button of document.querySelectorAll("[data-tab][role=tab]")) button.addEventListener("click", () => {
    tab = button.dataset.tab;
    for (const other of document.querySelectorAll("[role=tab]")) other.setAttribute("aria-selected", String(other === button));
    drawPanel();
  });
})();
