// The live tail: messages as they are published, by a pattern of topics.

import { h, setText, several } from "./dom.js";

const KEPT = 400;

export function tail({ params }) {
  let pattern = params.get("pattern") ?? "#";
  let running = true;
  let skipped = 0;
  let reopen = () => {};
  const input = h("input", { class: "search mono", id: "pattern", value: pattern, "aria-label": "Pattern", spellcheck: "false", autocomplete: "off" });
  const body = h("tbody", {});
  const note = h("span", { class: "sub" }, "");
  const stop = h("button", { type: "button", onclick: () => { running = !running; setText(stop, running ? "Pause" : "Go on"); reopen(); } }, "Pause");
  const form = h("form", { class: "head", onsubmit: (event) => {
    event.preventDefault();
    pattern = input.value.trim() || "#";
    running = true;
    skipped = 0;
    setText(stop, "Pause");
    clear();
    setText(note, "");
    history.replaceState(null, "", `#/tail?pattern=${encodeURIComponent(pattern)}`);
    reopen();
  } }, input, h("button", { type: "submit", class: "main" }, "Watch"), stop,
    h("button", { type: "button", onclick: () => clear() }, "Clear"), note);
  const empty = h("p", { class: "empty" }, "Waiting for messages. They are shown as they are published, from now on.");
  const box = h("div", { class: "tail", tabindex: 0, role: "log", "aria-label": "Messages", "aria-live": "off" },
    h("table", {}, h("thead", {}, h("tr", {}, ["Time, UTC", "Sender", "Topic", "Id", "Bytes", "Message"].map((name) => h("th", { scope: "col", class: { Bytes: "num hide-small", Id: "hide-small" }[name] ?? "" }, name)))), body), empty);

  function clear() {
    body.replaceChildren();
    empty.hidden = false;
  }

  function show({ events, skipped: more }) {
    skipped += more;
    setText(note, skipped ? `${several(skipped, "message")} passed too quickly to be shown` : "");
    // The newest on top; who has scrolled down is not pushed on.
    const rows = events.map((event) => h("tr", {},
      h("td", {}, event.sent_at.slice(11, 23)),
      h("td", {}, h("a", { href: `#/client/${event.sender}` }, event.sender)),
      h("td", { title: event.topic }, event.topic ?? "broadcast"),
      h("td", { class: "hide-small" }, h("a", { href: `#/message/${encodeURIComponent(event.id)}?sender=${encodeURIComponent(event.sender)}` }, event.id)),
      h("td", { class: "num hide-small" }, event.bytes),
      h("td", { class: "preview" }, event.preview)));
    empty.hidden = true;
    const top = box.scrollTop;
    const height = box.scrollHeight;
    body.prepend(...rows.reverse());
    while (body.children.length > KEPT) body.lastElementChild.remove();
    if (top > 4) box.scrollTop = top + (box.scrollHeight - height);
  }

  return {
    node: h("div", { class: "stack" }, h("h1", {}, "Live tail"), form, h("section", { class: "sheet" }, box)),
    title: "Live tail", focus: input,
    query: () => (running ? { tail: pattern } : {}),
    onReopen: (fn) => { reopen = fn; },
    on: { tail: show },
  };
}
