// The page: hears what the box says (server-sent events named by topic) and shows it.

import { $, ask, clock, h, named, number, post, prose, show } from "./dom.js";
import * as live from "./live.js";
import * as models from "./models.js";
import * as plots from "./plots.js";

const box = { status: null, cameras: new Map(), tick: null, before: null, telemetry: null, connected: false, heard: null };
const log = [];

const DROPPED = {
  overload: "older ones while overloaded", full: "as the queue was full", disabled: "while switched off",
  no_model: "without a model", stopped: "at a stop",
};
const STATES = {
  connecting: ["warn", "connecting"], streaming: ["good", "streaming"], stalled: ["bad", "silent"],
  backoff: ["bad", "down"], disabled: ["", "switched off"], ended: ["", "played to its end"],
};

// ---- what comes in

function listen() {
  const source = new EventSource("/api/v1/events");
  const on = (topic, take) => source.addEventListener(topic, (event) => { box.heard = Date.now(); take(JSON.parse(event.data)); });
  on("status", (status) => { box.status = status; models.setRunning(status.model); render(); });
  on("camera", (status) => { box.cameras.set(status.camera, status); render(); });
  on("models/state", models.setState);
  on("models/swaps", models.setSwap);
  on("telemetry", (telemetry) => { box.telemetry = telemetry; plots.add(telemetry); if (box.connected) { plots.draw(); renderFacts(); } });
  on("tick", (tick) => { box.before = box.tick; box.tick = tick; render(); });
  on("log", (line) => { log.push(line); if (log.length > 300) log.shift(); if (box.connected) renderLog(); });
  on("job", models.setJob);
  on("ready", () => { box.connected = true; models.refresh().catch(() => {}); plots.draw(); renderLog(); renderFacts(); render(); });
  // Each connection begins with all that there is to know.
  source.onopen = () => { log.length = 0; plots.clear(); box.cameras.clear(); };
  source.onerror = () => {
    box.connected = false;
    render();
    // The browser tries again by itself, but not after an answer such as 401.
    if (source.readyState === EventSource.CLOSED) {
      ask("/api/v1/models").catch(() => {}).finally(() => setTimeout(listen, 3000));
    }
  };
}

// ---- header

function render() {
  const { status, tick, connected } = box;
  $("device").textContent = status?.device ?? "";
  if (status) document.title = `noblink · ${status.device}`;
  const pill = (kind, text) => h(`li.pill${kind ? `.${kind}` : ""}`, {}, text);
  const link = tick?.link;
  const away = !connected && box.heard != null;
  document.body.classList.toggle("away", away);
  $("away").hidden = !away;
  if (away) show($("away"), `The box does not answer. What you see is from ${clock(box.heard)}; this page comes back by itself when the box does.`);
  const down = Object.keys(status?.cameras ?? {}).filter((id) => STATES[stateOf(id)]?.[0] === "bad");
  show($("health"), away ? pill("bad", "the box does not answer") : [
    status?.model ? pill("good", `model ${named(models.active())}`) : status && pill("warn", "no model yet"),
    down.length > 0 && pill("bad", down.length === 1 ? `camera ${down[0]} is down` : `${down.length} cameras are down`),
    link && (link.state === "connected" ? pill("good", "broker connected") : pill("bad", `broker away${link.last_error ? `: ${link.last_error}` : ""}`)),
    tick && tick.outbox.queued > 0 && pill("warn", `${number(tick.outbox.queued)} records wait for the broker`),
  ]);
  const advice = $("advice");
  advice.hidden = !status?.advice;
  show(advice, prose(status?.advice ?? ""));
  renderCameras();
  renderLarge();
}

// ---- cameras

const tiles = new Map();

function rate(id) {
  const [now, before] = [box.tick, box.before];
  const [a, b] = [now?.cameras[id], before?.cameras[id]];
  if (!a || !b || now.time_us === before.time_us) return null;
  return ((a.ledger.inferred - b.ledger.inferred) * 1e6) / (now.time_us - before.time_us);
}

const stateOf = (id) => box.tick?.cameras[id]?.state ?? box.cameras.get(id)?.state ?? "connecting";

