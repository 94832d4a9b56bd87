// All clients: sorted and searched by the router, a page at a time, pushed every two seconds.

import { call } from "./api.js";
import { count, dialog, h, keyed, pill, problemBox, rate, setText, several } from "./dom.js";
import { onceDialog } from "./secrets.js";

const PAGE = 50;
const ASK_EVERY_MS = 150;
const COLUMNS = [
  ["client_id", "Client", ""],
  ["state", "State", ""],
  ["inbox", "Inbox", "num"],
  ["outbox", "Outbox", "num hide-small"],
  ["dead", "Dead", "num"],
  ["sent", "Sent/s", "num hide-small"],
  ["received", "Received/s", "num hide-small"],
];

/** Whether a click on a row is meant for the row: not for its link, and not the end of selecting text. */
const opens = (event) => event.target.tagName !== "A" && !String(getSelection());

/** A client's state in a pill: the worst that is known. */
export function statePill(row) {
  const kinds = { ok: "ok", paused: "idle", starting: "idle", "webhook off": "warn", "breaker open": "warn", restarting: "bad", failing: "bad" };
  return pill(row.state, kinds[row.state] ?? "");
}

export function clients({ go, params }) {
  let view = {
    q: params.get("q") ?? "", sort: COLUMNS.some(([key]) => key === params.get("sort")) ? params.get("sort") : "client_id",
    desc: params.get("desc") === "1", offset: /^\d{1,7}$/.test(params.get("offset")) ? Number(params.get("offset")) : 0,
  };
  const body = h("tbody", {});
  const range = h("span", {}, "");
  const previous = h("button", { type: "button", onclick: () => move(-PAGE) }, "Previous");
  const next = h("button", { type: "button", onclick: () => move(PAGE) }, "Next");
  const search = h("input", {
    class: "search", id: "search", type: "search", placeholder: "Search ids and names", "aria-label": "Search clients", value: view.q,
    autocomplete: "off", spellcheck: "false", oninput: () => change({ q: search.value.trim(), offset: 0 }),
  });
  const heads = COLUMNS.map(([key, name, kind]) => {
    // Of numbers and states the greatest and the worst are looked for; of ids the first.
    const button = h("button", { type: "button", onclick: () => change({ sort: key, desc: view.sort === key ? !view.desc : key !== "client_id", offset: 0 }) }, name);
    return { key, th: h("th", { class: kind, scope: "col" }, button), button, name };
  });
  let timer;
  let asked = -ASK_EVERY_MS;
  let reopen = () => {};

  function change(next) {
    view = { ...view, ...next };
    mark();
    // The first key is answered at once; who goes on typing, a few times a second.
    clearTimeout(timer);
    timer = setTimeout(() => {
      asked = performance.now();
      reopen();
    }, Math.max(0, asked + ASK_EVERY_MS - performance.now()));
    const query = new URLSearchParams();
    for (const [key, value] of Object.entries({ ...view, desc: view.desc ? "1" : "" })) if (value) query.set(key, value);
    history.replaceState(null, "", `#/clients?${query}`);
  }

  const move = (by) => change({ offset: Math.max(0, view.offset + by) });

  function mark() {
    for (const { key, th, button, name } of heads) {
      const sorted = view.sort === key;
      if (sorted) th.setAttribute("aria-sort", view.desc ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
      setText(button, sorted ? `${name} ${view.desc ? "↓" : "↑"}` : name);
    }
  }

  function row({ client_id: id, name, ...now }, tr) {
    const values = [
      name ?? "", now.state, now.queues?.inbox, now.queues && now.queues.outbox + now.queues.notify, now.queues?.dead,
      now.sent_per_s, now.received_per_s,
    ];
    if (!tr) {
      tr = h("tr", { class: "link", "data-id": id, onclick: (event) => opens(event) && go(`#/client/${id}`) },
        h("td", { class: "who" }, h("a", { href: `#/client/${id}` }, id), " ", h("span", { class: "sub" })),
        COLUMNS.slice(1).map(([, , kind]) => h("td", { class: kind })));
    }
    setText(tr.children[0].lastElementChild, values[0]);
    if (tr.children[1].textContent !== now.state) tr.children[1].replaceChildren(statePill(now));
    for (const [i, value] of values.entries()) {
      if (i < 2) continue;
      const cell = tr.children[i];
      setText(cell, i > 4 ? rate(value) : count(value));
      cell.classList.toggle("zero", !value);
    }
    return tr;
  }

  function show(page) {
    keyed(body, page.rows, (one) => one.client_id, row);
    if (!page.rows.length) {
      body.replaceChildren(h("tr", {}, h("td", { colspan: COLUMNS.length, class: "empty" },
        page.total ? "No client matches." : "No clients yet. Onboard the first one.")));
    }
    const last = view.offset + page.rows.length;
    const n = (number) => number.toLocaleString("en");
    setText(range, page.rows.length ? `${n(view.offset + 1)}–${n(last)} of ${n(page.matched)}${page.matched < page.total ? ` (${n(page.total)} in all)` : ""}`
      : page.matched ? `none from ${n(view.offset + 1)} on: there are ${several(page.matched, "client")}` : "");
    previous.disabled = view.offset === 0;
    next.disabled = last >= page.matched;
  }

  mark();
  const node = h("div", { class: "stack" },
    h("div", { class: "head" }, h("h1", {}, "Clients"), search,
      h("div", { class: "end" }, h("button", { type: "button", class: "main", id: "onboard", onclick: () => onboard(go) }, "Onboard a client"))),
    h("section", { class: "sheet" },
      h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads.map((head) => head.th))), body)),
      h("div", { class: "pager" }, range, h("div", { class: "end" }, previous, next))));
  return {
    node, title: "Clients", focus: null,
    query: () => ({ clients: "1", q: view.q, sort: view.sort, order: view.desc ? "desc" : "asc", offset: String(view.offset), limit: String(PAGE) }),
    onReopen: (fn) => { reopen = fn; },
    on: { clients: show },
  };
}

