// The model story: what runs, what ran before, the job under way, what became of those before.

import { $, ask, commandId, h, named, number, post, prose, short, show, when } from "./dom.js";

const PHASES = ["receiving", "verifying", "proving", "loading", "awaiting_confirm", "switching", "probation"];
const WORDS = {
  receiving: "receive", verifying: "check the file", proving: "try it out", loading: "load",
  awaiting_confirm: "wait for a word", switching: "switch", probation: "watch it live",
};
const VERDICTS = { PASSED: "passed", FAILED: "failed", SKIPPED: "not run", ASK: "your word" };
const ENDED = ["SUCCEEDED", "FAILED", "REJECTED", "TIMED_OUT", "CANCELED"];

let state = null; // models/state
let running = null; // the model of the status, with its labels
let jobs = new Map(); // id → job
let models = []; // of the registry
const swaps = new Map(); // job id → swap reports

/** Reads the registry: at the start, and when a job has ended. */
export async function refresh() {
  const known = await ask("/api/v1/models");
  models = known.models;
  for (const job of known.jobs) if (!jobs.has(job.id) || ENDED.includes(job.state)) jobs.set(job.id, job);
  render();
}

/** The model that runs, as far as is known. */
export const active = () => state?.active ?? running;

export function setRunning(model) {
  running = model;
  render();
}

export function setState(value) {
  state = value;
  if (value.job) jobs.set(value.job.id, value.job);
  render();
}

export function setJob(job) {
  jobs.set(job.id, job);
  if (ENDED.includes(job.state)) {
    $("upload").textContent = "";
    refresh().catch(() => {});
  }
  render();
}

export function setSwap(report) {
  swaps.set(report.job, [...(swaps.get(report.job) ?? []).filter((s) => s.epoch !== report.epoch), report]);
  render();
}

const modelOf = (job) => models.find((model) => model.sha256 === (job.sha256 ?? job.digest));
const nameOf = (job) => {
  const model = modelOf(job);
  return model ? named(model) : job.from || short(job.sha256 ?? job.digest) || job.id;
};
const isRollback = (job) => job.task === "rollback" || Boolean(job.task?.rollback);

function render() {
  renderModels();
  renderJob();
  renderStory();
}

function renderModels() {
  const { active, previous } = state ?? {};
  const busy = Boolean(state?.job);
  const card = (title, model, ...more) =>
    h("div.card", {}, h("h3", {}, title), h("strong", {}, model ? named(model) : "none yet"),
      model && h("p.quiet", {}, `digest ${short(model.sha256)}${model.epoch == null ? "" : `, epoch ${model.epoch}`}`), ...more);
  const labels = active && running?.sha256 === active.sha256 ? running.labels : [];
  const finds = labels.slice(0, 12).join(", ") + (labels.length > 12 ? ` and ${labels.length - 12} more` : "");
  const lineage = models.find((m) => m.sha256 === active?.sha256)?.lineage?.manifest;
  show($("models"),
    card("Runs now", active,
      finds && h("p", {}, `finds ${finds}`),
      lineage?.dataset && h("p.quiet", {}, `trained on ${lineage.dataset}`)),
    card("Ran before", previous,
      previous && h("p", {}, h("button.plain", { id: "rollback", disabled: busy, onclick: rollback }, `Roll back to ${named(previous)}`))));
}

async function rollback() {
  await command("rollback", {});
}

async function command(verb, body) {
  const said = $("upload");
  try {
    await post(`/api/v1/models/${verb}`, { id: commandId(verb), ...body });
    said.textContent = "";
  } catch (error) {
    show(said, prose(`Not done: ${error.message}`));
  }
}

function renderJob() {
  const job = state?.job && (jobs.get(state.job.id) ?? state.job);
  if (!job || ENDED.includes(job.state)) return show($("job"));
  const at = PHASES.indexOf(job.phase);
  const steps = PHASES.filter((phase) => phase !== "awaiting_confirm" || job.phase === phase);
  show($("job"),
    h("h3", {}, `${isRollback(job) ? "Going back to" : "On its way:"} ${nameOf(job)}`),
    h("ol.phases", { "aria-label": "Steps" }, steps.map((phase) => {
      const index = PHASES.indexOf(phase);
      const word = index < at ? "done" : index === at ? "now" : "later";
      return h(`li.${word}`, { "aria-current": word === "now" ? "step" : null }, WORDS[phase]);
    })),
    gates(job),
    job.phase === "awaiting_confirm" && h("p", {},
      prose(`It waits for a person: ${job.ask?.message ?? ""} `),
      h("button", { onclick: () => command("confirm", { job: job.id }) }, "Let it go live"), " ",
      h("button.plain", { onclick: () => command("cancel", { job: job.id }) }, "Refuse it")));
}

function gates(job) {
  if (!job.gates?.length) return null;
  return h("table.gates", {}, h("tbody", {}, job.gates.map((gate) =>
    h("tr", {}, h("th", { scope: "row" }, gate.gate), h(`td.${gate.verdict}`, {}, VERDICTS[gate.verdict]),
      h("td", {}, prose(gate.message))))));
}

