// The flow, drawn as the contract draws it: queues with what lies in them, actors, exchanges, and the rate on each edge.
// A queue that fills faster than it is emptied, or holds more than ten seconds' worth, is marked.

import { count, h, keyed, num, rate, s, setText } from "./dom.js";

const QUEUE = { w: 112, h: 46 };

// Where things are, in the units of the view box.
const NODES = [
  { id: "senders", kind: "end", x: 58, y: 168, text: ["clients send", "HTTP · WebSocket · AMQP"] },
  { id: "outbox", kind: "queue", x: 200, y: 74, name: "outboxes" },
  { id: "forwarder", kind: "actor", x: 338, y: 74, name: "forwarders" },
  { id: "publish", kind: "queue", x: 478, y: 74, name: "soar-publish" },
  { id: "publisher", kind: "actor", x: 618, y: 74, name: "publishers" },
  { id: "topic", kind: "exchange", x: 758, y: 74, name: "soar-topic" },
  { id: "unrouted", kind: "queue", x: 922, y: 34, name: "unrouted" },
  { id: "notify", kind: "queue", x: 200, y: 262, name: "notify queues" },
  { id: "broadcaster", kind: "actor", x: 408, y: 262, name: "broadcasters" },
  { id: "broadcast", kind: "exchange", x: 618, y: 262, name: "soar-broadcast" },
  { id: "inbox", kind: "queue", x: 900, y: 168, name: "inboxes" },
  { id: "dead", kind: "queue", x: 900, y: 284, name: "dead letters" },
  { id: "readers", kind: "end", x: 1122, y: 116, text: ["clients read", "receive · WebSocket"] },
  { id: "pusher", kind: "actor", x: 1042, y: 226, name: "pushers" },
  { id: "webhooks", kind: "end", x: 1140, y: 226, text: ["webhooks"] },
];

// Which rate runs where. `label` is where its number stands.
const EDGES = [
  { d: "M92 150 C120 100 118 74 142 74", label: [96, 104], rate: (r) => r.accepted - r.accepted_broadcasts },
  { d: "M258 74H312", label: [285, 64], rate: (r) => r.forwarded },
  { d: "M364 74H420", label: [392, 64], rate: (r) => r.forwarded },
  { d: "M536 74H592", label: [564, 64], rate: (r) => r.published },
  { d: "M644 74H718", label: [681, 64], rate: (r) => r.published },
  { d: "M796 66 C830 56 836 34 864 34", label: [838, 30], rate: (r) => r.unrouted },
  { d: "M796 84 C846 104 836 168 842 168", label: [868, 112], rate: (r) => r.routed - r.routed_broadcasts },
  { d: "M92 186 C120 236 118 262 142 262", label: [96, 240], rate: (r) => r.accepted_broadcasts },
  { d: "M258 262H382", label: [320, 252], rate: (r) => r.broadcasts },
  { d: "M434 262H568", label: [501, 252], rate: (r) => r.broadcasts },
  { d: "M668 262 C790 262 770 176 842 172", label: [768, 246], rate: (r) => r.routed_broadcasts },
  { d: "M958 158 C1000 150 1010 118 1056 116", label: [1010, 122], rate: (r) => Math.max(0, r.delivered - r.pushed) },
  { d: "M958 180 C990 190 990 220 1014 225", label: [1000, 190], rate: (r) => r.attempts },
  { d: "M1068 226H1100", label: [1084, 214], rate: (r) => r.attempts },
  { d: "M900 192V260", label: [926, 232], rate: (r) => r.dead },
];

/** Each queue with what goes in and out a second. */
const stagesOf = (r) => [
  ["outbox", "outboxes", r.accepted - r.accepted_broadcasts, r.forwarded],
  ["publish", "soar-publish", r.forwarded, r.published],
  ["notify", "notify queues", r.accepted_broadcasts, r.broadcasts],
  ["inbox", "inboxes", r.routed, r.delivered],
  ["dead", "dead letters", r.dead, null],
  ["unrouted", "unrouted", r.unrouted, null],
];

const SHAPES = {
  queue: (n) => [
    s("rect", { class: "shape", x: n.x - QUEUE.w / 2, y: n.y - QUEUE.h / 2, width: QUEUE.w, height: QUEUE.h, rx: 6 }),
    s("text", { class: "depth", x: n.x, y: n.y - 2, "text-anchor": "middle" }, "–"),
    s("text", { class: "name", x: n.x, y: n.y + 15, "text-anchor": "middle" }, n.name),
  ],
  actor: (n) => [
    s("circle", { class: "shape", cx: n.x, cy: n.y, r: 25 }),
    s("text", { class: "depth", x: n.x, y: n.y + 5, "text-anchor": "middle" }, "–"),
    s("text", { class: "name", x: n.x, y: n.y + 41, "text-anchor": "middle" }, n.name),
  ],
  exchange: (n) => [
    s("path", { class: "shape", d: `M${n.x - 40} ${n.y}l14 -24h52l14 24l-14 24h-52z` }),
    s("text", { class: "name", x: n.x, y: n.y + 4, "text-anchor": "middle" }, n.name.replace("soar-", "")),
    s("text", { class: "name", x: n.x, y: n.y + 41, "text-anchor": "middle" }, "exchange"),
  ],
  end: (n) => n.text.map((line, i) =>
    s("text", { class: i ? "name" : "", x: n.x, y: n.y + 4 + (i - (n.text.length - 1) / 2) * 16, "text-anchor": "middle" }, line)),
};

