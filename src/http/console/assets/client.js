// One client: what it is, how its queues and its webhook do, its dead letters, and what an operator can change.

import { call, path } from "./api.js";
import { lines, statePill } from "./clients.js";
import { confirm, count, dialog, h, num, pill, problemBox, rate, setText, toast, when } from "./dom.js";
import { onceDialog } from "./secrets.js";

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
  let hookShown = "";

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
    setText(sub, record.name ?? "");
    state.replaceChildren(statePill(now));
    setText(pause, record.paused ? "Resume" : "Pause");
    const queue = (n, warn) => h("dd", {}, count(n), warn);
    figures.replaceChildren(
      figure("Inbox", queue(record.queues?.inbox)), figure("Outbox", queue(record.queues?.outbox)), figure("Notify queue", queue(record.queues?.notify)),
      figure("Dead letters", queue(record.queues?.dead), record.queues?.dead ? "warn" : ""),
      figure("Sent", h("dd", {}, rate(now.sent_per_s), h("small", {}, "/s"))), figure("Received", h("dd", {}, rate(now.received_per_s), h("small", {}, "/s"))));
    const limits = Object.entries(record.limits ?? {}).map(([name, value]) => `${name} ${value}`).join(", ");
    facts.replaceChildren(...[
      fact("Subscriptions", record.subscriptions.length ? record.subscriptions.map((p) => h("div", { class: "mono" }, p)) : h("span", { class: "sub" }, "none: only broadcasts reach it")),
      fact("Limits", limits || h("span", { class: "sub" }, "none")),
      fact("Actors", h("div", { class: "head" }, ACTORS.map((name) => pill(`${name} ${record.actors?.[name] ?? "unknown"}`, ACTOR_KINDS[record.actors?.[name]])))),
      fact("Onboarded", new Date(record.created_at).toLocaleString()),
    ].flat());
    const text = JSON.stringify(record.webhook);
    if (text !== hookShown) {
      hookShown = text;
      hook.replaceChildren(webhook(record.webhook));
      hookActions.hidden = !record.webhook;
    }
  }

  const figure = (name, value, kind = "") => h("div", { class: kind }, h("dt", {}, name), value);
  const fact = (name, value) => [h("dt", {}, name), h("dd", {}, value)];

  function webhook(settings) {
    if (!settings) return h("p", { class: "sub" }, "None: the client pulls its inbox, or reads it over a WebSocket or AMQP.");
    const breaker = settings.breaker ?? "closed";
    return h("dl", { class: "facts" },
      fact("URL", h("code", {}, settings.url)),
      fact("State", settings.enabled
        ? pill(breaker === "closed" ? "delivering" : `breaker ${breaker.replace("_", " ")}`, breaker === "closed" ? "ok" : "warn")
        : [pill("switched off", "warn"), " ", settings.disabled_reason ?? ""]),
      fact("Retries", `after ${settings.retry_schedule_s.join(", ")} s`),
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
        `Shown here and never again. The one before is valid until ${new Date(made.previous_valid_until).toLocaleString()}.`);
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
    attemptSection.load();
  }

  const hookActions = h("div", { class: "end", hidden: true },
    h("button", { type: "button", onclick: test }, "Send a test"),
    h("button", { type: "button", onclick: () => rotate("webhook-secret") }, "Rotate its secret"));
  const deadSection = deadLetters(url, act);
  const attemptSection = attempts(url, act);
  const node = h("div", { class: "stack" },
    h("p", {}, h("a", { href: "#/clients" }, "← Clients")),
    h("div", { class: "head" }, title, sub, state,
      h("div", { class: "end" },
        h("button", { type: "button", onclick: edit }, "Change"), pause,
        h("button", { type: "button", id: "rotate", onclick: () => rotate("secret") }, "Rotate secret"),
        h("button", { type: "button", class: "risk", onclick: remove }, "Delete"))),
    problem, figures,
    h("div", { class: "grid" },
      h("section", { class: "sheet" }, h("header", {}, h("h2", {}, "Settings")), h("div", { class: "body" }, facts)),
      h("section", { class: "sheet" },
        h("header", {}, h("h2", {}, "Webhook"), hookActions),
        hook)),
    deadSection.node, attemptSection.node);
  return { node, title: id, query: () => ({ client: id }), on: { client: show, gone: () => { problem.replaceChildren(problemBox({ detail: `There is no client ${id}.` })); } } };
}