/** What became of a job, in words. */
function outcome(job) {
  const reason = job.reason?.message ?? "";
  const name = nameOf(job);
  const swap = swaps.get(job.id)?.[0];
  const lost = !swap ? "" : swap.frames_lost === 0 ? ", no frame lost"
    : swap.overloaded ? `, ${swap.frames_lost} frames more than before dropped by the overloaded box` : `, ${swap.frames_lost} frames lost`;
  if (job.state === "SUCCEEDED" && isRollback(job)) return ["good", `back to ${name}${lost}`];
  if (job.state === "SUCCEEDED") return ["good", `${name} went live${lost}`];
  if (job.state === "REJECTED") return ["bad", `${name} refused: ${reason}`];
  if (job.phase === "rolled_back") return ["bad", `${name} was taken back: ${reason}`];
  if (job.state === "CANCELED") return ["warn", `${name} was cancelled: ${reason}`];
  if (job.state === "TIMED_OUT") return ["bad", `${name} took too long: ${reason}`];
  if (job.state === "FAILED") return ["bad", `${name} could not be brought in: ${reason}`];
  return ["", `${name}: ${WORDS[job.phase] ?? "waits"}`];
}

const timeOf = (job) => (typeof job.changed === "number" ? job.changed : Date.parse(job.changed));

function renderStory() {
  const open = new Set([...document.querySelectorAll("#story details[open]")].map((d) => d.dataset.job));
  const ended = [...jobs.values()].filter((job) => ENDED.includes(job.state));
  ended.sort((a, b) => timeOf(b) - timeOf(a));
  const items = ended.slice(0, 20).map((job) => {
    const [kind, text] = outcome(job);
    const by = { inbox: "file", mqtt: "MQTT", cli: "command line", page: "this page" }[job.way] ?? job.way;
    const reports = swaps.get(job.id) ?? [];
    const more = [gates(job), ...reports.map(swapPicture)].filter(Boolean);
    return h(`li${kind ? `.${kind}` : ""}`, {},
      h("div", {}, when(timeOf(job)), " ", h("strong", {}, prose(text)), h("span.quiet", {}, ` · by ${by}`)),
      more.length > 0 && h("details", { "data-job": job.id, open: open.has(job.id) },
        h("summary", {}, reports.length ? "The gates, and the swap frame by frame" : "The gates"), more));
  });
  show($("story"), items.length ? items : h("li", {}, "No update yet."));
}

/** Each result a dot: before and after the swap in two colours, the longest gap marked. */
function swapPicture(report) {
  const cameras = Object.entries(report.cameras).filter(([, c]) => c.old_ms && c.new_ms);
  if (!cameras.length) return null;
  const [left, right, row] = [110, 690, 56];
  const all = cameras.flatMap(([, c]) => [...c.old_ms, ...c.new_ms]);
  const [from, to] = [Math.min(-500, ...all), Math.max(500, ...all)];
  const x = (ms) => left + ((ms - from) / (to - from)) * (right - left);
  const height = 30 + row * cameras.length;
  const words = `${named(report.from)} before, ${named(report.to)} after`;
  const picture = h("svg.swap", { viewBox: `0 0 700 ${height}`, role: "img",
    "aria-label": `Results around the swap: ${words}; ` + cameras.map(([id, c]) =>
      `${id}: longest gap ${number(c.longest_gap_ms, 1)} ms, ${number(c.expected_gap_ms, 1)} ms before`).join("; ") });
  picture.append(h("text.old", { x: x(0) - 8, y: 14, "text-anchor": "end" }, named(report.from)),
    h("text.new", { x: x(0) + 8, y: 14 }, named(report.to)));
  cameras.forEach(([id, camera], index) => {
    const y = 40 + row * index;
    const results = [...camera.old_ms, ...camera.new_ms];
    let widest = 0;
    for (let i = 1; i < results.length; i++) {
      if (results[i] - results[i - 1] > results[widest + 1] - results[widest]) widest = i - 1;
    }
    picture.append(h("line.axis", { x1: left, x2: right, y1: y, y2: y }), h("text", { x: 4, y: y + 4 }, id),
      ...camera.old_ms.map((ms) => h("circle.old", { cx: x(ms), cy: y, r: 4 })),
      ...camera.new_ms.map((ms) => h("circle.new", { cx: x(ms), cy: y, r: 4 })),
      h("line.gap", { x1: x(results[widest]), x2: x(results[widest + 1] ?? results[widest]), y1: y + 11, y2: y + 11 }),
      h("line.cut", { x1: x(0), x2: x(0), y1: y - 16, y2: y + 12 }),
      h("text", { x: left, y: y + 27 }, `longest gap ${number(camera.longest_gap_ms, 1)} ms, in the minute before ` +
        `${number(camera.expected_gap_ms, 1)} ms · frame ${camera.last_old ?? "–"} by the old, ${camera.first_new ?? "–"} by the new`));
  });
  return picture;
}

/** A file from this computer. */
async function upload(file) {
  const said = $("upload");
  if (!file.name.toLowerCase().endsWith(".onnx")) {
    show(said, prose(`${file.name} is no ONNX file: export it first, \`yolo export model=best.pt format=onnx\``));
    return;
  }
  said.textContent = `${file.name} is sent …`;
  const query = new URLSearchParams({ id: commandId("page"), name: file.name, size: file.size, manual: false });
  try {
    await ask(`/api/v1/models/push?${query}`, { method: "POST", body: file });
    said.textContent = `${file.name} has arrived.`;
  } catch (error) {
    show(said, prose(`${file.name} was not taken: ${error.message}`));
  }
}

export function start() {
  const drop = $("drop");
  const over = (event) => { event.preventDefault(); drop.classList.add("over"); };
  drop.addEventListener("dragenter", over);
  drop.addEventListener("dragover", over);
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
  });
  $("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) upload(target.files[0]);
    target.value = "";
  });
  // A file that misses the box must not replace the page.
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => event.preventDefault());
}
