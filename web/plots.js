// Plots of an hour, from the telemetry of every ten seconds.

/* global uPlot */
import { $ } from "./dom.js";

const POINTS_MAX = 360;
const COLOURS = ["#1f9bb0", "#d98a1f", "#5fae5f", "#c75b7a", "#8d72d6", "#a08a4f", "#4f80c7", "#888"];
const records = [];
let cameras = "";
let plots = [];

export function add(telemetry) {
  records.push(telemetry);
  if (records.length > POINTS_MAX) records.shift();
}

export const clear = () => { records.length = 0; };

/** Draws what was added; new plots when the cameras are others. */
export function draw() {
  const ids = [...new Set(records.flatMap((r) => Object.keys(r.cameras)))];
  if (!ids.length) return;
  if (ids.join() !== cameras) {
    cameras = ids.join();
    plots.forEach((plot) => plot.destroy());
    const line = (label, index, dash) => ({ label, stroke: COLOURS[index % COLOURS.length], width: 2, dash, spanGaps: false });
    plots = [
      plot($("plot-rate"), ids.map((id, i) => line(id, i))),
      plot($("plot-latency"), ids.flatMap((id, i) => [line(id, i), line(`${id} 99 %`, i, [5, 4])])),
    ];
  }
  const times = records.map((r) => r.time_us / 1e6);
  const of = (pick) => ids.map((id) => records.map((r) => (r.cameras[id] ? pick(r.cameras[id]) : null)));
  const latency = ids.flatMap((id) => ["p50", "p99"].map((q) => records.map((r) => r.cameras[id]?.latency_ms?.[q] ?? null)));
  plots[0].setData([times, ...of((c) => c.inferred_fps)]);
  plots[1].setData([times, ...latency]);
}

function plot(element, series) {
  const style = getComputedStyle(document.documentElement);
  const axis = { stroke: style.getPropertyValue("--quiet"), grid: { stroke: style.getPropertyValue("--line"), width: 1 } };
  const zero = (u, min, max) => [0, Math.max(1, max * 1.1)];
  // A first record alone would stand in an axis of years.
  const minutes = ({ data: [times] }) => [Math.min(times[0] ?? 0, (times.at(-1) ?? 0) - 120), times.at(-1) ?? 0];
  const scales = { x: { range: minutes }, y: { range: zero } };
  const options = { width: element.clientWidth, height: 220, series: [{}, ...series], axes: [axis, axis], scales, legend: { live: false } };
  element.replaceChildren();
  const made = new uPlot(options, [[]], element);
  new ResizeObserver(() => made.setSize({ width: element.clientWidth, height: 220 })).observe(element);
  return made;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  cameras = "";
  draw();
});
