// The API, as an admin. The token lives in this tab's sessionStorage and goes nowhere but to this origin.

const KEY = "backbone-admin-token";

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  clear: () => sessionStorage.removeItem(KEY),
};

/** A refusal: the members of the problem, ready to be shown. */
export class Problem extends Error {
  constructor(status, body) {
    super(body?.detail ?? body?.title ?? `the router answered ${status}`);
    this.status = status;
    this.code = body?.code;
    this.detail = this.message;
    this.errors = body?.errors;
  }
}

const headers = () => ({ authorization: `Bearer ${token.get() ?? ""}` });

async function refused(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // Not from the router: something in between. The status says enough.
  }
  return new Problem(response.status, body);
}

/** A call of the API. Resolves to the body; throws a Problem. */
export async function call(method, path, body) {
  const type = method === "PATCH" ? "application/merge-patch+json" : "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: body === undefined ? headers() : { ...headers(), "content-type": type },
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      credentials: "omit",
    });
  } catch {
    throw new Problem(0, { detail: "the router cannot be reached" });
  }
  if (!response.ok) throw await refused(response);
  return response.status === 204 ? null : response.json();
}

export const path = (...parts) => "/" + parts.map(encodeURIComponent).join("/");

/** The feed says something every second. After so long a silence it is lost, whatever the connection looks like. */
const SILENCE_MS = 8000;

/**
 * The feed: server-sent events, read by fetch because EventSource cannot send a header. `query()` says what is wanted.
 * Comes back by itself; `onState` hears "live", "lost" or a Problem that no retry mends. Returns a function that ends it.
 */
export function feed(query, onEvent, onState) {
  const ended = new AbortController();
  const run = async () => {
    let wait = 500;
    while (!ended.signal.aborted) {
      const silence = new AbortController();
      let timer = setTimeout(() => silence.abort(), SILENCE_MS);
      const alive = (name, data) => {
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), SILENCE_MS);
        onEvent(name, data);
      };
      try {
        const response = await fetch(`/console/feed?${new URLSearchParams(query())}`, {
          headers: headers(), signal: AbortSignal.any([ended.signal, silence.signal]), cache: "no-store", credentials: "omit",
        });
        if (!response.ok) {
          const problem = await refused(response);
          if (response.status < 500 && response.status !== 429) {
            if (!ended.signal.aborted) onState(problem);
            return;
          }
          throw problem;
        }
        onState("live");
        wait = 500;
        await read(response.body, alive);
      } catch {
        // Lost or refused for now; shown below and tried again.
      } finally {
        clearTimeout(timer);
      }
      if (ended.signal.aborted) return;
      onState("lost");
      await new Promise((resolve) => setTimeout(resolve, wait));
      wait = Math.min(wait * 2, 10_000);
    }
  };
  run();
  return () => ended.abort();
}

async function read(body, onEvent) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      let name = "message";
      let data = "";
      for (const line of event.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (data) onEvent(name, JSON.parse(data));
    }
  }
}
