// One client: what it is, how its queues and its webhook do, its dead letters, and what an operator can change.

import { call, path } from "./api.js";
import { lines, statePill } from "./clients.js";
import { confirm, count, dialog, h, keyed, millis, moment, num, pill, problemBox, rate, redraw, setText, several, span, toast, when } from "./dom.js";
import { onceDialog } from "./secrets.js";

const PAGE = 50;
const ACTORS = ["forwarder", "broadcaster", "subscriber", "pusher"];
const ACTOR_KINDS = { running: "ok", restarting: "bad", failing: "bad" };

export function client({ id, go }) {
  const url = (...rest) => path("clients", id, ...rest);
  const title = h("h1", {}, id);
  const sub = h("span", { class: "sub" }, "");
  const state = h("span", {});
  const figures = h("dl", { class: "figures" });
  const facts = h("dl", { class: "facts" });
  const hook = h("div", { class: "body" });
  const pause = h("button", { type: "button", onclick: () => act(() => call("PATCH", url(), { paused: !record?.paused }), record?.paused ? "Resumed" : "Paused") }, "Pause");
  const problem = h("div", {});
  let record = null;
  let missing = false;
  let dead = null;
  let attempt;

  async function act(work, done) {
    problem.replaceChildren();
    try {
      const result = await work();
      if (done) toast(done);
      return result;
    } catch (refusal) {
      problem.replaceChildren(problemBox(refusal));
      return undefined;
    }
  }

  function show(now) {
    record = now.record;
    if (missing) {
      missing = false;
      problem.replaceChildren();
    }
    content.hidden = actions.hidden = false;
    setText(sub, record.name ?? "");
    redraw(state, now.state, () => statePill(now));
    setText(pause, record.paused ? "Resume" : "Pause");
    const { queues } = record;
    redraw(figures, [queues, now.sent_per_s, now.received_per_s], () => [
      figure("Inbox", count(queues?.inbox)), figure("Outbox", count(queues?.outbox)), figure("Notify queue", count(queues?.notify)),
      figure("Dead letters", count(queues?.dead), queues?.dead ? "warn" : ""),
      figure("Sent", [rate(now.sent_per_s), h("small", {}, "/s")]), figure("Received", [rate(now.received_per_s), h("small", {}, "/s")])]);
    const { subscriptions, limits, actors, created_at: created } = record;
    redraw(facts, [subscriptions, limits, actors, created], () => [
      fact("Subscriptions", subscriptions.length ? subscriptions.map((p) => h("div", { class: "mono" }, p)) : h("span", { class: "sub" }, "none: only broadcasts reach it")),
      fact("Limits", limitsOf(limits)),
      fact("Actors", h("div", { class: "head" }, ACTORS.map((name) => pill(`${name} ${actors?.[name] ?? "unknown"}`, ACTOR_KINDS[actors?.[name]])))),
      fact("Onboarded", moment(created)),
    ]);
    redraw(hook, record.webhook, () => {
      hookActions.hidden = !record.webhook;
      return webhook(record.webhook);
    });
    // The first time, and when one became a dead letter, was replayed by somebody else, or was attempted.
    if (queues && dead !== queues.dead) {
      dead = queues.dead;
      deadSection.stale();
    }
    if (attempt !== now.last_attempt) {
      attempt = now.last_attempt;
      attemptSection.stale();
    }
  }

  function limitsOf(limits) {
    const said = [
      limits?.send_per_s && `sends at most ${several(limits.send_per_s, "message")} a second`,
      limits?.max_inbox_messages && `its inbox holds at most ${several(limits.max_inbox_messages, "message")}`,
      limits?.inbox_ttl_s && `messages stay in its inbox for ${span(limits.inbox_ttl_s)}`,
    ].filter(Boolean);
    return said.length ? said.map((text) => h("div", {}, text)) : h("span", { class: "sub" }, "none");
  }

  function gone() {
    missing = true;
    content.hidden = actions.hidden = true;
    redraw(state, "gone", () => pill("gone", "bad"));
    problem.replaceChildren(problemBox({ detail: `There is no client ${id}.` }));
  }

  const figure = (name, value, kind = "") => h("div", { class: kind }, h("dt", {}, name), h("dd", {}, value));
  const fact = (name, value) => [h("dt", {}, name), h("dd", {}, value)];

  function webhook(settings) {
    if (!settings) return h("p", { class: "sub" }, "None: the client pulls its inbox, or reads it over a WebSocket or AMQP.");
    const breaker = settings.breaker ?? "closed";
    return h("dl", { class: "facts" },
      fact("URL", h("code", {}, settings.url)),
      fact("State", settings.enabled
        ? pill(breaker === "closed" ? "delivering" : `breaker ${breaker.replace("_", " ")}`, breaker === "closed" ? "ok" : "warn")
        : [pill("switched off", "warn"), " ", settings.disabled_reason ?? ""]),
      fact("Retries", settings.retry_schedule_s.length ? `after ${settings.retry_schedule_s.map(span).join(", ")}` : "none"),
      fact("Calls", `${settings.ordered ? "one at a time, in order" : `${settings.concurrency} at once`}, ${settings.timeout_s} s each${settings.rate_limit_per_s ? `, at most ${settings.rate_limit_per_s} a second` : ""}`));
  }

  async function rotate(kind) {
    const what = kind === "secret" ? "secret" : "webhook secret";
    const overlap = await dialog((close) => {
      const seconds = h("select", {}, [["86400", "1 day"], ["3600", "1 hour"], ["604800", "7 days"], ["0", "not at all: it leaked"]].map(([value, name]) => h("option", { value }, name)));
      return h("form", { onsubmit: (event) => { event.preventDefault(); close(seconds.value); } },
        h("h1", {}, `Rotate the ${what} of ${id}`),
        h("label", {}, "The one before stays valid for", seconds),
        h("div", { class: "end" }, h("button", { type: "button", onclick: () => close() }, "Cancel"), h("button", { type: "submit", class: "main" }, "Rotate")));
    });
    if (overlap === undefined) return;
    const made = await act(() => call("POST", `${url(kind)}?overlap_s=${overlap}`));
    if (made) {
      await onceDialog(`New ${what} of ${id}`, { [kind === "secret" ? "Secret" : "Webhook secret"]: made.secret },
        `Shown here and never again. The one before is valid until ${moment(made.previous_valid_until)}.`);
    }
  }

  async function remove() {
    const sure = await confirm(`Delete ${id}?`, "What its outbox and notify queue hold is still forwarded. Its inbox and its dead letters are deleted with it.", "Delete");
    if (!sure) return;
    if ((await act(() => call("DELETE", url()), `${id} is deleted`)) !== undefined) go("#/clients");
  }

  function edit() {
    return dialog((close) => {
      const name = h("input", { value: record?.name ?? "" });
      const patterns = h("textarea", { rows: 6, spellcheck: "false", value: (record?.subscriptions ?? []).join("\n") });
      const hookUrl = h("input", { type: "url", placeholder: "https://", value: record?.webhook?.url ?? "" });
      const enabled = h("input", { type: "checkbox", checked: record?.webhook?.enabled ?? true });
      const refusal = h("div", {});
      async function send(event) {
        event.preventDefault();
        const body = { name: name.value.trim() || null, subscriptions: lines(patterns.value) };
        if (hookUrl.value.trim()) body.webhook = { url: hookUrl.value.trim(), enabled: enabled.checked };
        else if (record?.webhook) body.webhook = null;
        try {
          const made = await call("PATCH", url(), body);
          close();
          toast("Saved");
          if (made?.webhook_secret) await onceDialog(`Webhook of ${id}`, { "Webhook secret": made.webhook_secret });
        } catch (error) {
          refusal.replaceChildren(problemBox(error));
        }
      }
      return h("form", { onsubmit: send },
        h("h1", {}, `Change ${id}`),
        h("label", {}, "Name", name),
        h("label", {}, "Subscriptions, one pattern a line", patterns),
        h("label", {}, "Webhook; empty for none", hookUrl),
        h("label", { class: "check" }, enabled, "deliver to the webhook"),
        refusal,
        h("div", { class: "end" }, h("button", { type: "button", onclick: () => close() }, "Cancel"), h("button", { type: "submit", class: "main" }, "Save")));
    });
  }

  async function test() {
    const attempt = await act(() => call("POST", url("webhook", "test")));
    if (!attempt) return;
    const fine = attempt.status >= 200 && attempt.status < 300;
    toast(attempt.status ? `The endpoint answered ${attempt.status} in ${attempt.latency_ms} ms` : `No answer: ${attempt.error}`, !fine);
    attemptSection.stale();
  }

  const hookActions = h("div", { class: "end", hidden: true },
    h("button", { type: "button", onclick: test }, "Send a test"),
    h("button", { type: "button", onclick: () => rotate("webhook-secret") }, "Rotate its secret"));
  const deadSection = deadLetters(url, act);
  const attemptSection = attempts(url, act);
  const actions = h("div", { class: "end" },
    h("button", { type: "button", onclick: edit }, "Change"), pause,
    h("button", { type: "button", id: "rotate", onclick: () => rotate("secret") }, "Rotate secret"),
    h("button", { type: "button", class: "risk", onclick: remove }, "Delete"));
  const content = h("div", { class: "stack" }, figures,
    h("div", { class: "grid" },
      h("section", { class: "sheet" }, h("header", {}, h("h2", {}, "Settings")), h("div", { class: "body" }, facts)),
      h("section", { class: "sheet", id: "webhook" },
        h("header", {}, h("h2", {}, "Webhook"), hookActions),
        hook)),
    deadSection.node, attemptSection.node);
  const node = h("div", { class: "stack" },
    h("p", {}, h("a", { href: "#/clients" }, "← Clients")),
    h("div", { class: "head" }, title, sub, state,
      actions),
    problem, content);
  return { node, title: id, query: () => ({ client: id }), on: { client: show, gone } };
}

