// Secrets are shown once, in a dialog that says so.

import { dialog, h } from "./dom.js";

/** Shows `secrets` ({name: value}, absent ones skipped) until it is closed. `note` says what else there is to know. */
export function onceDialog(title, secrets, note) {
  return dialog((close) => h("div", { class: "inner" },
    h("h1", {}, title),
    Object.entries(secrets).filter(([, value]) => value).map(([name, value]) => {
      const copy = h("button", { type: "button", onclick: async () => {
        try {
          await navigator.clipboard.writeText(value);
          copy.textContent = "Copied";
        } catch {
          copy.textContent = "Select it";
        }
      } }, "Copy");
      return h("div", {}, h("h2", {}, name), h("div", { class: "once" }, h("code", {}, value), copy));
    }),
    h("p", { class: "sub" }, note ?? "Shown here and never again: hand it to the client now. A lost secret is rotated, not recovered."),
    h("div", { class: "end" }, h("button", { type: "button", class: "main", onclick: () => close() }, "Done"))));
}
