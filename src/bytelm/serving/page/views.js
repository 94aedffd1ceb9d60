// Views of a document: its text coloured by patch, a strip with a column for each byte, and the
// details of one patch. Output of models becomes text nodes only, never markup.

import { hex } from "./text.js";

const NUM_COLOURS = 4;
const COLUMN = 14; // pixels, as in style.css
const HIGHEST = Math.log(256);
const SHOWN_BYTES = 64;
// Scripts that are written from right to left.
const RTL = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

export function element(name, className, text) {
  const found = document.createElement(name);
  if (className) found.className = className;
  if (text !== undefined) found.textContent = text;
  return found;
}

const count = (number, one) => `${number.toLocaleString("en")} ${one}${number === 1 ? "" : "s"}`;

export class TextView {
  #patches = [];
  /** Whether a patch has a letter, the first of which says where its boundary is drawn. */
  #isDirected = [];
  #numTokens = 0;
  #selected = -1;

  /** With a `prefix` for ids, patches are the options of a list. */
  constructor(root, prefix) {
    this.root = root;
    this.prefix = prefix;
  }

  clear() {
    this.root.replaceChildren();
    this.root.removeAttribute("aria-activedescendant");
    this.#patches = [];
    this.#isDirected = [];
    this.#numTokens = 0;
    this.#selected = -1;
  }

  /** Show what was added to a document since the last call. */
  update(doc) {
    for (let index = this.#patches.length; index < doc.begins.length; index++) {
      const patch = element("span", `patch c${index % NUM_COLOURS}`);
      patch.dataset.patch = index;
      if (this.prefix) {
        patch.id = `${this.prefix}-${index}`;
        patch.setAttribute("role", "option");
        patch.setAttribute("aria-selected", "false");
      }
      this.#patches.push(patch);
      this.root.append(patch);
    }
    for (; this.#numTokens < doc.tokens.length; this.#numTokens++) {
      this.#add(doc, doc.tokens[this.#numTokens]);
    }
  }

  #add(doc, { begin, end, text }) {
    const last = doc.patchOf[end - 1];
    const isSplit = doc.patchOf[begin] !== last;
    // A character is shown once, with its last byte; its other patches get a mark.
    for (let index = begin; index < end - 1; index++) {
      if (doc.patchOf[index] !== last) {
        const mark = element("span", "part");
        mark.title = `byte ${hex(doc.bytes[index])} of a character that ends in a later patch`;
        this.#patches[doc.patchOf[index]].append(mark);
      }
    }
    const patch = this.#patches[last];
    if (text !== null && !this.#isDirected[last] && /\p{L}/u.test(text)) {
      this.#isDirected[last] = true;
      patch.classList.toggle("rtl", RTL.test(text));
    }
    let kind = end <= doc.numGiven ? "given" : "";
    if (text === null) kind += " hex";
    if (isSplit) kind += " split";
    const previous = patch.lastChild;
    const shown = text ?? `\\x${hex(doc.bytes[begin])}`;
    if (!kind && previous?.nodeType === Node.TEXT_NODE) previous.appendData(shown);
    else if (!kind) patch.append(shown);
    else if (kind === "given" && previous?.className === kind) previous.firstChild.appendData(shown);
    else patch.append(element("span", kind.trim(), shown));
  }

  select(index) {
    this.#patches[this.#selected]?.classList.remove("selected");
    this.#patches[this.#selected]?.setAttribute("aria-selected", "false");
    this.#selected = index;
    const patch = this.#patches[index];
    if (!patch) return;
    patch.classList.add("selected");
    patch.setAttribute("aria-selected", "true");
    this.root.setAttribute("aria-activedescendant", patch.id);
  }

  reveal() {
    this.#patches[this.#selected]?.scrollIntoView({ block: "nearest" });
  }

  /** The patch to which the target of an event belongs. */
  patchAt(target) {
    const patch = target.closest?.(".patch");
    return patch ? Number(patch.dataset.patch) : -1;
  }
}

// What stands for a byte under its bar.
function label(doc, index) {
  const token = doc.tokenOf[index];
  if (!token || (token.text !== null && index < token.end - 1)) return ["part", "·"];
  if (token.text === null) return ["hex", hex(doc.bytes[index])];
  return ["", { " ": "␣", "\n": "↵", "\t": "⇥" }[token.text] ?? token.text];
}

/** Columns of the bytes that are scrolled into view: a long text costs no more than a short one. */
export class StripView {
  #doc = null;
  #drawn = [0, 0];
  #threshold = null;
  #selected = -1;

