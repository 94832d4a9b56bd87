// The API's page: the OpenAPI document drawn for people, with calls to paste and calls to try.

import { byId, h, setText } from "./dom.js";

/** Text in which `code` stands between backticks. Lines that were only broken to fit the source are joined. */
const prose = (text) => (text ?? "").replace(/([^\n])\n(?![\n-])/g, "$1 ").split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part));

// Who tries. Kept in this page's memory only.
const who = { kind: "none", id: "", secret: "", token: "" };
let spec;

const resolve = (schema) => {
  let found = schema;
  for (let hops = 0; found?.$ref && hops < 20; hops += 1) {
    found = found.$ref.slice(2).split("/").reduce((node, part) => node?.[part], spec);
  }
  return found ?? {};
};

const refName = (schema) => schema?.$ref?.split("/").pop();

/** A type in a few words. */
function typeOf(schema) {
  if (!schema) return "any";
  if (schema.$ref) return refName(schema);
  if (schema.oneOf || schema.anyOf) {
    return (schema.oneOf ?? schema.anyOf).map(typeOf).filter((name) => name !== "null").join(" or ");
  }
  if (schema.allOf) return schema.allOf.map(typeOf).join(" and ");
  const types = [schema.type].flat().filter((type) => type && type !== "null");
  if (types.includes("array")) return `array of ${typeOf(schema.items)}`;
  const name = types.join(" or ") || "any JSON";
  return schema.format && !/^u?int/.test(schema.format) ? `${name} (${schema.format})` : name;
}

function bounds(schema) {
  const said = [];
  if (schema.enum) said.push(schema.enum.map((value) => JSON.stringify(value)).join(" | "));
  if (schema.minimum !== undefined || schema.maximum !== undefined) said.push(`${schema.minimum ?? "…"} to ${schema.maximum ?? "…"}`);
  if (schema.maxLength !== undefined) said.push(`at most ${schema.maxLength} characters`);
  if (schema.pattern) said.push(schema.pattern);
  return said.join(", ");
}

/** The members of a schema, opened one level at a time. */
function members(schema, depth = 0) {
  const real = resolve(schema);
  if (depth > 6) return null;
  const parts = real.oneOf ?? real.anyOf ?? real.allOf;
  if (parts) return parts.map((part) => members(part, depth + 1));
  if (real.type === "array" || real.items) return members(real.items, depth + 1);
  const properties = Object.entries(real.properties ?? {});
  if (!properties.length) return null;
  return h("div", { class: "schema" }, properties.map(([name, property]) => {
    const inner = resolve(property);
    const nested = members(property, depth + 1);
    const required = real.required?.includes(name);
    const row = [h("code", {}, name), " ", h("span", { class: "sub" }, typeOf(property), required ? "" : ", optional"), " ",
      h("span", { class: "hint" }, bounds(inner)), h("div", { class: "sub" }, prose(property.description ?? inner.description))];
    return nested && [nested].flat(9).some(Boolean) && depth < 3 ? h("details", {}, h("summary", {}, row.slice(0, 3)), row[4], nested) : h("div", { class: "row" }, row);
  }));
}

/** An example of a schema, from its examples, or made of its parts. */
function example(schema, depth = 0) {
  if (!schema || depth > 6) return null;
  if (schema.example !== undefined) return schema.example;
  if (schema.examples?.length) return schema.examples[0];
  const real = resolve(schema);
  if (real !== schema) return example(real, depth + 1);
  if (real.enum) return real.enum[0];
  if (real.oneOf || real.anyOf) return example((real.oneOf ?? real.anyOf).find((part) => part.type !== "null"), depth + 1);
  if (real.allOf) return Object.assign({}, ...real.allOf.map((part) => example(part, depth + 1)));
  const type = [real.type].flat().find((name) => name !== "null");
  if (type === "array") return [example(real.items, depth + 1)];
  if (type === "object") {
    const required = Object.entries(real.properties ?? {}).filter(([name]) => real.required?.includes(name));
    return Object.fromEntries(required.map(([name, property]) => [name, example(property, depth + 1)]));
  }
  return { string: "…", integer: 1, number: 1, boolean: true }[type] ?? null;
}

function bodyOf(operation) {
  const [media, content] = Object.entries(operation.requestBody?.content ?? {})[0] ?? [];
  if (!media) return null;
  const given = content.example ?? Object.values(content.examples ?? {})[0]?.value;
  return { media, schema: content.schema, text: JSON.stringify(given ?? example(content.schema), null, 2) };
}

