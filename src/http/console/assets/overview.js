// The first page: what flows, where it jams, and the last hour.

import { bytes, count, h, millis, pill, rate, setText } from "./dom.js";
import { flow } from "./flow.js";
import { plot } from "./plots.js";

const NAMES = { outbox: "the outboxes", notify: "the notify queues", publish: "soar-publish", inbox: "the inboxes" };
// What the clients are sorted by to see who fills them.
const COLUMNS = { outbox: "outbox", notify: "outbox", inbox: "inbox" };

export function overview({ store }) {
  const drawing = flow();
  const figures = Object.fromEntries(
    ["accepted", "delivered", "end", "clients", "waiting", "dead", "memory"].map((name) => [name, h("dd", {}, "–")]));
  for (const name of ["accepted", "delivered"]) figures[name].replaceChildren(h("span", {}, "–"), h("small", {}, "/s"));
  const dead = h("div", {}, h("dt", {}, "Dead letters"), figures.dead);
  const states = h("div", { class: "head", hidden: true });
  const plots = [
    plot("Messages a second", [
      { name: "accepted", of: (p) => p.accepted },
      { name: "delivered", of: (p) => p.delivered },
      { name: "unrouted", of: (p) => p.unrouted },
      { name: "dead", of: (p) => p.dead },
    ], { show: rate }),
    plot("Latency since acceptance", [
      { name: "routed, median", of: (p) => p.hop_p50_ms },
      { name: "routed, 99 %", of: (p) => p.hop_p99_ms },
      { name: "received, median", of: (p) => p.end_p50_ms },
      { name: "received, 99 %", of: (p) => p.end_p99_ms },
    ], { show: millis, log: true }),
    plot("Messages waiting", [
      { name: "inboxes", of: (p) => p.inbox },
      { name: "outboxes", of: (p) => p.outbox },
      { name: "dead letters", of: (p) => p.dead_letters },
    ], { show: count }),
    plot("Memory of the router", [{ name: "resident", of: (p) => p.resident_bytes / 2 ** 20, show: (n) => bytes(n * 2 ** 20) }],
      { show: (n) => `${count(n)} MiB` }),
  ];

  // What is said, as a link to the clients that have most of it.
  const said = (kind, text, column) => {
    const what = pill(text, kind);
    return column ? h("a", { href: `#/clients?sort=${column}&desc=1` }, what) : what;
  };

  function show(now) {
    const { sample, queues } = now;
    setText(figures.accepted.firstChild, rate(sample.accepted));
    setText(figures.delivered.firstChild, rate(sample.delivered));
    setText(figures.end, millis(sample.end_p50_ms));
    setText(figures.clients, count(now.clients));
    setText(figures.waiting, count(queues.inbox));
    setText(figures.dead, count(queues.dead));
    setText(figures.memory, bytes(sample.resident_bytes));
    dead.className = queues.dead > 0 ? "warn" : "";
    const jammed = [...drawing.update(now)];
    const ill = now.actors.filter((entry) => ["failing", "restarting"].includes(entry.state));
    const all = [
      ...(now.clients ? [] : [h("a", { href: "#/clients" }, "No clients yet. Onboard the first one.")]),
      ...jammed.map((id) => said("warn", `${NAMES[id]} fill faster than they are emptied`, COLUMNS[id])),
      ...ill.map((entry) => said("bad", `${count(entry.count)} ${entry.actor} ${entry.state}`, "state")),
    ];
    const text = all.map((node) => node.textContent).join("|");
    if (states.dataset.said !== text) {
      states.dataset.said = text;
      states.replaceChildren(...all);
      states.hidden = !all.length;
    }
  }

  const node = h("div", { class: "stack" },
    h("h1", {}, "Overview"),
    h("dl", { class: "figures" },
      h("div", {}, h("dt", {}, "Accepted"), figures.accepted),
      h("div", {}, h("dt", {}, "Delivered"), figures.delivered),
      h("div", {}, h("dt", {}, "Median to receiver"), figures.end),
      h("div", {}, h("dt", {}, "Clients"), figures.clients),
      h("div", {}, h("dt", {}, "Waiting in inboxes"), figures.waiting),
      dead,
      h("div", {}, h("dt", {}, "Memory"), figures.memory)),
    states,
    h("section", { class: "sheet" }, h("header", {}, h("h2", {}, "The flow"), h("span", { class: "hint" }, "messages a second")),
      h("div", { class: "body stack" }, drawing.stages, drawing.node)),
    h("div", { class: "grid" }, plots.map((one) => one.node)));
  const draw = () => plots.forEach((one) => one.update(store.history));
  if (store.overview) show(store.overview);
  draw();
  return { node, title: "Overview", on: { overview: show, history: draw } };
}