/**
 * A list that is loaded page by page. `load(after, limit)` resolves to {items, next}, or to nothing when it was refused;
 * rows are kept over a reload by their `id`, and with them what is chosen, opened or selected in them.
 */
function pages(load, row, empty) {
  const body = h("tbody", {});
  const more = h("button", { type: "button", onclick: () => fetchPage(false) }, "Show more");
  let items = [];
  let next = null;
  let busy = false;
  let again = false;
  async function fetchPage(fresh) {
    // One at a time; what is asked for meanwhile is asked for afterwards, once.
    if (busy) {
      again ||= fresh;
      return;
    }
    busy = true;
    const page = await load(fresh ? null : next, fresh ? Math.min(Math.max(items.length, PAGE), 1000) : PAGE);
    busy = false;
    if (page) {
      next = page.next;
      items = fresh ? page.items : items.concat(page.items);
      keyed(body, items, (item) => item.id, (item, node) => node ?? row(item));
      if (!items.length) body.replaceChildren(h("tr", {}, h("td", { class: "empty", colspan: 9 }, empty)));
      more.parentElement.hidden = !next;
    }
    if (again) {
      again = false;
      fetchPage(true);
    }
  }
  return { body, more, reload: () => fetchPage(true) };
}

const table = (heads, body) => h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Table" }, h("table", {},
  h("thead", {}, h("tr", {}, heads.map(([name, kind]) => (name ? h("th", { scope: "col", class: kind ?? "" }, name) : h("td", {}))))), body));

