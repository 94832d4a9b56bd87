// Plots of the last hour. One path a series; the pointer or the arrow keys read values off.

import { h, s, setText, when } from "./dom.js";

const H = 168;
const BOX = { left: 46, right: 8, top: 8, bottom: 20 };
const HOUR_MS = 3_600_000;

/** Those of the hour before the newest: while the router was away there are none, so there may be older ones. */
const lastHour = (samples) => samples.filter((sample) => Date.parse(samples.at(-1).at) - Date.parse(sample.at) < HOUR_MS);

/** A round number at or above `n`: 1, 2 or 5 times a power of ten. */
function ceiling(n) {
  if (!(n > 0)) return 1;
  const size = 10 ** Math.floor(Math.log10(n));
  return [1, 2, 5, 10].map((m) => m * size).find((m) => m >= n);
}

/**
 * A plot titled `title` of `series`: [{name, of: sample → number or null, show}]. `log` for values over decades.
 * `update(samples)` draws them.
 */
export function plot(title, series, { show, log = false } = {}) {
  const paths = series.map((_, i) => s("path", { class: `s${i + 1}` }));
  const values = series.map(() => h("b", {}, "–"));
  const grid = s("g", {});
  const cursor = s("line", { class: "cursor", y1: BOX.top, y2: H - BOX.bottom, visibility: "hidden" });
  const at = h("span", { class: "hint" }, "");
  const drawing = s("svg", { class: "plot", role: "img", tabindex: 0, "aria-label": title },
    grid, paths, cursor);
  let W = 600; // as wide as there is room for; set below
  let samples = [];
  let picked = null;
  let scale = { x: () => 0, y: () => 0 };

  function draw() {
    const end = samples.length ? Date.parse(samples[samples.length - 1].at) : Date.now();
    const all = samples.flatMap((sample) => series.map((one) => one.of(sample))).filter((v) => v !== null && v !== undefined);
    const top = ceiling(Math.max(...all, 10));
    const bottom = log ? 0.1 : 0;
    const part = log
      ? (v) => Math.log10(Math.max(v, bottom) / bottom) / Math.log10(top / bottom)
      : (v) => v / top;
    scale = {
      x: (sample) => BOX.left + (1 - (end - Date.parse(sample.at)) / HOUR_MS) * (W - BOX.left - BOX.right),
      y: (v) => H - BOX.bottom - part(v) * (H - BOX.top - BOX.bottom),
    };
    const marks = log ? [0.1, 1, 10, 100, 1000, 10_000].filter((m) => m <= top) : [0, top / 2, top];
    grid.replaceChildren(
      ...marks.flatMap((m) => [
        s("line", { class: "axis", x1: BOX.left, x2: W - BOX.right, y1: scale.y(m), y2: scale.y(m) }),
        s("text", { x: BOX.left - 6, y: scale.y(m) + 4, "text-anchor": "end" }, show(m).replace(/\.0+(?= |$)/, "")),
      ]),
      ...(W > 420 ? [60, 45, 30, 15, 0] : [60, 30, 0]).map((minutes) =>
        s("text", { x: BOX.left + (1 - minutes / 60) * (W - BOX.left - BOX.right), y: H - 5, "text-anchor": minutes === 0 ? "end" : minutes === 60 ? "start" : "middle" },
          minutes === 0 ? "now" : `−${minutes} min`)));
    series.forEach((one, i) => paths[i].setAttribute("d", line(one)));
    read();
  }

  function line(one) {
    let d = "";
    let pen = "M";
    let last = null;
    for (const sample of samples) {
      const v = one.of(sample);
      const at = Date.parse(sample.at);
      // A gap in time, or nothing to measure, is a gap in the line.
      if (v === null || v === undefined || (last !== null && at - last > 30_000)) pen = "M";
      last = at;
      if (v === null || v === undefined) continue;
      d += `${pen}${scale.x(sample).toFixed(1)} ${scale.y(v).toFixed(1)}`;
      if (pen === "M") d += "h0.01"; // a point on its own is seen, too
      pen = "L";
    }
    return d;
  }

  function read() {
    const sample = picked === null ? samples[samples.length - 1] : samples[Math.min(picked, samples.length - 1)];
    series.forEach((one, i) => setText(values[i], sample ? (one.show ?? show)(one.of(sample)) : "–"));
    cursor.setAttribute("visibility", picked === null || !sample ? "hidden" : "visible");
    setText(at, picked === null || !sample ? "" : `${when(sample.at)} UTC`);
    if (picked !== null && sample) {
      cursor.setAttribute("x1", scale.x(sample));
      cursor.setAttribute("x2", scale.x(sample));
    }
  }

  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const x = event.clientX - box.left;
    let best = 0;
    samples.forEach((sample, i) => {
      if (Math.abs(scale.x(sample) - x) < Math.abs(scale.x(samples[best]) - x)) best = i;
    });
    picked = samples.length ? best : null;
    read();
  });
  drawing.addEventListener("pointerleave", () => { picked = null; read(); });
  drawing.addEventListener("blur", () => { picked = null; read(); });
  drawing.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !samples.length) return;
    event.preventDefault();
    picked = Math.max(0, Math.min(samples.length - 1, (picked ?? samples.length) + step * (event.shiftKey ? 12 : 1)));
    read();
  });

  new ResizeObserver(([entry]) => {
    W = Math.max(240, Math.round(entry.contentRect.width));
    draw();
  }).observe(drawing);

  const node = h("section", { class: "sheet" },
    h("header", {}, h("h2", {}, title), at),
    h("div", { class: "body" },
      drawing,
      h("div", { class: "legend" }, series.map((one, i) => h("span", {}, h("i", { class: `k${i + 1}` }), one.name, " ", values[i])))));
  return { node, update: (next) => { samples = lastHour(next); draw(); } };
}
