// Building and filling the page. Text is only ever set as text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An element with attributes, listeners (`onclick`) and children. */
export const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);

/** The same in SVG. */
export const s = (tag, attributes, ...children) => make(document.createElementNS(SVG, tag), attributes, children);

export const byId = (id) => document.getElementById(id);

/** Sets text only when it changed: what did not change costs no layout. */
export function setText(node, text) {
  const next = String(text);
  if (node.textContent !== next) node.textContent = next;
}

/** A state in words, coloured. */
export const pill = (text, kind) => h("span", { class: `pill ${kind ?? ""}` }, text);

/** 1234567 → "1.23 M"; below ten thousand the number itself. */
export function count(n) {
  if (n === null || n === undefined) return "–";
  if (n < 10_000) return n < 10 && !Number.isInteger(n) ? n.toFixed(1) : String(Math.round(n));
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (n >= size) {
      const scaled = n / size;
      return `${scaled < 10 ? scaled.toFixed(2) : scaled < 100 ? scaled.toFixed(1) : Math.round(scaled)} ${unit}`;
    }
  }
  return String(n);
}

/** Messages a second. */
export const rate = (n) => (n === null || n === undefined ? "–" : n > 0 && n < 0.05 ? "<0.1" : count(n));

export function bytes(n) {
  if (n < 1024) return `${n} B`;
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (n >= size) return `${(n / size).toFixed(n / size < 10 ? 1 : 0)} ${unit}`;
  }
  return "";
}

export function millis(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 3_600_000) return `${Math.round(ms / 60_000)} min`;
  return `${(ms / 3_600_000).toFixed(1)} h`;
}

/** Times are in UTC, as in the log and in the API: a time of day, with the date when it was another day. */
export function when(iso) {
  const [date, time] = new Date(iso).toISOString().slice(0, 19).split("T");
  return date === new Date().toISOString().slice(0, 10) ? time : `${date} ${time}`;
}

/** A time with its date. */
export const moment = (iso) => `${new Date(iso).toISOString().slice(0, 19).replace("T", " ")} UTC`;

/** A number cell; nothing is grey. */
export const num = (n, show = count) => h("td", { class: n ? "num" : "num zero" }, show(n));

/** "1 message", "1,234 messages". */
export const several = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

/** Seconds in the largest unit that divides them: 7200 → "2 h". */
export function span(seconds) {
  for (const [unit, size] of [["d", 86_400], ["h", 3600], ["min", 60]]) {
    if (seconds >= size && seconds % size === 0) return `${seconds / size} ${unit}`;
  }
  return `${seconds} s`;
}

/**
 * Makes the children of `parent` be one node for each of `items`, in their order. A node whose `key(item)` was there
 * before is kept, so that what is selected, pointed at or focused in it stays so; `draw(item, node)` makes it when `node`
 * is undefined, fills it otherwise, and returns it.
 */
export function keyed(parent, items, key, draw) {
  const names = items.map((item) => String(key(item)));
  const stays = new Set(names);
  const had = new Map();
  for (const node of [...parent.children]) {
    if (stays.has(node.dataset.key)) had.set(node.dataset.key, node);
    else node.remove();
  }
  let place = parent.firstElementChild;
  items.forEach((item, i) => {
    const node = draw(item, had.get(names[i]));
    node.dataset.key = names[i];
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  });
}

/** Replaces the children of `node` when what they are made of has changed: what did not keeps its selection. */
export function redraw(node, from, children) {
  const text = JSON.stringify(from) ?? "";
  if (node.drawnFrom === text) return;
  node.drawnFrom = text;
  node.replaceChildren(...[children()].flat(Infinity).filter(Boolean));
}

/** Says something for a moment. */
export function toast(text, bad = false) {
  const node = h("div", { class: bad ? "toast bad" : "toast" }, text);
  byId("toasts").append(node);
  setTimeout(() => node.remove(), bad ? 9000 : 4000);
}

/** Opens the dialog with `content(close)`; resolves when it closes, to what `close` was given. */
export function dialog(content) {
  const node = byId("dialog");
  return new Promise((resolve) => {
    const closed = new AbortController();
    const close = (value) => {
      if (closed.signal.aborted) return;
      closed.abort();
      node.close();
      node.replaceChildren();
      resolve(value);
    };
    node.replaceChildren(content(close));
    const heading = node.querySelector("h1");
    heading.id = "dialog-title";
    node.setAttribute("aria-labelledby", heading.id);
    // Escape. The event of a close comes later, when the next dialog may be open already: it is not for that one.
    node.addEventListener("close", () => node.open || close(), { signal: closed.signal });
    node.showModal();
  });
}

/** Asks before something that cannot be undone. Resolves to whether it was confirmed. */
export function confirm(title, text, action) {
  return dialog((close) =>
    h("form", { method: "dialog", onsubmit: (event) => { event.preventDefault(); close(true); } },
      h("h1", {}, title),
      h("p", {}, text),
      h("div", { class: "end" },
        h("button", { type: "button", onclick: () => close(false), autofocus: true }, "Cancel"),
        h("button", { type: "submit", class: "risk" }, action))));
}

/** A problem of the API, with every wrong field. */
export const problemBox = (problem) =>
  h("div", { class: "problem", role: "alert" },
    problem.errors?.length ? "Not accepted:" : problem.detail ?? String(problem),
    problem.errors?.length
      ? h("ul", {}, problem.errors.map((e) => h("li", {}, e.pointer ? h("code", {}, e.pointer) : null, " ", e.detail)))
      : null);
