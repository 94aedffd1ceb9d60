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
/** Rows that are to be compared; the controller of their requests. */
let left = [];
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
  left = rows.filter((row) => some.includes(row) || left.includes(row));
  const text = taken ?? $("compare-text").value;
  $("compare-error").hidden = true;
  $("compare-status").textContent = "Comparing…";
  const number = left.length;
  let failure = null;
  while (left.length) {
    const [row] = left;
    try {
      row.show(await patches({ text, ...row.fields }, signal));
    } catch (error) {
      if (signal.aborted) return;
      failure = error;
      row.fail(error);
    }
    if (signal.aborted) return;
    // Other rules would fail in the same way, unless it is the rule that is wrong.
    left = failure && failure.status !== 400 ? [] : left.slice(1);
  }
  $("compare-error").hidden = failure === null;
  $("compare-error").textContent = failure?.message ?? "";
  $("compare-status").textContent = failure
    ? "Not all rules could be applied." : `Compared ${number} rule${number === 1 ? "" : "s"}.`;
}

$("compare-text").addEventListener("input", () => { taken = null; });
$("compare-form").addEventListener("submit", (event) => {
  event.preventDefault();
  compare();
});
