// What all parts of the page use: elements, words for numbers, requests.

/** Makes an element: h("p.quiet", { title: "…" }, "text", child). Text is never read as HTML. */
export function h(what, attributes = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const svg = ["svg", "circle", "line", "text", "g"].includes(tag);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** Text in which `commands` stand between backticks. */
export const prose = (text) => text.split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part));

export const $ = (id) => document.getElementById(id);

/** Puts children into an element, and leaves it alone when they are the same as before. */
export function show(element, ...children) {
  const fresh = element.cloneNode(false);
  fresh.append(...children.flat().filter((child) => child != null && child !== false));
  if (!fresh.isEqualNode(element)) element.replaceChildren(...fresh.childNodes);
}

export const number = (value, digits = 0) =>
  value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
export const clock = (time) => new Date(time).toLocaleTimeString([], { hour12: false });
export const short = (digest) => (digest ? digest.slice(0, 8) : "");
export const named = (model) => (model ? `${model.id} ${model.version}` : "none");

/** A time of day, and the date where it is another day. */
export function when(time) {
  const date = new Date(time);
  const today = date.toDateString() === new Date().toDateString();
  const text = today ? clock(time) : `${date.toLocaleDateString()} ${clock(time)}`;
  return h("time", { datetime: date.toISOString() }, text);
}

/** Asks the service. Throws an Error whose message says what is wrong, and what helps if known. */
export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the box does not answer: is noblink running, is the network up?");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) dispatchEvent(new Event("wall"));
  if (!response.ok || answer.ok === false) {
    throw new Error(answer.reason?.message ?? `the box answers ${response.status} ${response.statusText}`);
  }
  return answer;
}

/** An id for a command: short, and no other's. */
export const commandId = (what) => `${what}-${Date.now().toString(36)}${Math.random().toString(36).slice(2, 6)}`;

export const post = (path, body) =>
  ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