function renderCameras() {
  const ids = Object.keys(box.status?.cameras ?? {});
  for (const [id, tile] of tiles) if (!ids.includes(id)) { live.unwatch(tile.canvas); tile.element.remove(); tiles.delete(id); }
  for (const id of ids) {
    let tile = tiles.get(id);
    if (!tile) {
      const canvas = h("canvas", { role: "img", "aria-label": `Live picture of ${id}` });
      const about = h("span.about");
      const element = h("button.tile", { "data-camera": id, onclick: () => openLarge(id) }, canvas, about);
      tiles.set(id, (tile = { element, canvas, about }));
      $("cameras").append(element);
      live.watch(canvas, id);
    }
    const status = box.cameras.get(id);
    const state = stateOf(id);
    const [kind, word] = STATES[state] ?? ["", state];
    const latency = box.telemetry?.cameras[id]?.latency_ms;
    const fps = rate(id);
    show(tile.about,
      h("span.row", {}, h("strong", {}, id), h(`span.pill${kind ? `.${kind}` : ""}`, {}, word)),
      state === "streaming"
        ? h("small", {}, `${fps == null ? "" : `${number(fps, 1)} frames/s`}${latency ? ` · ${number(latency.p50, 1)} ms` : ""}${box.tick?.cameras[id]?.overloaded ? " · overloaded" : ""}`)
        : status?.reason && h("small.why", {}, status.reason, state === "backoff" && "; it is tried again by itself"));
    tile.element.classList.toggle("still", state !== "streaming" && tile.canvas.dataset.frame != null);
  }
  if (box.status && !ids.length) show($("cameras"), h("p", {}, "No camera is configured yet."));
}

let large = null;

function openLarge(id) {
  large = { id, head: null };
  $("large-title").textContent = id;
  $("large").showModal();
  live.watch($("large-picture"), id);
  renderLarge();
}

$("large").addEventListener("close", () => { live.unwatch($("large-picture")); large = null; });
$("close").addEventListener("click", () => $("large").close());
live.listen((head) => { if (large?.id === head.camera) { large.head = head; renderLarge(); } });

function renderLarge() {
  if (!large) return;
  const objects = large.head?.objects ?? [];
  show($("sees"), objects.length
    ? objects.map((o) => h("li", {}, `${o.label}, ${Math.round(o.score * 100)} %`))
    : h("li", {}, "nothing at the moment"));
  const status = box.cameras.get(large.id);
  const now = box.tick?.cameras[large.id];
  const stream = status?.stream;
  const dropped = now && Object.entries(now.ledger.dropped).filter(([, n]) => n).map(([why, n]) => `${number(n)} ${DROPPED[why] ?? why}`).join(", ");
  facts($("large-facts"), [
    ["State", status?.reason ? `${status.state}: ${status.reason}` : status?.state],
    ["Stream", stream && `${stream.codec ?? "raw"} ${stream.width}×${stream.height}${stream.fps ? ` at ${number(stream.fps, 1)}/s` : ""}`],
    ["Source", status?.source],
    ["Frames inferred", now && number(now.ledger.inferred)],
    ["Frames dropped", now && (dropped || "none")],
    ["Connected", status && (status.connects === 1 ? "once" : `${number(status.connects)} times`)],
  ]);
}

// ---- numbers and log

function facts(element, pairs) {
  show(element, pairs.filter(([, value]) => value != null && value !== false).map(([name, value]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function renderFacts() {
  const t = box.telemetry;
  if (!t) return;
  const stages = t.worker.stages_ms;
  facts($("facts"), [
    ["Worker busy", `${number(t.worker.busy * 100, 1)} %`],
    ["Time of a frame", stages && `${number(stages.preprocess, 1)} ms pixels, ${number(stages.inference, 1)} ms model, ${number(stages.postprocess, 1)} ms boxes`],
    ["Provider", box.status?.model?.provider],
    ["Broker", t.mqtt.broker],
    ["Records acknowledged", number(t.outbox.acked)],
    ["Records that wait", number(t.outbox.queued + t.outbox.in_flight)],
    ["Records given up", number(t.outbox.dropped)],
    ["Processor", `${number(t.host.cpu_pct, 0)} % of a core`],
    ["Memory", `${number(t.host.rss_mb, 0)} MB`],
    ["noblink", box.status?.version],
    ["Running since", box.status && new Date(box.status.started).toLocaleString()],
  ]);
}

function renderLog() {
  const element = $("log");
  const atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 20;
  show(element, log.map((line) => h(`li.${line.level}`, {}, h("time", {}, clock(line.time)), ` ${line.text}`)));
  if (atEnd) element.scrollTop = element.scrollHeight;
}

// ---- the token

addEventListener("wall", () => { if (!$("wall").open) $("wall").showModal(); });
$("wall").addEventListener("cancel", (event) => event.preventDefault());
$("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await post("/api/v1/login", { token: $("token").value });
    location.reload();
  } catch (error) {
    $("login-error").textContent = error.message;
  }
});

models.start();
listen();
