// All clients: sorted and searched by the router, a page at a time, pushed every two seconds.

import { call } from "./api.js";
import { dialog, h, num, pill, problemBox, rate, setText } from "./dom.js";
import { onceDialog } from "./secrets.js";

const PAGE = 50;
const COLUMNS = [
  ["client_id", "Client", ""],
  ["state", "State", ""],
  ["inbox", "Inbox", "num"],
  ["outbox", "Outbox", "num hide-small"],
  ["dead", "Dead", "num"],
  ["sent", "Sent/s", "num hide-small"],
  ["received", "Received/s", "num hide-small"],
];

/** A client's state in a pill: the worst that is known. */
export function statePill(row) {
  const kinds = { ok: "ok", paused: "", starting: "", "webhook off": "warn", "breaker open": "warn", restarting: "bad", failing: "bad" };
  return pill(row.state, kinds[row.state] ?? "");
}

export function clients({ go, params }) {
  let view = {
    q: params.get("q") ?? "", sort: params.get("sort") ?? "client_id", desc: params.get("desc") === "1",
    offset: Number(params.get("offset") ?? 0) || 0,
  };
  const body = h("tbody", {});
  const range = h("span", {}, "");
  const previous = h("button", { type: "button", onclick: () => move(-PAGE) }, "Previous");
  const next = h("button", { type: "button", onclick: () => move(PAGE) }, "Next");
  const search = h("input", {
    class: "search", id: "search", type: "search", placeholder: "Search ids and names", "aria-label": "Search clients", value: view.q,
    autocomplete: "off", spellcheck: "false", oninput: () => change({ q: search.value.trim(), offset: 0 }, 150),
  });
  const heads = COLUMNS.map(([key, name, kind]) => {
    const button = h("button", { type: "button", onclick: () => change({ sort: key, desc: view.sort === key ? !view.desc : kind !== "", offset: 0 }) }, name);
    return { key, th: h("th", { class: kind, scope: "col" }, button), button, name };
  });
  let timer;
  let reopen = () => {};

  function change(next, delay = 0) {
    view = { ...view, ...next };
    mark();
    clearTimeout(timer);
    timer = setTimeout(() => reopen(), delay);
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

  function show(page) {
    const had = document.activeElement?.closest?.("tr")?.dataset.id;
    body.replaceChildren(...page.rows.map((row) => {
      const link = h("a", { href: `#/client/${row.client_id}` }, row.client_id);
      const tr = h("tr", { class: "link", "data-id": row.client_id, onclick: (event) => event.target.tagName !== "A" && go(`#/client/${row.client_id}`) },
        h("td", {}, link, row.name ? h("span", { class: "sub" }, ` ${row.name}`) : null),
        h("td", {}, statePill(row)),
        num(row.queues?.inbox), num(row.queues ? row.queues.outbox + row.queues.notify : null), num(row.queues?.dead),
        num(row.sent_per_s, rate), num(row.received_per_s, rate));
      tr.children[3].classList.add("hide-small");
      tr.children[5].classList.add("hide-small");
      tr.children[6].classList.add("hide-small");
      if (row.client_id === had) queueMicrotask(() => link.focus());
      return tr;
    }));
    if (!page.rows.length) {
      body.append(h("tr", {}, h("td", { colspan: COLUMNS.length, class: "empty" },
        page.total ? "No client matches." : "No clients yet. Onboard the first one.")));
    }
    const last = view.offset + page.rows.length;
    setText(range, page.matched ? `${view.offset + 1}–${last} of ${page.matched}${page.matched < page.total ? ` (${page.total} in all)` : ""}` : "");
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
      h("label", {}, "Name, for people", name),
      h("label", {}, "Subscriptions, one pattern a line: * is one word, # any number", patterns),
      h("label", {}, "Webhook, if its inbox is to be pushed", url),
      problem,
      h("div", { class: "end" }, h("button", { type: "button", onclick: () => close() }, "Cancel"), submit));
  });
}

/** The non-empty lines of a text. */
export const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
