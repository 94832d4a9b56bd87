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

/** A time of day, with the date when it was another day. */
export function when(iso) {
  const at = new Date(iso);
  const time = at.toLocaleTimeString(undefined, { hour12: false });
  return at.toDateString() === new Date().toDateString() ? time : `${at.toLocaleDateString()} ${time}`;
}

/** A number cell; nothing is grey. */
export const num = (n, show = count) =>
  h("td", { class: "num" }, n ? show(n) : h("span", { class: "zero" }, n === 0 ? "0" : "–"));

/** Says something for a moment. */
export function toast(text, bad = false) {
  const node = h("div", { class: bad ? "toast bad" : "toast" }, text);
  byId("toasts").append(node);
  setTimeout(() => node.remove(), bad ? 9000 : 4000);
}

let open = 0;

/** Opens the dialog with `content(close)`; resolves when it closes, to what `close` was given. */
export function dialog(content) {
  const node = byId("dialog");
  open += 1;
  const mine = open;
  return new Promise((resolve) => {
    const close = (value) => {
      // The event of a close comes later, when the next dialog may be open already: it is not for that one.
      if (mine !== open) return;
      open += 1;
      node.close();
      node.replaceChildren();
      resolve(value);
    };
    node.replaceChildren(content(close));
    node.addEventListener("close", () => close(), { once: true });
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
    problem.detail ?? String(problem),
    problem.errors?.length
      ? h("ul", {}, problem.errors.map((e) => h("li", {}, e.pointer ? h("code", {}, e.pointer) : null, " ", e.detail)))
      : null);
