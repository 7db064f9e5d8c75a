// Draws the page's charts with Plotly in the page's own colours, and draws them again when those change.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const layers = data.layers;
  const hiddenKinds = new Set();
  const choices = {}; // chart → choice → option
  const coarse = matchMedia("(pointer: coarse)").matches;

  const escape = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (name, width) => {
    if (name.length <= width) return name;
    const head = Math.floor((width - 1) / 4);
    return name.slice(0, head) + "…" + name.slice(name.length - (width - 1 - head));
  };
  const number = (x) => {
    if (x === null || x === undefined) return "–";
    if (Number.isInteger(x) && Math.abs(x) < 1e6) return String(x);
    const [mantissa, exponent] = x.toExponential(2).split("e");
    const e = Number(exponent);
    const text = e >= -3 && e < 4 ? x.toFixed(Math.max(0, 2 - e)) : `${mantissa}e${e}`;
    return text.replace(/-/g, "−");
  };
  const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faded = (colour, share) => {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},${share})`;
  };
  const kindColour = (kind) => cssColour(`--${kind}`) || cssColour("--other");

  // What is shown when a layer is pointed at: all its numbers, whichever chart it is. Plotly drops labels as tall
  // as this, so the page has its own.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const element = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  const fill = (i) => {
    const list = document.createElement("dl");
    for (const [key, label] of data.labels) {
      const x = (layers.columns[key] || [])[i];
      if (x === null || x === undefined) continue;
      const pair = document.createElement("div");
      pair.append(element("dt", label), element("dd", number(x)));
      list.append(pair);
    }
    tip.replaceChildren(element("strong", layers.names[i]), element("p", layers.about[i]), list);
  };
  const hide = () => { tip.hidden = true; };
  let hovered = null;
  const show = (box, { points, event }) => {
    const point = points.find((p) => p.customdata !== undefined);
    if (!point) return;
    hovered = box;
    fill(point.customdata);
    tip.hidden = false;
    const [width, height] = [tip.offsetWidth, tip.offsetHeight];
    const [x, y] = [event.clientX, event.clientY];
    const beside = x + 18 + width < innerWidth ? x + 18 : x - 18 - width;
    // On a phone there is no room beside the finger: above or below the middle, whichever is farther.
    const left = beside >= 8 ? beside : Math.max(8, (innerWidth - width) / 2);
    const top = beside >= 8 ? y - height / 2 : y > innerHeight / 2 ? y - height - 24 : y + 24;
    tip.style.left = `${left}px`;
    tip.style.top = `${Math.max(8, Math.min(top, innerHeight - height - 8))}px`;
  };
  // Plotly reports a point once, until another is pointed at: it must forget the one whose numbers are put away.
  const dismiss = () => {
    hide();
    if (hovered) Plotly.Fx.unhover(hovered);
    hovered = null;
  };
  addEventListener("scroll", dismiss, { passive: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") dismiss(); });

  const layout = (box, changes) => {
    const [ink, muted, line, surface] = ["--ink", "--muted", "--line", "--surface"].map(cssColour);
    const axis = {
      gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, automargin: true, fixedrange: coarse,
      title: { font: { color: muted, size: 12 }, standoff: 8 }, tickfont: { color: muted, size: 11 },
    };
    const { xaxis, yaxis, ...rest } = changes;
    return {
      width: box.clientWidth, height: 270, margin: { l: 8, r: 8, t: 10, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 12 }, dragmode: coarse ? false : "zoom",
      hoverlabel: { bgcolor: surface, bordercolor: muted, font: { color: ink, size: 11 }, align: "left", namelength: 0 },
      ...rest, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis },
    };
  };

  // Tick labels that fit into `length` pixels, beside each other or (`down`) below each other.
  const fitting = (ticks, size, length, longest, down = false) => {
    const kept = [];
    let end = -Infinity;
    for (const [at, name] of ticks) {
      const text = escape(short(name, longest));
      const centre = ((at + 0.5) / size) * length;
      const half = down ? 7 : short(name, longest).length * 3.4 + 4;
      if (centre - half < end) continue;
      kept.push([at, text]);
      end = centre + half;
    }
    return { tickmode: "array", tickvals: kept.map((t) => t[0]), ticktext: kept.map((t) => t[1]), tickangle: 0 };
  };

  // A logarithmic axis: 1, 2, 5 within a few decades, whole decades beyond.
  const decades = (values) => {
    const logs = values.filter((v) => v > 0).map(Math.log10);
    const [low, high] = [Math.min(...logs), Math.max(...logs)];
    const steps = high - low < 0.8 ? [1, 1.5, 2, 3, 4, 5, 7] : high - low < 2.5 ? [1, 2, 5] : [1];
    const every = high - low > 7 ? 2 : 1;
    const at = [];
    for (let e = Math.floor(low) - 1; e <= high + 1; e += every) steps.forEach((m) => at.push(Number(`${m}e${e}`)));
    const text = (v) => {
      const [m, e] = v.toExponential().split("e");
      return v >= 0.001 && v < 1e4 ? String(v) : `${m === "1" ? "" : m + "·"}10<sup>${e.replace("+", "").replace("-", "−")}</sup>`;
    };
    const pad = Math.max(0.05, 0.06 * (high - low));
    return { type: "log", tickmode: "array", tickvals: at, ticktext: at.map(text), range: [low - pad, high + pad] };
  };

  const depth = (spec, box) => {
    const traces = [];
    const present = [...new Set(layers.kinds)].filter((kind) => !hiddenKinds.has(kind));
    const size = layers.names.length > 60 ? 4 : 6;
    for (const kind of present) {
      const at = layers.names.map((_, i) => i).filter((i) => layers.kinds[i] === kind);
      const colour = kindColour(kind);
      for (const series of spec.series) {
        const pick = (key) => at.map((i) => {
          const y = layers.columns[key][i];
          return spec.scale === "log" && y <= 0 ? null : y;
        });
        if (series.low) {
          const edge = { x: at, mode: "lines", line: { width: 0 }, hoverinfo: "skip", type: "scatter" };
          traces.push({ ...edge, y: pick(series.low) });
          traces.push({ ...edge, y: pick(series.high), fill: "tonexty", fillcolor: faded(colour, 0.14) });
        }
        const solid = series.dash === "solid";
        const dots = solid || layers.names.length <= 40 || at.length === 1;
        traces.push({
          type: "scatter", x: at, y: pick(series.key), mode: dots ? "lines+markers" : "lines", name: escape(kind),
          customdata: at, hoverinfo: "none",
          line: { color: solid ? colour : faded(colour, 0.75), width: solid ? 1.8 : 1.4, dash: series.dash },
          marker: {
            color: solid ? colour : cssColour("--surface"), size: solid ? size : size + 1,
            symbol: "circle", line: { color: colour, width: solid ? 0 : 1.3 },
          },
        });
      }
    }
    const n = layers.names.length;
    const every = spec.series.flatMap((x) => layers.columns[x.key].filter((_, i) => !hiddenKinds.has(layers.kinds[i])));
    const yaxis = spec.scale === "log" && every.some((y) => y > 0) ? decades(every)
      : spec.scale === "percent" ? { tickformat: ".0%", rangemode: "tozero" } : { nticks: 6 };
    const xaxis = {
      range: [-0.03 * n - 0.5, 1.03 * n - 0.5], zeroline: false, ...fitting(layers.ticks, n, box.clientWidth - 60, 16),
    };
    return [traces, layout(box, { xaxis, yaxis })];
  };

  const viridis = [
    "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26",
    "#fde725",
  ].map((colour, i, all) => [i / (all.length - 1), colour]);

  const unpack = (text, columns) => {
    const raw = atob(text);
    const rows = [];
    for (let i = 0; i < raw.length; i += 2) {
      if ((i / 2) % columns === 0) rows.push([]);
      const whole = raw.charCodeAt(i) | (raw.charCodeAt(i + 1) << 8);
      rows[rows.length - 1].push(whole === 0x8000 ? null : (whole > 0x7fff ? whole - 0x10000 : whole) / 10000);
    }
    return rows;
  };

  const heat = (spec, box, chosen) => {
    const label = chosen.map || Object.keys(spec.maps)[0];
    // A layer called "1" is a name and not a place on the axis: the invisible sign keeps Plotly from counting.
    const category = (name) => "\u200b" + escape(name);
    const across = (spec.columns || spec.rows).map(category);
    const down = spec.rows.map(category);
    const side = box.clientWidth;
    const narrow = side < 480;
    const trace = {
      type: "heatmap", x: across, y: down, z: unpack(spec.maps[label], across.length), zmin: spec.low, zmax: 1,
      colorscale: viridis, hoverongaps: false, xgap: down.length <= 30 ? 1 : 0, ygap: down.length <= 30 ? 1 : 0,
      hovertemplate: `%{y}<br>%{x}<br>${escape(label)} <b>%{z:.3f}</b><extra></extra>`,
      colorbar: {
        orientation: "h", thickness: 8, len: 0.5, x: 1, xanchor: "right", y: 1, yanchor: "bottom", outlinewidth: 0,
        tickfont: { color: cssColour("--muted"), size: 11 }, nticks: 4, ypad: 6, xpad: 0,
      },
    };
    const width = narrow ? 9 : 18;
    const ticksDown = fitting(spec.rowTicks, down.length, side * 0.8, width, true);
    return [[trace], layout(box, {
      height: Math.round(side * 1.02), margin: { l: 8, r: 12, t: 40, b: 8 },
      xaxis: { type: "category", showgrid: false, constrain: "domain", ...fitting(spec.columnTicks, across.length, side * 0.8, width) },
      yaxis: { type: "category", showgrid: false, autorange: "reversed", scaleanchor: across.length === down.length ? "x" : undefined,
        constrain: "domain", ...ticksDown },
    })];
  };

  const bars = (spec, box, chosen) => {
    const name = chosen.measure || Object.keys(spec.measures)[0];
    const measure = spec.measures[name];
    const level = chosen.level || spec.levels[0];
    const best = measure[level].slice().sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 25);
    const narrow = box.clientWidth < 480;
    const kinds = new Map(layers.names.map((layer, i) => [layer, layers.kinds[i]]));
    const kindOf = (entry) => kinds.get(entry) || kinds.get(entry.replace(/\.[^.]*$/, "")) || "other";
    const trace = {
      type: "bar", orientation: "h", y: best.map((_, i) => i), x: best.map((s) => s[1]),
      marker: { color: best.map((s) => kindColour(kindOf(s[0]))), line: { width: 0 } }, width: 0.72,
      error_x: {
        type: "data", array: best.map((s) => s[2] || 0), visible: best.some((s) => s[2] !== null),
        color: cssColour("--ink"), thickness: 1.2, width: 3,
      },
      text: best.map((s) => `<b>${escape(s[0])}</b><br>${escape(name)}  ${number(s[1])}` +
        (s[2] === null ? "" : ` ± ${number(s[2])}`) + (measure.unit ? ` ${escape(measure.unit.split(":")[0])}` : "")),
      textposition: "none", hovertemplate: "%{text}<extra></extra>",
    };
    return [[trace], layout(box, {
      height: Math.max(2, best.length) * 21 + 60,
      annotations: best.length ? [] : [{ text: `${escape(name)} has no scores for ${escape(level)}`, showarrow: false,
        xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { color: cssColour("--muted"), size: 13 } }],
      xaxis: { title: { text: escape((measure.unit || name).split(":")[0]), standoff: 8, font: { color: cssColour("--muted"), size: 12 } },
        exponentformat: "power", nticks: narrow ? 4 : 8 },
      yaxis: { range: [best.length - 0.4, -0.6], showgrid: false, tickmode: "array", tickvals: best.map((_, i) => i),
        ticktext: best.map((s) => escape(short(s[0], narrow ? 18 : 40)) + " ") },
    })];
  };

  const sweep = (spec, box, chosen) => {
    const setting = chosen.setting || Object.keys(spec.settings)[0];
    const effect = chosen.effect || spec.effects[0];
    const column = effect === "KL" ? 1 : 2;
    const tones = ["--norm", "--convolution", "--block", "--linear", "--ink"].map(cssColour);
    const swing = (line) => Math.max(0, ...line.map((p) => Math.abs(p[column] ?? 0)));
    const lines = Object.entries(spec.settings[setting]).sort((a, b) => swing(b[1]) - swing(a[1]));
    const values = lines.flatMap(([, line]) => line.map((p) => p[0]));
    const wide = Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 20;
    const traces = lines.map(([layer, line], i) => ({
      type: "scatter", mode: "lines+markers", name: escape(short(layer, 28)), x: line.map((p) => p[0]), y: line.map((p) => p[column]),
      line: { color: i < 5 ? tones[i] : faded(cssColour("--other"), 0.35), width: i < 5 ? 2 : 1 },
      marker: { size: i < 5 ? 6 : 3, symbol: ["circle", "square", "diamond", "triangle-up", "cross"][i] || "circle" },
      showlegend: i < 5,
      text: line.map((p) => `<b>${escape(layer)}</b><br>${escape(setting)}  ${number(p[0])}<br>KL  ${number(p[1])}<br>loss change  ${number(p[2])}`),
      hovertemplate: "%{text}<extra></extra>",
    })).reverse();
    return [traces, layout(box, {
      height: 380, showlegend: true,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "reversed", font: { color: cssColour("--muted"), size: 11 } },
      xaxis: { ...(wide ? decades(values) : {}), title: { text: escape(setting), standoff: 8, font: { color: cssColour("--muted"), size: 12 } }, zeroline: false },
      yaxis: { title: { text: escape(effect), standoff: 8, font: { color: cssColour("--muted"), size: 12 } }, rangemode: "tozero", nticks: 6 },
    })];
  };

  const curve = (spec, box) => [[{
    type: "scatter", mode: spec.x.length > 40 ? "lines" : "lines+markers", x: spec.x, y: spec.y,
    line: { color: cssColour("--norm"), width: 1.8 }, marker: { size: 5 },
    text: spec.x.map((x, i) => `${escape(spec.axis)} ${number(x)}<br><b>${number(spec.y[i])}</b>`),
    hovertemplate: "%{text}<extra></extra>",
  }], layout(box, {
    height: 220, yaxis: { nticks: 5, exponentformat: "power" }, xaxis: { zeroline: false, title: { text: escape(spec.axis), standoff: 6, font: { color: cssColour("--muted"), size: 12 } } },
  })];

  // A page may bring kinds of its own: charts.js of the study does.
  const more = window.moreCharts ? window.moreCharts({ layout, cssColour, faded, number, escape, short, fitting }) : {};
  const kinds = { depth, heat, bars, sweep, curve, ...more };
  const boxes = Array.from(document.querySelectorAll("[data-plot]"));
  const config = { displayModeBar: false, displaylogo: false, showTips: false };
  const draw = (box) => {
    const spec = data.charts[box.dataset.plot];
    const [traces, plan] = kinds[spec.type](spec, box, choices[box.dataset.plot] || {});
    const first = !("drawn" in box.dataset);
    box.dataset.drawn = "";
    Plotly.react(box, traces, plan, config);
    if (first && spec.type === "depth") {
      box.on("plotly_hover", (event) => show(box, event));
      box.on("plotly_unhover", hide);
    }
  };
  const drawn = () => boxes.filter((box) => "drawn" in box.dataset);

  // What is in sight first, the rest while the page is idle, so that a large report opens at once.
  const waiting = boxes.slice();
  const idle = window.requestIdleCallback || ((then) => setTimeout(then, 16));
  const next = () => {
    const box = waiting.shift();
    if (box && !("drawn" in box.dataset)) draw(box);
    if (waiting.length) idle(next, { timeout: 200 });
    else document.documentElement.dataset.ready = "";
  };
  idle(next, { timeout: 100 });
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      watcher.unobserve(entry.target);
      if (!("drawn" in entry.target.dataset)) draw(entry.target);
    }
  }, { rootMargin: "300px" });
  boxes.forEach((box) => watcher.observe(box));

  const redraw = () => drawn().forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => boxes.forEach(draw));
  window.addEventListener("afterprint", redraw);
  let width = innerWidth;
  let timer = 0;
  window.addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar changes the height alone
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 120);
  });

  for (const button of document.querySelectorAll(".switch button")) {
    button.addEventListener("click", () => {
      const group = button.parentElement;
      for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
      (choices[group.dataset.chart] ??= {})[group.dataset.choice] = button.dataset.option;
      draw(document.querySelector(`[data-plot="${group.dataset.chart}"]`));
    });
  }
  for (const pick of document.querySelectorAll(".pick select")) {
    pick.addEventListener("change", () => {
      (choices[pick.dataset.chart] ??= {})[pick.dataset.choice] = pick.value;
      draw(document.querySelector(`[data-plot="${pick.dataset.chart}"]`));
    });
  }
  for (const button of document.querySelectorAll(".chips button")) {
    button.addEventListener("click", () => {
      const kind = button.dataset.kind;
      hiddenKinds.has(kind) ? hiddenKinds.delete(kind) : hiddenKinds.add(kind);
      for (const same of document.querySelectorAll(`.chips [data-kind="${CSS.escape(kind)}"]`)) {
        same.setAttribute("aria-pressed", String(!hiddenKinds.has(kind)));
      }
      drawn().filter((box) => data.charts[box.dataset.plot].type === "depth").forEach(draw);
    });
  }
})();