/** How a call says who makes it, in words and for curl. */
function security(operation) {
  const needs = (operation.security ?? spec.security ?? []).map((entry) => Object.keys(entry));
  if (!needs.length || needs.every((names) => !names.length)) return { text: "anyone", curl: "" };
  const admin = needs.some((names) => names.includes("admin"));
  const client = needs.some((names) => names.includes("basic"));
  return {
    text: admin && client ? "the admin, or the client itself" : admin ? "the admin" : "a client",
    curl: admin ? ' -H "authorization: Bearer $ADMIN_TOKEN"' : ' -u "$CLIENT_ID:$SECRET"',
  };
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const anchor = (method, path) => `${method}-${path.replaceAll(/[^a-z]+/gi, "-").replace(/^-|-$/g, "")}`;

function curl(method, path, operation, body) {
  const filled = path.replaceAll(/\{(\w+)\}/g, (_, name) => {
    const parameter = (operation.parameters ?? []).find((one) => one.in === "path" && one.name === name);
    return encodeURIComponent(parameter?.example ?? (name === "id" ? "noc-c2" : name));
  });
  const verb = method === "get" ? "" : ` -X ${method.toUpperCase()}`;
  const data = body ? ` \\\n  -H 'content-type: ${body.media}' -d ${quote(JSON.stringify(JSON.parse(body.text)))}` : "";
  return `curl -s${verb}${security(operation).curl} ${quote(location.origin + filled)}${data}`;
}

function copyable(text) {
  const button = h("button", { type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(text);
      setText(button, "Copied");
    } catch {
      setText(button, "Select it");
    }
  } }, "Copy");
  return h("div", { class: "copy" }, h("pre", {}, text), button);
}

function attempt(method, path, operation, body) {
  const parameters = (operation.parameters ?? []).filter((one) => one.in !== "header");
  const inputs = parameters.map((one) => [one, h("input", { placeholder: String(one.schema?.default ?? ""), autocomplete: "off", spellcheck: "false" })]);
  const text = body ? h("textarea", { rows: Math.min(12, body.text.split("\n").length + 1), spellcheck: "false", value: body.text }) : null;
  const result = h("div", { class: "result", role: "status" });
  async function send(event) {
    event.preventDefault();
    let url = path;
    const query = new URLSearchParams();
    for (const [one, input] of inputs) {
      if (one.in === "path") url = url.replace(`{${one.name}}`, encodeURIComponent(input.value));
      else if (input.value) query.set(one.name, input.value);
    }
    if (query.size) url += `?${query}`;
    const headers = {};
    if (who.kind === "token") headers.authorization = `Bearer ${who.token}`;
    if (who.kind === "client") headers.authorization = `Basic ${btoa(String.fromCharCode(...new TextEncoder().encode(`${who.id}:${who.secret}`)))}`;
    if (body) headers["content-type"] = body.media;
    const started = performance.now();
    try {
      const response = await fetch(url, { method: method.toUpperCase(), headers, body: text?.value, credentials: "omit", cache: "no-store" });
      const answer = await response.text();
      let shown = answer;
      try {
        shown = JSON.stringify(JSON.parse(answer), null, 2);
      } catch {
        // Not JSON: as it is.
      }
      result.replaceChildren(h("p", { class: "sub" }, `${response.status} ${response.statusText} in ${Math.round(performance.now() - started)} ms`), h("pre", {}, shown.slice(0, 100_000)));
    } catch (error) {
      result.replaceChildren(h("p", { class: "problem" }, `The router cannot be reached: ${error.message}`));
    }
  }
  return h("form", { class: "try", onsubmit: send },
    inputs.map(([one, input]) => h("label", {}, h("code", {}, one.name), one.required ? "" : " (optional)", input)),
    text ? h("label", {}, `Body, ${body.media}`, text) : null,
    h("div", {}, h("button", { type: "submit", class: "main" }, "Send")), result);
}