/** The drawing. `update(overview)` brings it up to date. */
export function flow() {
  const edges = EDGES.map((edge) => {
    const pulse = s("path", { class: "pulse", d: edge.d });
    const label = s("text", { class: "rate idle", x: edge.label[0], y: edge.label[1], "text-anchor": "middle" }, "0");
    return { ...edge, pulse, label, lines: [s("path", { class: "edge", d: edge.d, "marker-end": "url(#tip)" }), pulse] };
  });
  const nodes = new Map(NODES.map((node) => {
    const group = s("g", { class: node.kind, id: `flow-${node.id}` }, SHAPES[node.kind](node));
    return [node.id, { group, depth: group.querySelector(".depth") }];
  }));
  const tip = s("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto", markerUnits: "userSpaceOnUse" },
    s("path", { d: "M0 0L8 4L0 8z", fill: "var(--faint)" }));
  const drawing = s("svg", { class: "flow", viewBox: "-16 0 1206 322", role: "img", "aria-labelledby": "flow-title" },
    s("title", { id: "flow-title" }, "The flow of messages from outboxes and notify queues to inboxes and webhooks, in messages a second"),
    s("defs", {}, tip),
    edges.map((edge) => edge.lines),
    [...nodes.values()].map((node) => node.group),
    edges.map((edge) => edge.label));

  // The same for who does not see the drawing, or has a small screen.
  const rows = h("tbody", {});
  const stages = h("div", { class: "stages" }, h("table", {},
    h("thead", {}, h("tr", {}, ["Queue", "Waiting", "In/s", "Out/s"].map((name, i) => h("th", { scope: "col", class: i ? "num" : "" }, name)))), rows));

  // Depths of the last ten seconds, to tell a queue that grows from one that is merely deep.
  const before = [];

  function jams(queues, rates) {
    before.push(queues);
    if (before.length > 10) before.shift();
    const out = {
      outbox: rates.forwarded, notify: rates.broadcasts, publish: rates.published, inbox: rates.delivered,
    };
    return new Set(Object.keys(out).filter((id) => {
      const grew = queues[id] - before[0][id];
      return queues[id] > 100 && (queues[id] > out[id] * 10 || grew > queues[id] * 0.2);
    }));
  }

  function update(overview) {
    const { sample, queues, actors } = overview;
    for (const edge of edges) {
      const now = Math.max(0, edge.rate(sample) || 0);
      setText(edge.label, rate(now));
      edge.label.setAttribute("class", now > 0 ? "rate" : "rate idle");
      edge.pulse.setAttribute("class", now > 0 ? "pulse on" : "pulse");
      edge.pulse.setAttribute("stroke-width", (2 + Math.min(4, Math.log10(1 + now))).toFixed(1));
    }
    const jammed = jams(queues, sample);
    for (const id of ["outbox", "notify", "publish", "inbox", "dead", "unrouted"]) {
      const node = nodes.get(id);
      setText(node.depth, count(queues[id]));
      node.group.setAttribute("class", jammed.has(id) || (id === "dead" && queues.dead > 0) ? "queue jam" : "queue");
    }
    for (const id of ["forwarder", "publisher", "broadcaster", "pusher"]) {
      const mine = actors.filter((entry) => entry.actor === id);
      const ill = mine.filter((entry) => ["failing", "restarting"].includes(entry.state)).reduce((n, e) => n + e.count, 0);
      const all = mine.filter((entry) => entry.state !== "stopped").reduce((n, e) => n + e.count, 0);
      const node = nodes.get(id);
      setText(node.depth, ill ? `${count(ill)} ill` : mine.length ? count(all) : "–");
      node.group.setAttribute("class", ill ? "actor ill" : "actor");
    }
    keyed(rows, stagesOf(sample), ([id]) => id, ([id, name, into, out], tr = h("tr", {}, h("th", { scope: "row" }), num(), num(), num())) => {
      tr.className = jammed.has(id) ? "jam" : "";
      setText(tr.children[0], jammed.has(id) ? `${name}: jammed` : name);
      [count(queues[id]), rate(into), out === null ? "–" : rate(out)].forEach((text, i) => setText(tr.children[i + 1], text));
      return tr;
    });
    return jammed;
  }

  return { stages, node: h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Flow of messages" }, drawing), update };
}