function deadLetters(url, act) {
  const chosen = new Set();
  const replay = h("button", { type: "button", id: "replay", disabled: true, onclick: () => again([...chosen]) }, "Replay chosen");
  const list = pages(
    async (after, limit) => {
      const page = await act(() => call("GET", `${url("dead-letters")}?limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ""}`));
      return page && { items: page.dead_letters, next: page.next };
    },
    (dead) => {
      const { id, envelope, raw } = dead;
      const box = h("input", { type: "checkbox", "aria-label": `Choose ${envelope?.id ?? id}`, onchange: () => {
        if (box.checked) chosen.add(id);
        else chosen.delete(id);
        replay.disabled = !chosen.size;
      } });
      return h("tr", {},
        h("td", {}, box), h("td", {}, when(dead.died_at)), h("td", {}, dead.reason.replaceAll("_", " ")), h("td", {}, dead.queue), num(dead.attempts),
        h("td", { class: "wide" }, h("div", { class: "letter" },
          envelope ? h("a", { class: "mono", href: `#/message/${encodeURIComponent(envelope.id)}?sender=${encodeURIComponent(envelope.sender)}` }, envelope.id) : null,
          h("details", {}, h("summary", {}, envelope ? `${envelope.topic ?? "broadcast"} from ${envelope.sender}` : "cannot be read"),
            h("pre", {}, envelope ? JSON.stringify(envelope.message, null, 2) : text(raw))))));
    },
    "None. What cannot be delivered to this client, or be read from it, is kept here.");
  async function again(ids) {
    const result = await act(() => call("POST", url("dead-letters", "replay"), ids ? { ids } : {}));
    if (!result) return;
    toast(`${several(result.replayed, "message")} put back`);
    chosen.clear();
    replay.disabled = true;
    list.reload();
  }
  async function purge() {
    if (!(await confirm("Purge all dead letters?", "They are gone for good.", "Purge"))) return;
    const result = await act(() => call("DELETE", url("dead-letters")));
    if (result) toast(`${several(result.purged, "dead letter")} purged`);
    list.reload();
  }
  const node = h("section", { class: "sheet", id: "dead-letters" },
    h("header", {}, h("h2", {}, "Dead letters"), h("span", { class: "hint" }, "oldest first"),
      h("div", { class: "end" }, replay, h("button", { type: "button", id: "replay-all", onclick: () => again(null) }, "Replay all"), h("button", { type: "button", class: "risk", onclick: purge }, "Purge"))),
    table([[""], ["Died, UTC"], ["Reason"], ["Queue"], ["Attempts", "num"], ["Message"]], list.body),
    h("div", { class: "pager", hidden: true }, list.more));
  return { node, stale: list.reload };
}