/** A list that is loaded page by page. */
function pages(load, row, empty) {
  const body = h("tbody", {});
  const more = h("button", { type: "button", onclick: () => fetchPage(false) }, "Show more");
  let next = null;
  async function fetchPage(fresh) {
    const page = await load(fresh ? null : next);
    if (!page) return;
    if (fresh) body.replaceChildren();
    next = page.next;
    body.append(...page.items.map(row));
    if (!body.children.length) body.append(h("tr", {}, h("td", { class: "empty", colspan: 9 }, empty)));
    more.parentElement.hidden = !next;
  }
  return { body, more, reload: () => fetchPage(true) };
}

function deadLetters(url, act) {
  const chosen = new Set();
  const replay = h("button", { type: "button", id: "replay", disabled: true, onclick: () => again([...chosen]) }, "Replay chosen");
  const list = pages(
    async (after) => {
      const page = await act(() => call("GET", `${url("dead-letters")}?limit=50${after ? `&after=${encodeURIComponent(after)}` : ""}`));
      return page && { items: page.dead_letters, next: page.next };
    },
    (dead) => {
      const box = h("input", { type: "checkbox", "aria-label": `Choose ${dead.id}`, onchange: () => {
        if (box.checked) chosen.add(dead.id);
        else chosen.delete(dead.id);
        replay.disabled = !chosen.size;
      } });
      const sender = dead.envelope?.sender;
      return h("tr", {},
        h("td", {}, box), h("td", {}, when(dead.died_at)), h("td", {}, dead.reason.replaceAll("_", " ")), h("td", {}, dead.queue), num(dead.attempts),
        h("td", { class: "wide mono" }, dead.envelope
          ? [h("a", { href: `#/message/${encodeURIComponent(dead.envelope.id)}?sender=${encodeURIComponent(sender)}` }, dead.envelope.id), " ", h("span", { class: "sub" }, dead.envelope.topic ?? "broadcast")]
          : "cannot be read"));
    },
    "None. What cannot be delivered to this client, or be read from it, is kept here.");
  async function again(ids) {
    const result = await act(() => call("POST", url("dead-letters", "replay"), ids ? { ids } : {}));
    if (!result) return;
    toast(`${result.replayed} put back`);
    chosen.clear();
    replay.disabled = true;
    list.reload();
  }
  async function purge() {
    if (!(await confirm("Purge all dead letters?", "They are gone for good.", "Purge"))) return;
    const result = await act(() => call("DELETE", url("dead-letters")));
    if (result) toast(`${result.purged} purged`);
    list.reload();
  }
  list.reload();
  const node = h("section", { class: "sheet", id: "dead-letters" },
    h("header", {}, h("h2", {}, "Dead letters"), h("button", { type: "button", class: "plain", onclick: list.reload }, "Reload"),
      h("div", { class: "end" }, replay, h("button", { type: "button", id: "replay-all", onclick: () => again(null) }, "Replay all"), h("button", { type: "button", class: "risk", onclick: purge }, "Purge"))),
    h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ["", "Died", "Reason", "Queue", "Attempts", "Message"].map((name) => h("th", { scope: "col", class: name === "Attempts" ? "num" : "" }, name)))), list.body)),
    h("div", { class: "pager", hidden: true }, list.more));
  return { node };
}

function attempts(url, act) {
  const list = pages(
    async (after) => {
      const page = await act(() => call("GET", `${url("attempts")}?limit=50${after ? `&after=${encodeURIComponent(after)}` : ""}`));
      return page && { items: page.attempts, next: page.next };
    },
    (attempt) => h("tr", {},
      h("td", {}, when(attempt.at)),
      h("td", {}, attempt.status ? pill(String(attempt.status), attempt.status < 300 ? "ok" : "bad") : pill(attempt.error ?? "failed", "bad")),
      h("td", { class: "num" }, `${attempt.latency_ms} ms`),
      h("td", { class: "mono" }, h("a", { href: `#/message/${encodeURIComponent(attempt.message_id)}` }, attempt.message_id)),
      h("td", { class: "wide mono sub" }, (attempt.response ?? "").slice(0, 160))),
    "None yet.");
  list.reload();
  const node = h("section", { class: "sheet", id: "attempts" },
    h("header", {}, h("h2", {}, "Webhook attempts"), h("button", { type: "button", class: "plain", onclick: list.reload }, "Reload")),
    h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ["When", "Answer", "Took", "Message", "Said"].map((name) => h("th", { scope: "col", class: name === "Took" ? "num" : "" }, name)))), list.body)),
    h("div", { class: "pager", hidden: true }, list.more));
  return { node, load: list.reload };
}
