// The way of one message, by its id.

import { call, path } from "./api.js";
import { h, millis, pill, problemBox } from "./dom.js";

const KINDS = { delivered: "ok", dead: "bad", unrouted: "warn" };
const SAID = {
  accepted: "accepted", forwarded: "in soar-publish", published: "given to its exchange", routed: "in an inbox",
  unrouted: "nobody subscribed", attempt_failed: "attempt failed", delivered: "received", dead: "dead letter",
};

export function message({ id, params, go }) {
  const input = h("input", { class: "search mono", id: "message-id", type: "search", placeholder: "Message id", "aria-label": "Message id", value: id ?? "", autocomplete: "off", spellcheck: "false" });
  const result = h("div", { class: "stack" });
  const form = h("form", { class: "head", onsubmit: (event) => {
    event.preventDefault();
    const wanted = input.value.trim();
    if (wanted) go(`#/message/${encodeURIComponent(wanted)}`);
  } }, input, h("button", { type: "submit", class: "main" }, "Find"));

  async function load() {
    if (!id) {
      result.replaceChildren(h("p", { class: "sub" }, "Every answer to a send names the ids; so do envelopes, dead letters and attempts. The most recent messages are remembered (SOAR_TRACE_MESSAGES)."));
      return;
    }
    try {
      const sender = params.get("sender");
      const trace = await call("GET", path("messages", id) + (sender ? `?sender=${encodeURIComponent(sender)}` : ""));
      result.replaceChildren(way(trace));
    } catch (refusal) {
      result.replaceChildren(problemBox(refusal));
    }
  }

  function way(trace) {
    const start = Date.parse(trace.hops[0]?.at);
    const others = (trace.others ?? []).map((sender) => h("a", { href: `#/message/${encodeURIComponent(trace.id)}?sender=${encodeURIComponent(sender)}` }, sender));
    return h("section", { class: "sheet" },
      h("header", {}, h("h2", { class: "mono" }, trace.id), pill(trace.state, KINDS[trace.state]),
        h("div", { class: "end" }, h("button", { type: "button", onclick: load }, "Reload"))),
      h("div", { class: "body stack" },
        h("dl", { class: "facts" },
          h("dt", {}, "Sender"), h("dd", {}, h("a", { href: `#/client/${trace.sender}` }, trace.sender), others.length ? [" · the same id also of ", others] : null),
          h("dt", {}, "Topic"), h("dd", { class: "mono" }, trace.topic ?? "broadcast"),
          h("dt", {}, "Inboxes"), h("dd", {}, `${trace.routed}, of which ${trace.delivered} received it${trace.dead ? ` and ${trace.dead} have it as a dead letter` : ""}`)),
        h("ol", { class: "way" }, trace.hops.map((hop) => h("li", { class: hop.step },
          h("span", { class: "after", title: hop.at }, `+${millis(Date.parse(hop.at) - start)}`),
          h("span", { class: "step" }, SAID[hop.step] ?? hop.step),
          hop.inbox ? h("a", { href: `#/client/${hop.inbox}` }, hop.inbox) : null,
          hop.pattern ? h("span", { class: "sub" }, "because of ", h("code", {}, hop.pattern)) : null,
          hop.reason ? h("span", { class: "sub" }, hop.reason.replaceAll("_", " ")) : null))),
        trace.hops_left_out ? h("p", { class: "sub" }, `${trace.hops_left_out} further hops were counted, not kept.`) : null));
  }

  load();
  return {
    node: h("div", { class: "stack" }, h("h1", {}, "Find a message"), form, result),
    title: id ?? "Find a message", focus: id ? null : input,
  };
}
