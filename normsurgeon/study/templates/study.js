// The study's own kinds of chart, drawn by the report's charts.js: lines with intervals, and differences.
window.moreCharts = (helpers) => {
  "use strict";
  const { layout, cssColour, faded, number, escape, short, fitting } = helpers;
  const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x", "star"];
  const tone = (i) => cssColour(`--tone-${i % 8}`);
  const points = (x) => (100 * x).toFixed(1).replace("-", "−");
  const title = (text) => ({ text: escape(text), standoff: 8, font: { color: cssColour("--muted"), size: 12 } });

  // The view for the options chosen, or the first; and the last option, which names the measure.
  const view = (spec, chosen) => {
    const all = Object.keys(spec.views)[0];
    const key = !spec.choices ? chosen.view ?? all
      : spec.choices.length ? spec.choices.map(([name, first]) => chosen[name] ?? first).join("|") : all;
    return [spec.views[key] || [], key.split("|").pop()];
  };

  const lines = (spec, box, chosen) => {
    const [series, measure] = view(spec, chosen);
    const percent = spec.percent || (spec.percents || []).includes(measure) || (spec.scales || {})[measure] === "percent";
    const log = (spec.scales || {})[measure] === "log" && series.every((line) => line.y.every((y) => y > 0));
    const say = (y) => (percent ? `${points(y)} %` : number(y));
    const gaps = Math.max(1, (spec.log ? spec.at.length : 2) - 1) * Math.max(1, series.length - 1);
    const step = spec.log ? (spec.at[spec.at.length - 1] / spec.at[0]) ** Math.min(0.014, 0.25 / gaps) : 1;
    const traces = [];
    series.forEach((line, i) => {
      const colour = tone(line.tone);
      // Whiskers at one place would hide each other: each line stands a little to the right of the last.
      const x = spec.log ? line.x.map((v) => v * step ** (i - (series.length - 1) / 2)) : line.x;
      if (spec.band && line.low) {
        const known = line.x.map((_, k) => k).filter((k) => line.low[k] !== null);
        const edge = { x: known.map((k) => x[k]), mode: "lines", line: { width: 0 }, hoverinfo: "skip", type: "scatter", showlegend: false };
        traces.push({ ...edge, y: known.map((k) => line.low[k]) });
        traces.push({ ...edge, y: known.map((k) => line.high[k]), fill: "tonexty", fillcolor: faded(colour, 0.15) });
      }
      traces.push({
        type: "scatter", mode: line.x.length > 40 ? "lines" : "lines+markers", name: escape(line.name), x, y: line.y,
        line: { color: colour, width: 2, dash: line.dash || "solid" }, marker: { color: colour, size: line.x.length > 20 ? 5 : 8, symbol: symbols[line.tone % 8] },
        error_y: !spec.band && line.low ? {
          type: "data", symmetric: false, color: colour, thickness: 1.5, width: 4,
          array: line.y.map((y, k) => (line.high[k] === null ? 0 : line.high[k] - y)),
          arrayminus: line.y.map((y, k) => (line.low[k] === null ? 0 : y - line.low[k])),
        } : { visible: false },
        text: line.x.map((v, k) => `<b>${escape(line.name)}</b> ${say(line.y[k])}` +
          (line.low && line.low[k] !== null ? `<br>95 %: ${say(line.low[k])} to ${say(line.high[k])}` : "") +
          `<br>${spec.names ? escape(spec.names[v]) : `${escape(spec.x)} ${number(v)}, ${escape(line.said[k])}`}`),
        hovertemplate: "%{text}<extra></extra>",
      });
    });
    // An interval of few seeds may dwarf all differences: the axis follows the means, and gives whiskers some room.
    const means = series.flatMap((line) => line.y);
    const ends = series.flatMap((line) => [...(line.low || []), ...(line.high || [])]).filter((v) => v !== null);
    const room = 0.6 * (Math.max(...means) - Math.min(...means)) || 0.1 * Math.abs(means[0]) || 1;
    const low = Math.max(Math.min(...means, ...ends), Math.min(...means) - room, ...(percent ? [0] : []));
    const high = Math.min(Math.max(...means, ...ends), Math.max(...means) + room, ...(percent ? [1] : []));
    const pad = 0.05 * (high - low || room);
    const n = (spec.names || []).length;
    const xaxis = spec.names ? { range: [-0.03 * n - 0.5, 1.03 * n - 0.5], ...fitting(spec.ticks, n, box.clientWidth - 60, 16) }
      : spec.log ? { type: "log", tickmode: "array", tickvals: spec.at, ticktext: spec.at.map(String), title: title(spec.x) }
        : { title: title(spec.x) };
    return [traces, layout(box, {
      height: 400, showlegend: true, margin: { l: 8, r: 8, t: 10, b: 8 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal",
        font: { color: cssColour("--ink"), size: 12 } },
      xaxis: { zeroline: false, ...xaxis },
      yaxis: { title: title(spec.y || measure), zeroline: false, nticks: 7,
        ...(log ? { type: "log", exponentformat: "power" } : { range: [low - pad, high + pad] }), ...(percent ? { tickformat: ".0%" } : {}) },
    })];
  };

  const differences = (spec, box, chosen) => {
    const [rows] = view(spec, chosen);
    const narrow = box.clientWidth < 480;
    const at = rows.map((_, i) => i);
    const [ink, muted, surface] = ["--accent", "--muted", "--surface"].map(cssColour);
    const trace = {
      type: "scatter", mode: "markers", x: rows.map((r) => 100 * r.x), y: at,
      marker: { size: 9, color: rows.map((r) => (r.significant ? ink : surface)), line: { width: 1.8, color: rows.map((r) => (r.significant ? ink : muted)) } },
      error_x: {
        type: "data", symmetric: false, color: muted, thickness: 1.5, width: 4,
        array: rows.map((r) => (r.high === null ? 0 : 100 * (r.high - r.x))), arrayminus: rows.map((r) => (r.low === null ? 0 : 100 * (r.x - r.low))),
      },
      text: rows.map((r) => `<b>${escape(r.name)}</b><br>${points(r.x)} points` +
        (r.low === null ? "" : `, 95 %: ${points(r.low)} to ${points(r.high)}`) +
        `<br>Holm p ${r.p === null ? "–" : number(r.p)}, n = ${r.n}`),
      hovertemplate: "%{text}<extra></extra>",
    };
    return [[trace], layout(box, {
      height: Math.max(2, rows.length) * (rows.length > 12 ? 22 : 34) + 70,
      xaxis: { title: title("points"), zeroline: true, zerolinecolor: muted, zerolinewidth: 1.5, nticks: narrow ? 5 : 9 },
      yaxis: { range: [rows.length - 0.4, -0.6], showgrid: false, zeroline: false, tickmode: "array", tickvals: at,
        ticktext: rows.map((r) => escape(short(r.name, narrow ? 22 : 64)) + " ") },
    })];
  };

  return { lines, differences };
};