/** What base64 holds, as text; what is no UTF-8 is marked. */
function text(raw) {
  return new TextDecoder().decode(Uint8Array.from(atob(raw ?? ""), (c) => c.charCodeAt(0)));
}

function attempts(url, act) {
  const list = pages(
    async (after, limit) => {
      const page = await act(() => call("GET", `${url("attempts")}?limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ""}`));
      return page && { items: page.attempts, next: page.next };
    },
    (attempt) => h("tr", {},
      h("td", {}, when(attempt.at)),
      h("td", {}, attempt.status ? pill(String(attempt.status), attempt.status < 300 ? "ok" : "bad") : pill(attempt.error ?? "failed", "bad")),
      h("td", { class: "num" }, millis(attempt.latency_ms)),
      h("td", { class: "mono" }, h("a", { href: `#/message/${encodeURIComponent(attempt.message_id)}` }, attempt.message_id)),
      h("td", { class: "wide mono sub" }, (attempt.response ?? "").slice(0, 160))),
    "None yet.");
  const node = h("section", { class: "sheet", id: "attempts" },
    h("header", {}, h("h2", {}, "Webhook attempts"), h("span", { class: "hint" }, "newest first")),
    table([["When, UTC"], ["Answer"], ["Took", "num"], ["Message"], ["Said"]], list.body),
    h("div", { class: "pager", hidden: true }, list.more));
  return { node, stale: list.reload };
}