  constructor(scroll, axisHigh) {
    this.scroll = scroll;
    this.track = scroll.firstElementChild;
    axisHigh.textContent = HIGHEST.toFixed(1);
    scroll.addEventListener("scroll", () => this.#draw(false));
    new ResizeObserver(() => this.#draw(false)).observe(scroll);
  }

  /** Show a document and a threshold in nats, or null. */
  update(doc, threshold, follows = false) {
    this.#doc = doc;
    this.#threshold = threshold;
    this.track.style.width = `${doc.bytes.length * COLUMN}px`;
    if (follows) this.scroll.scrollLeft = this.scroll.scrollWidth;
    this.#draw(true);
  }

  select(index) {
    this.#selected = index;
    this.#draw(true);
  }

  reveal() {
    const doc = this.#doc;
    const begin = doc.begins[this.#selected] * COLUMN;
    const end = doc.end(this.#selected) * COLUMN;
    const { scrollLeft, clientWidth } = this.scroll;
    if (begin < scrollLeft || end > scrollLeft + clientWidth) {
      this.scroll.scrollLeft = Math.max(begin - clientWidth / 3, 0);
    }
  }

  patchAt(target) {
    const column = target.closest?.(".column");
    return column ? this.#doc.patchOf[Number(column.dataset.byte)] : -1;
  }

  #draw(isChanged) {
    const doc = this.#doc;
    if (!doc) return;
    const { scrollLeft, clientWidth } = this.scroll;
    const first = Math.floor(scrollLeft / COLUMN);
    const last = Math.min(Math.ceil((scrollLeft + clientWidth) / COLUMN), doc.bytes.length);
    if (!isChanged && first >= this.#drawn[0] && last <= this.#drawn[1]) return;
    const margin = last - first;
    const begin = Math.max(first - margin, 0);
    const end = Math.min(last + margin, doc.bytes.length);
    this.#drawn = [begin, end];
    const drawn = document.createDocumentFragment();
    for (let index = begin; index < end; index++) drawn.append(this.#column(doc, index));
    if (this.#threshold !== null && doc.hasEntropies) {
      const line = element("div", "line");
      line.style.setProperty("--height", Math.min(Math.max(this.#threshold / HIGHEST, 0), 1));
      drawn.append(line);
    }
    this.track.replaceChildren(drawn);
  }

  #column(doc, index) {
    const patch = doc.patchOf[index];
    const column = element("div", `column c${patch % NUM_COLOURS}`);
    if (doc.begins[patch] === index) column.classList.add("begin");
    if (patch === this.#selected) column.classList.add("selected");
    column.dataset.byte = index;
    column.style.left = `${index * COLUMN}px`;
    if (doc.entropies[index] !== null) {
      const bar = element("div", "bar");
      bar.style.setProperty("--height", Math.min(doc.entropies[index] / HIGHEST, 1));
      column.append(bar);
    }
    const [kind, text] = label(doc, index);
    column.append(element("bdi", kind, text));
    return column;
  }
}

/** One sentence about a patch. */
export function summary(doc, index) {
  const begin = doc.begins[index];
  const entropy = doc.entropies[begin];
  const said = `Patch ${index + 1} of ${doc.begins.length}: ${count(doc.end(index) - begin, "byte")}`;
  return entropy === null ? said : `${said}, entropy ${entropy.toFixed(2)} nats before the first`;
}

/** Show the bytes of a patch, in hexadecimal and as text, and their entropies. */
export function describe(root, doc, index) {
  const begin = doc.begins[index];
  const end = doc.end(index);
  const table = element("table", "bytes");
  const rows = ["byte", "text", ...(doc.hasEntropies ? ["entropy"] : [])].map((name) => {
    const row = table.insertRow();
    const head = element("th", "", name);
    head.scope = "row";
    row.append(head);
    return row;
  });
  for (let at = begin; at < Math.min(end, begin + SHOWN_BYTES); at++) {
    rows[0].insertCell().textContent = hex(doc.bytes[at]);
    const [kind, text] = label(doc, at);
    rows[1].insertCell().append(element("bdi", kind, kind === "hex" ? "" : text));
    const entropy = doc.entropies[at];
    if (doc.hasEntropies) rows[2].insertCell().textContent = entropy?.toFixed(2) ?? "";
  }
  const parts = [element("p", "", `${summary(doc, index)}, from byte ${begin}.`)];
  const scroll = element("div", "scroll");
  scroll.append(table);
  parts.push(scroll);
  if (end - begin > SHOWN_BYTES) {
    parts.push(element("p", "hint", `${count(end - begin - SHOWN_BYTES, "more byte")} not shown.`));
  }
  root.replaceChildren(...parts);
}

/** Write 1234567 as 1.23 M. */
export function compact(number) {
  if (number === null || number === undefined) return "—";
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 })
    .format(number).replace(/([A-Z])$/, " $1");
}

/** What the patches of a text amount to: pairs of a name and a value. */
export function statistics({ bytes, patches, globalSteps, flops }) {
  const whole = (number) => number?.toLocaleString("en") ?? "—";
  return [
    ["Patches", whole(patches)],
    ["Global steps", whole(globalSteps)],
    ["Bytes per patch", patches ? (bytes / patches).toFixed(2) : "—"],
    ["FLOPs per byte", compact(flops)],
  ];
}
