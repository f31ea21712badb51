"use strict";
// Draws the figures in the colours of the page's theme, sorts tables, and shows a trial everywhere when it is pointed at.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const charts = [...document.querySelectorAll(".chart")];
  const rows = [...document.querySelectorAll("tr[data-trial]")];
  const options = {
    displaylogo: false, responsive: true, doubleClick: "reset+autosize",
    modeBarButtonsToRemove: ["lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    toImageButtonOptions: { format: "svg" },
  };
  let pinned = null;

  // "@ink" in a figure is the page's --ink.
  function painted(value, styles) {
    if (typeof value === "string") {
      return /^@[a-z0-9-]+$/.test(value) ? styles.getPropertyValue("--" + value.slice(1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => painted(item, styles));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) =>
      [key, /color$|^line$|^marker|font$|label$|^error_[xy]$|axis\d*$|^shapes$|^modebar$|^annotations$/.test(key) ? painted(item, styles) : item]));
  }

  function choice(name, what) {
    const found = document.querySelector(`select[data-of="${name}"][data-what="${what}"]`);
    return found ? found.value : null;
  }

  function figureOf(name) {
    const found = data.figures[name];
    return found.variants ? found.variants[choice(name, "key")] : found;
  }

  function traceOf(trace, along) {
    const made = { ...trace };
    if (along && trace.meta && trace.meta[along]) made.x = trace.meta[along];
    if (trace.customdata && data.trials) made.text = trace.customdata.map((trial) => data.trials[trial] || "");
    return made;
  }

  function draw(chart) {
    const name = chart.dataset.chart;
    const figure = figureOf(name);
    const styles = getComputedStyle(root);
    const select = document.querySelector(`select[data-of="${name}"][data-what="along"]`);
    const layout = painted(figure.layout, styles);
    if (select && select.value !== "steps") layout.xaxis.title.text = select.selectedOptions[0].textContent;
    layout.font = { ...layout.font, family: getComputedStyle(document.body).fontFamily, color: painted(figure.layout.font.color, styles) };
    layout.autosize = true;
    if (chart.closest(".wide")) delete layout.height; // as high as its neighbour
    const traces = figure.data.map((trace) => painted(traceOf(trace, select && select.value), styles));
    return Plotly.react(chart, traces, layout, options);
  }

  // --- pointing at trials ---
  function pointsOf(chart, overlay, wanted) {
    const x = [], y = [];
    for (const trace of chart.data) {
      if (trace === overlay || !trace.customdata || (trace.xaxis || "x") !== (overlay.xaxis || "x")) continue;
      if (trace.yaxis === "y2" && !(overlay.yaxis === "y2")) continue;
      let last = null;
      trace.customdata.forEach((trial, index) => {
        const is = wanted.has(trial);
        if (is) { x.push(trace.x[index]); y.push(trace.y[index]); }
        if (last !== null && (!is || trial !== last)) { x.push(null); y.push(null); }
        last = is ? trial : null;
      });
      x.push(null); y.push(null);
    }
    return [x, y];
  }

  function highlight(trials) {
    const wanted = new Set(trials);
    for (const row of rows) {
      const is = wanted.has(Number(row.dataset.trial));
      row.classList.toggle("on", is);
      row.classList.toggle("off", wanted.size > 1 && !is);
    }
    for (const chart of charts) {
      const at = chart.data.map((trace, index) => trace.meta && trace.meta.overlay ? index : -1).filter((index) => index >= 0);
      if (!at.length) continue;
      chart.classList.toggle("dim", wanted.size > 0);
      const found = at.map((index) => pointsOf(chart, chart.data[index], wanted));
      Plotly.restyle(chart, { x: found.map((pair) => pair[0]), y: found.map((pair) => pair[1]) }, at);
    }
  }

  let waiting = 0;
  function point(trials) {
    clearTimeout(waiting);
    waiting = setTimeout(() => highlight(trials.length ? trials : pinned || []), 60);
  }

  function pin(trial) {
    pinned = pinned && pinned.length === 1 && pinned[0] === trial ? null : [trial];
    point(pinned || []);
  }

  const trialsOf = (event) => [...new Set(event.points.map((each) => each.customdata).filter((trial) => typeof trial === "number"))];

  function listen(chart) {
    if (!chart.data.some((trace) => trace.customdata)) return;
    chart.on("plotly_hover", (event) => point(trialsOf(event)));
    chart.on("plotly_unhover", () => point([]));
    chart.on("plotly_click", (event) => trialsOf(event).slice(0, 1).forEach(pin));
    chart.on("plotly_selected", (event) => { pinned = event && event.points.length ? trialsOf(event) : null; point(pinned || []); });
    chart.on("plotly_deselect", () => { pinned = null; point([]); });
  }

  for (const row of rows) {
    const trial = Number(row.dataset.trial);
    row.addEventListener("mouseenter", () => point([trial]));
    row.addEventListener("mouseleave", () => point([]));
    row.addEventListener("click", () => { if (!String(getSelection())) pin(trial); });
  }

  // --- tables ---
  function compare(a, b) {
    if (a === undefined || b === undefined) return a === b ? 0 : a === undefined ? Infinity : -Infinity;
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const sorted = [...body.rows].map((row, place) => [row.cells[column].dataset.key, place, row]);
      sorted.sort(([a, placeA], [b, placeB]) => {
        const found = compare(a, b);
        return (Number.isFinite(found) && down ? -found : found) || placeA - placeB;
      });
      body.append(...sorted.map(([, , row]) => row));
    }));
  }

  // --- everything ---
  const drawAll = () => Promise.all(charts.map(draw));
  for (const select of document.querySelectorAll("select[data-of]")) {
    select.addEventListener("change", () => draw(document.getElementById("chart-" + select.dataset.of)).then(() => point([])));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light"; root.classList.add("printing");
    drawAll();
    charts.forEach((chart) => Plotly.relayout(chart, { width: chart.clientWidth }));
  });
  addEventListener("afterprint", () => {
    delete root.dataset.theme; root.classList.remove("printing");
    drawAll().then(() => charts.forEach((chart) => Plotly.Plots.resize(chart)));
  });
  drawAll().then(() => { charts.forEach(listen); root.dataset.drawn = String(charts.length); });
})();