function callBox(method, path, operation) {
  const body = bodyOf(operation);
  const parameters = (operation.parameters ?? []).filter((one) => one.name !== "x-request-id");
  const streams = Object.values(operation.responses ?? {}).some((response) => response.content?.["text/event-stream"]) || path === "/ws";
  return h("section", { class: "sheet call", id: anchor(method, path) },
    h("header", {}, h("span", { class: `method ${method}` }, method.toUpperCase()), h("h2", {}, h("code", {}, path)), h("span", { class: "end sub" }, security(operation).text)),
    h("div", { class: "body" },
      h("p", {}, h("strong", {}, prose(operation.summary))),
      operation.description ? h("p", { class: "text" }, prose(operation.description)) : null,
      h("h3", {}, "With curl"), copyable(curl(method, path, operation, body)),
      parameters.length ? [h("h3", {}, "Parameters"), h("div", { class: "scroll" }, h("table", {}, h("tbody", {}, parameters.map((one) => h("tr", {},
        h("td", {}, h("code", {}, one.name)), h("td", { class: "sub" }, one.in), h("td", { class: "sub" }, typeOf(one.schema), " ", h("span", { class: "hint" }, bounds(resolve(one.schema)))), h("td", {}, prose(one.description)))))))] : null,
      body ? [h("h3", {}, `Body: ${Object.keys(operation.requestBody.content).join(" or ")}`), h("details", {}, h("summary", {}, typeOf(body.schema)), members(body.schema))] : null,
      h("h3", {}, "Answers"),
      Object.entries(operation.responses ?? {}).map(([status, response]) => {
        const content = Object.values(response.content ?? {})[0];
        const line = [h("strong", {}, status), " ", prose(response.description)];
        return content?.schema && refName(content.schema) !== "Problem" && members(content.schema)
          ? h("details", {}, h("summary", {}, line), members(content.schema)) : h("p", {}, line);
      }),
      streams ? null : h("details", {}, h("summary", {}, "Try it"), attempt(method, path, operation, body))));
}

function credentials() {
  const fields = h("div", { class: "who" });
  const input = (name, key, type) => h("label", {}, name, h("input", { type, autocomplete: "off", spellcheck: "false", value: who[key], oninput: (event) => { who[key] = event.target.value; } }));
  const kind = h("select", { onchange: () => { who.kind = kind.value; draw(); } },
    [["none", "nobody"], ["token", "the admin, or a client by token"], ["client", "a client by id and secret"]].map(([value, name]) => h("option", { value }, name)));
  function draw() {
    const chosen = h("label", {}, "Calls that you try are made as", kind);
    fields.replaceChildren(chosen, ...(who.kind === "token" ? [input("Token", "token", "password")] : []),
      ...(who.kind === "client" ? [input("Client id", "id", "text"), input("Secret", "secret", "password")] : []));
  }
  draw();
  return h("section", { class: "sheet" }, h("header", {}, h("h2", {}, "Credentials"), h("span", { class: "hint" }, "kept in this page only")), h("div", { class: "body" }, fields));
}

async function draw() {
  spec = await (await fetch("/openapi.json", { credentials: "omit" })).json();
  const byTag = new Map((spec.tags ?? []).map((tag) => [tag.name, { about: tag.description, calls: [] }]));
  for (const [path, item] of Object.entries(spec.paths)) {
    for (const method of ["get", "post", "patch", "delete"]) {
      if (!item[method]) continue;
      const tag = item[method].tags?.[0] ?? "other";
      if (!byTag.has(tag)) byTag.set(tag, { calls: [] });
      byTag.get(tag).calls.push([method, path, item[method]]);
    }
  }
  byId("nav").replaceChildren(...[...byTag].filter(([, { calls }]) => calls.length).flatMap(([tag, { calls }]) => [
    h("h2", { class: "tag" }, tag),
    ...calls.map(([method, path]) => h("a", { href: `#${anchor(method, path)}` }, h("span", { class: `method ${method}` }, method.toUpperCase()), h("code", {}, path))),
  ]));
  byId("main").replaceChildren(h("div", { class: "stack" },
    h("h1", {}, spec.info.title, " ", h("span", { class: "sub" }, spec.info.version)),
    h("p", { class: "intro" }, prose(spec.info.description)),
    credentials(),
    [...byTag].filter(([, { calls }]) => calls.length).map(([tag, { about, calls }]) => [
      h("h1", { class: "tag" }, tag), about ? h("p", { class: "sub" }, about) : null, calls.map((call) => callBox(...call))])));
  if (location.hash) byId(location.hash.slice(1))?.scrollIntoView();
}

draw().catch((error) => byId("main").replaceChildren(h("p", { class: "problem" }, `openapi.json cannot be read: ${error.message}`)));
