// Draws the page's plotly figures, those in sight first, in the template of the reader's colour scheme.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const boxes = Array.from(document.querySelectorAll("[data-plot]"));
  const [dark, print] = ["(prefers-color-scheme: dark)", "print"].map((query) => matchMedia(query));
  const coarse = matchMedia("(pointer: coarse)").matches; // a finger scrolls the page, and does not zoom into a plot
  const config = { displayModeBar: false, displaylogo: false, showTips: false };

  const clip = (name) => (name.length <= 16 ? name : `${name.slice(0, 4)}…${name.slice(-11)}`);
  const matrix = ({ i2, columns }) => {
    const cells = new Int16Array(Uint8Array.from(atob(i2), (sign) => sign.charCodeAt(0)).buffer);
    const row = (from) => Array.from(cells.slice(from, from + columns), (v) => (v === -32768 ? null : v / 10000));
    return Array.from({ length: cells.length / columns }, (_, i) => row(i * columns));
  };
  // Lists that several figures share are put back, and the names of ticks shortened where there is little room.
  const restore = (value, narrow, key) => {
    if (Array.isArray(value)) return key === "ticktext" && narrow ? value.map(clip) : value.map((v) => restore(v, narrow));
    if (value === null || typeof value !== "object") return value;
    if ("i2" in value) return matrix(value);
    if ("$" in value) return restore(data.shared[value.$], narrow, key);
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, restore(inner, narrow, name)]));
  };

  const look = (box, aspect) => {
    const template = data[dark.matches && !print.matches ? "dark" : "light"];
    const width = box.clientWidth;
    return { template, width, ...(aspect ? { height: Math.round(width * aspect) } : {}) };
  };
  const draw = (box) => {
    if (box.layout) return Plotly.relayout(box, look(box, box.layout.meta && box.layout.meta.aspect));
    const figure = restore(data.charts[box.dataset.plot], box.clientWidth < 480);
    const { meta, ...layout } = figure.layout;
    box.classList.toggle("square", Boolean(meta && meta.aspect));
    const family = getComputedStyle(document.body).fontFamily;
    const touch = coarse ? { dragmode: false, xaxis: { ...layout.xaxis, fixedrange: true }, yaxis: { ...layout.yaxis, fixedrange: true } } : {};
    return Plotly.newPlot(box, figure.data, { ...layout, ...touch, font: { family }, meta, ...look(box, meta && meta.aspect) }, config);
  };
  const redraw = () => boxes.filter((box) => box.layout).forEach(draw);

  // What is in sight first, the rest while the page is idle, so that a large report opens at once.
  const waiting = boxes.slice();
  const idle = window.requestIdleCallback || ((then) => setTimeout(then, 16));
  const next = () => {
    const box = waiting.shift();
    if (box && !box.layout) draw(box);
    if (waiting.length) idle(next, { timeout: 200 });
    else document.documentElement.dataset.ready = "";
  };
  idle(next, { timeout: 100 });
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      watcher.unobserve(entry.target);
      if (!entry.target.layout) draw(entry.target);
    }
  }, { rootMargin: "300px" });
  boxes.forEach((box) => watcher.observe(box));

  [dark, print].forEach((query) => query.addEventListener("change", redraw));
  addEventListener("beforeprint", () => boxes.forEach(draw));
  addEventListener("afterprint", redraw);
  let [width, timer] = [innerWidth, 0];
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar changes the height alone
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 120);
  });
})();
