// The console: which page is shown, the feed that keeps it live, and the token that opens it.

import { call, feed, token } from "./api.js";
import { byId, h, pill, problemBox, redraw, setText } from "./dom.js";
import { client } from "./client.js";
import { clients } from "./clients.js";
import { message } from "./message.js";
import { overview } from "./overview.js";
import { tail } from "./tail.js";

const TABS = [["#/overview", "Overview"], ["#/clients", "Clients"], ["#/message", "Find a message"], ["#/tail", "Live tail"]];
const HISTORY_KEPT = 720;

const store = { overview: null, history: [], hello: null };
let page = null;
let endFeed = () => {};

const state = h("span", { role: "status" }, pill("connecting"));
const about = h("span", { class: "hide-small" }, "");
const tabs = TABS.map(([href, name]) => h("a", { href }, name));

function bar(signedIn) {
  byId("bar").replaceChildren(
    h("a", { class: "brand", href: "#/overview" }, h("img", { src: "/console/icon.svg", alt: "" }), "Backbone"),
    ...(signedIn ? [h("nav", { class: "tabs", "aria-label": "Pages" }, tabs)] : []),
    h("div", { class: "end" },
      signedIn ? about : null, signedIn ? state : null,
      h("a", { href: "/docs" }, "API"),
      h("button", { type: "button", class: "plain", onclick: theme, title: "Light or dark" }, "Theme"),
      signedIn ? h("button", { type: "button", class: "plain", onclick: signOut }, "Sign out") : null));
}

function theme() {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  sessionStorage.setItem("backbone-theme", document.documentElement.dataset.theme);
}

function signOut() {
  token.clear();
  endFeed();
  page = null;
  login();
}

function login(problem) {
  document.title = "Backbone console";
  bar(false);
  byId("notice").hidden = true;
  const input = h("input", { type: "password", id: "token", autocomplete: "off", required: true });
  const refusal = h("div", {}, problem ? problemBox(problem) : null);
  const form = h("form", { onsubmit: async (event) => {
    event.preventDefault();
    token.set(input.value.trim());
    try {
      await call("GET", "/clients?limit=1");
      bar(true);
      navigate();
    } catch (error) {
      token.clear();
      const wrong = error.status === 401 || error.status === 403;
      refusal.replaceChildren(problemBox(wrong ? { detail: "This is not the admin token of this router." } : error));
      input.select();
    }
  } },
    h("h1", {}, "Backbone console"),
    h("label", {}, "Admin token", input),
    h("p", { class: "hint" }, "Kept for this tab only. The router made it at its first start: it is in the file ", h("code", {}, "admin-token"), " in its data directory."),
    refusal,
    h("button", { type: "submit", class: "main" }, "Sign in"));
  byId("main").replaceChildren(h("section", { class: "sheet login" }, form));
  input.focus();
}

/** What stands in an address; as it stands there when it is not encoded as it should be. */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Opens the page that the address names. */
function navigate() {
  if (!token.get()) return login();
  const [route, query] = location.hash.slice(2).split("?");
  const [name, ...rest] = route.split("/");
  const context = {
    store, params: new URLSearchParams(query), go: (hash) => { location.hash = hash; },
    id: rest.length ? decoded(rest.join("/")) : null,
  };
  const pages = new Map(Object.entries({ overview, clients, message, tail, client: context.id ? client : clients }));
  page = (pages.get(name) ?? overview)(context);
  document.title = `${page.title} · Backbone`;
  for (const tab of tabs) {
    const here = tab.getAttribute("href").slice(2);
    if (here === (name || "overview") || (name === "client" && here === "clients")) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  byId("main").replaceChildren(page.node);
  page.onReopen?.(listen);
  (page.focus === undefined ? byId("main") : page.focus)?.focus({ preventScroll: true });
  window.scrollTo(0, 0);
  listen();
}

/** (Re)opens the feed with what the page wants to see. */
function listen() {
  endFeed();
  endFeed = feed(() => ({ ...page.query?.(), since: lastSample() }), heard, (now) => {
    const notice = byId("notice");
    if (now === "live") {
      notice.hidden = true;
    } else if (now === "lost") {
      redraw(state, "lost", () => pill("no connection", "bad"));
      setText(notice, "The connection to the router is lost. Trying again; what is shown is old.");
      notice.className = "notice bad";
      notice.hidden = false;
    } else if (now.status === 401 || now.status === 403) {
      token.clear();
      login(now);
    } else {
      setText(notice, [now.detail, ...(now.errors ?? []).map((e) => e.detail)].join(" "));
      notice.className = "notice bad";
      notice.hidden = false;
    }
  });
}

/** When the newest sample was taken that is known, in milliseconds: only what came after it is sent. */
const lastSample = () => (store.history.length ? Date.parse(store.history.at(-1).at) : 0);

function heard(name, data) {
  if (name === "hello") {
    store.hello = data;
    const known = lastSample();
    store.history = store.history.concat(data.history.filter((sample) => Date.parse(sample.at) > known)).slice(-HISTORY_KEPT);
    setText(about, `${data.broker} broker · ${data.version}`);
    page.on?.history?.();
  } else if (name === "overview") {
    store.overview = data;
    const bad = data.health !== "ready";
    redraw(state, data.health, () => pill(bad ? `broker ${data.health}` : "ready", bad ? "bad" : "ok"));
    state.title = data.reason ?? "";
  } else if (name === "sample") {
    // A feed that was opened just now has sent it already.
    if (Date.parse(data.at) > lastSample()) store.history.push(data);
    if (store.history.length > HISTORY_KEPT) store.history.shift();
    page.on?.history?.();
  }
  page.on?.[name]?.(data);
}

addEventListener("hashchange", navigate);
addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || byId("dialog").open;
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !token.get()) return;
  if (event.key === "/") {
    event.preventDefault();
    const field = byId("search") ?? byId("message-id") ?? byId("pattern");
    if (field) field.focus();
    else location.hash = "#/clients";
  } else if (event.key >= "1" && event.key <= String(TABS.length)) {
    location.hash = TABS[Number(event.key) - 1][0];
  }
});

const chosen = sessionStorage.getItem("backbone-theme");
if (chosen) document.documentElement.dataset.theme = chosen;
bar(Boolean(token.get()));
navigate();