function onboard(go) {
  return dialog((close) => {
    const id = h("input", { name: "client_id", required: true, pattern: "[a-z0-9]([a-z0-9\\-]{0,61}[a-z0-9])?", autocomplete: "off", spellcheck: "false", autofocus: true });
    const name = h("input", { name: "name", autocomplete: "off" });
    const patterns = h("textarea", { name: "subscriptions", rows: 4, spellcheck: "false", placeholder: "soar.noc.#" });
    const url = h("input", { name: "url", type: "url", placeholder: "https://", autocomplete: "off" });
    const problem = h("div", {});
    const submit = h("button", { type: "submit", class: "main" }, "Onboard");
    async function send(event) {
      event.preventDefault();
      submit.disabled = true;
      const body = { client_id: id.value.trim(), subscriptions: lines(patterns.value) };
      if (name.value.trim()) body.name = name.value.trim();
      if (url.value.trim()) body.webhook = { url: url.value.trim() };
      try {
        const made = await call("POST", "/clients", body);
        close();
        await onceDialog(`${made.client_id} is on the backbone`, { Secret: made.secret, "Webhook secret": made.webhook_secret });
        go(`#/client/${made.client_id}`);
      } catch (refusal) {
        problem.replaceChildren(problemBox(refusal));
        submit.disabled = false;
      }
    }
    return h("form", { onsubmit: send },
      h("h1", {}, "Onboard a client"),
      h("label", {}, "Client id: a–z, 0–9 and inner hyphens", id),
      h("label", {}, "Name for people, optional", name),
      h("label", {}, "Subscriptions, one pattern a line: * is one word, # any number", patterns),
      h("label", {}, "Webhook, if its inbox is to be pushed to one", url),
      problem,
      h("div", { class: "end" }, h("button", { type: "button", onclick: () => close() }, "Cancel"), submit));
  });
}

/** The non-empty lines of a text. */
export const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
