// The comparison of patching rules on one text.

import { patches } from "./api.js";
import { fromPatches } from "./text.js";
import { TextView, element, statistics } from "./views.js";

const $ = (id) => document.getElementById(id);
/** Options of the rules, with what they are if the model's own rule does not say it. */
const OPTIONS = {
  static: { length: 4 },
  entropy: { threshold: 1.5 },
  monotonic: { increase: 0.3 },
  combined: { threshold: 1.5, increase: 0.3 },
};

let rows = [];
let comparing = null;
/** Bytes of the text, if it was taken from the output and not changed: they may be no UTF-8. */
let taken = null;

export function startComparing(card) {
  const own = card.patching;
  rows = card.patching_rules.map((kind) => new Row(kind, kind, own));
  if (own) rows.unshift(new Row(null, `${own.kind} (the model's own)`, own));
  $("rules").replaceChildren(...rows.map((row) => row.element));
  $("compared").replaceChildren(...rows.map((row) => row.section));
}

export function compareWith(doc) {
  taken = [...doc.bytes];
  $("compare-text").value = doc.text;
  compare();
}

class Row {
  /** `kind` is null for the model's own rule. */
  constructor(kind, title, own) {
    this.kind = kind;
    this.element = element("tr");
    const head = element("th", "", title);
    head.scope = "row";
    this.element.append(head);
    this.inputs = Object.entries(OPTIONS[kind] ?? {}).map(([name, value]) =>
      this.#input(name, own?.[name] ?? value));
    const settings = this.element.insertCell();
    settings.append(...this.inputs.map((input) => input.parentElement));
    this.cells = Array.from({ length: 4 }, () => {
      const cell = this.element.insertCell();
      cell.className = "number";
      cell.textContent = "—";
      return cell;
    });
    this.section = element("section", "card");
    this.text = element("div", "text");
    this.text.dir = "auto";
    this.section.append(element("h3", "", title), this.text);
    this.section.hidden = true;
    this.view = new TextView(this.text);
  }

  #input(name, value) {
    const label = element("label", "", `${name} `);
    const input = element("input");
    Object.assign(input, { type: "number", step: name === "length" ? "1" : "any", value, name });
    if (name === "length") input.min = 1;
    input.setAttribute("aria-label", `${name} of the ${this.kind} rule`);
    input.addEventListener("change", () => compare([this]));
    label.append(input);
    return input;
  }

  get fields() {
    const fields = this.kind === null ? {} : { rule: this.kind };
    for (const input of this.inputs) {
      if (input.value !== "") fields[input.name] = Number(input.value);
    }
    return fields;
  }

  show(found) {
    const doc = fromPatches(found);
    const numbers = statistics({
      bytes: doc.bytes.length,
      patches: found.patches.length,
      globalSteps: found.global_steps,
      flops: found.flops_per_byte,
    });
    numbers.forEach(([, value], i) => { this.cells[i].textContent = value; });
    this.view.clear();
    this.view.update(doc);
    this.section.hidden = false;
  }

  fail(error) {
    for (const cell of this.cells) cell.textContent = "—";
    this.text.replaceChildren(element("p", "error", error.message));
    this.section.hidden = false;
  }
}

/** Ask for the patches of some rules, one after the other: the server cuts one text at a time. */
async function compare(some = rows) {
  comparing?.abort();
  const { signal } = comparing = new AbortController();
  const text = taken ?? $("compare-text").value;
  $("compare-error").hidden = true;
  $("compare-status").textContent = "Comparing…";
  let numFailed = 0;
  for (const row of some) {
    try {
      row.show(await patches({ text, ...row.fields }, signal));
    } catch (error) {
      if (signal.aborted) return;
      numFailed += 1;
      row.fail(error);
      $("compare-error").textContent = error.message;
      $("compare-error").hidden = false;
      // The others would fail in the same way.
      if (error.status !== 400) break;
    }
  }
  $("compare-status").textContent = numFailed
    ? "Some rules could not be applied." : `Compared ${some.length} rules.`;
}

$("compare-text").addEventListener("input", () => { taken = null; });
$("compare-form").addEventListener("submit", (event) => {
  event.preventDefault();
  compare();
});
