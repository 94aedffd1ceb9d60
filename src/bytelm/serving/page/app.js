// The page: forms, tabs, the stream of a completion, and the patches of its text.

import { complete, model, patches, setKey } from "./api.js";
import { compareWith, startComparing } from "./compare.js";
import { Doc, fromPatches } from "./text.js";
import { StripView, TextView, describe, element, statistics, summary } from "./views.js";

const $ = (id) => document.getElementById(id);
const DEFAULT_THRESHOLD = 1.5;
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens"];

const text = new TextView($("text"), "patch");
const strip = new StripView($("strip"), $("axis-high"));

let card = null;
let doc = new Doc();
let selected = -1;
/** Threshold that the slider was moved to; null for the model's own rule. */
let threshold = null;
let running = null;
let refreshing = null;

// Messages

function showError(error) {
  if (error.name === "AbortError") return;
  $("error").textContent = error.message;
  $("error").hidden = false;
  if (error.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

function clearError() {
  $("error").hidden = true;
  $("error").textContent = "";
}

// The model

async function loadModel() {
  try {
    card = await model();
  } catch (error) {
    showError(error);
    return;
  }
  clearError();
  $("key-form").hidden = true;
  $("model").textContent = card.id;
  setUpThreshold();
  startComparing(card);
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  loadModel().then(() => { if ($("key-form").hidden) $("prompt").focus(); });
});

// The threshold

/** Name of the option that the slider sets, or null. */
function thresholdName() {
  const own = card?.patching;
  if (!own) return card?.patching_rules.includes("entropy") ? "threshold" : null;
  return ["threshold", "increase"].find((name) => name in own) ?? null;
}

const ownThreshold = () => card?.patching?.[thresholdName()] ?? null;

function setUpThreshold() {
  const name = thresholdName();
  $("threshold-row").hidden = name === null;
  if (name === null) return;
  const isModels = card.patching !== null;
  if (!isModels) threshold = DEFAULT_THRESHOLD;
  $("threshold-label").textContent = name === "increase" ? "Increase" : "Threshold";
  $("threshold-reset").hidden = !isModels;
  const slider = $("threshold");
  const own = ownThreshold() ?? DEFAULT_THRESHOLD;
  slider.min = Math.floor(Math.min(0, own));
  slider.max = Math.ceil(Math.max(6, own));
  showThreshold();
}

function showThreshold() {
  const value = threshold ?? ownThreshold();
  if (value === null) return;
  $("threshold").value = value;
  const said = `${value.toFixed(2)} nats`;
  $("threshold").setAttribute("aria-valuetext", said);
  $("threshold-value").textContent = threshold === null ? `${said} (the model's own)` : said;
  $("threshold-reset").disabled = threshold === null || running !== null;
}

let waiting = 0;

function moveThreshold(value) {
  threshold = value;
  showThreshold();
  clearTimeout(waiting);
  waiting = setTimeout(() => refresh().then((found) => {
    if (found) $("status").textContent = `${said(found)} at ${$("threshold-value").textContent}.`;
  }), 120);
}

const said = (found) =>
  `${found.patches.length} patches, ${found.patch_size.toFixed(2)} bytes per patch`;

$("threshold").addEventListener("input", (event) => moveThreshold(Number(event.target.value)));
$("threshold-reset").addEventListener("click", () => {
  moveThreshold(null);
  $("threshold").focus();
});

/** Fields of a request for patches, or null if the model has no rule to apply. */
function patchFields(value) {
  if (!card) return {};
  if (!card.patching) return thresholdName() && { rule: "entropy", threshold: value };
  return value === null ? {} : { [thresholdName()]: value };
}

/** Ask for the patches of all of the text, and show them. */
async function refresh() {
  refreshing?.abort();
  const fields = patchFields(threshold);
  if (running || !doc.bytes.length || !fields) return null;
  const controller = refreshing = new AbortController();
  try {
    const found = await patches({ text: doc.bytes, ...fields }, controller.signal);
    if (running || controller.signal.aborted) return null;
    const at = selected >= 0 ? doc.begins[selected] : -1;
    const { numGiven } = doc;
    doc = fromPatches(found, numGiven);
    const { scrollTop } = $("text");
    text.clear();
    draw(found);
    $("text").scrollTop = scrollTop;
    select(at >= 0 ? doc.patchOf[at] : -1);
    return found;
  } catch (error) {
    showError(error);
    return null;
  }
}

// Views

/** Draw what is new; with the cost of the text if it is known. */
function draw(found) {
  const box = $("text");
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
  const isPatched = found !== undefined || doc.begins.length > 1;
  box.classList.toggle("plain", !isPatched);
  text.update(doc);
  if (running && isAtEnd) box.scrollTop = box.scrollHeight;
  const line = found ? found.threshold : card?.patching ? card.patching.threshold ?? null : null;
  strip.update(doc, line, running !== null);
  $("strip-title").textContent = doc.hasEntropies
    ? `Entropy of each byte${line === null ? "" : `, with the threshold at ${line.toFixed(2)} nats`}`
    : "Bytes";
  if (!running) $("plain").textContent = doc.text;
  const pairs = statistics({
    bytes: doc.bytes.length,
    patches: isPatched ? doc.begins.length : null,
    globalSteps: found ? found.global_steps : card?.has_patches ? doc.begins.length : null,
    flops: found?.flops_per_byte,
  });
  showStatistics([["Bytes", doc.bytes.length.toLocaleString("en")], ...pairs]);
}

function showStatistics(pairs) {
  $("stats").replaceChildren(...pairs.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    return pair;
  }));
}

function select(index, isByKey = false) {
  selected = index < doc.begins.length ? index : -1;
  text.select(selected);
  strip.select(selected);
  if (selected < 0) {
    $("detail-body").replaceChildren(element("p", "hint", "No patch is selected."));
    return;
  }
  describe($("detail-body"), doc, selected);
  if (isByKey) {
    text.reveal();
    $("patch-said").textContent = summary(doc, selected);
  }
}

function pointAt(view, isStrip) {
  return (event) => {
    const index = view.patchAt(event.target);
    if (index < 0 || index === selected) return;
    select(index);
    if (!isStrip) strip.reveal();
  };
}

for (const kind of ["mouseover", "click"]) {
  $("text").addEventListener(kind, pointAt(text, false));
  $("strip").addEventListener(kind, pointAt(strip, true));
}

$("text").addEventListener("focus", () => {
  if (selected < 0 && doc.bytes.length) select(0, true);
});

$("text").addEventListener("keydown", (event) => {
  const last = doc.begins.length - 1;
  const moves = {
    ArrowRight: selected + 1, ArrowDown: selected + 1, ArrowLeft: selected - 1,
    ArrowUp: selected - 1, PageDown: selected + 10, PageUp: selected - 10, Home: 0, End: last,
  };
  if (!(event.key in moves) || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(Math.min(Math.max(moves[event.key], 0), last), true);
  strip.reveal();
});

// Generation

function samplingFields() {
  const fields = {};
  for (const name of SAMPLING) if ($(name).value !== "") fields[name] = Number($(name).value);
  // Chosen here so that it can be shown, and the text generated again.
  fields.seed = $("seed").value === ""
    ? crypto.getRandomValues(new Uint32Array(1))[0] : Number($("seed").value);
  return fields;
}

function setRunning(controller) {
  const from = document.activeElement;
  running = controller;
  const isRunning = controller !== null;
  $("stop").disabled = !isRunning;
  $("threshold").disabled = isRunning;
  if (isRunning && from === $("start")) $("stop").focus();
  $("start").disabled = isRunning;
  if (!isRunning && from === $("stop")) $("start").focus();
  $("output").setAttribute("aria-busy", isRunning);
  showThreshold();
}

async function promptPatches(prompt, signal) {
  const fields = patchFields(card?.patching ? null : threshold);
  if (!prompt) return null;
  if (fields) return patches({ text: prompt, ...fields }, signal);
  return { bytes: [...new TextEncoder().encode(prompt)], patches: [] };
}

async function generate() {
  if (running) return;
  if (!card) await loadModel();
  if (!card || running) return;
  clearError();
  refreshing?.abort();
  const controller = new AbortController();
  setRunning(controller);
  const { signal } = controller;
  const prompt = $("prompt").value;
  const fields = samplingFields();
  $("status").textContent = "Generating…";
  let end = null;
  const counts = { generated: 0 };
  try {
    // Both are under way at once; the text begins with the prompt.
    const prompted = promptPatches(prompt, signal);
    prompted.catch(() => {});
    let isShown = false;
    for await (const choice of complete({ prompt, ...fields }, signal)) {
      if (!isShown) begin(await prompted);
      isShown = true;
      for (const one of choice.trace) doc.add(one.byte, one.entropy, one.begins_patch);
      counts.generated += choice.trace.length;
      end = choice.finish_reason ?? end;
      scheduleDraw();
    }
    $("status").textContent = ending(end, counts.generated, fields.seed);
  } catch (error) {
    controller.abort();
    $("status").textContent = error.name === "AbortError"
      ? `Stopped after ${counts.generated} bytes.` : "";
    showError(error);
  }
  setRunning(null);
  if (counts.generated || end) {
    doc.finish();
    draw();
    $("take-output").disabled = !doc.bytes.length;
    await refresh();
  }
}

const ending = (reason, number, seed) =>
  `Done: ${number} bytes with seed ${seed}, ${
    reason === "stop" ? "to the end of the document" : "as many as were asked for"}.`;

function begin(prompted) {
  doc = prompted ? fromPatches(prompted) : new Doc();
  doc.numGiven = doc.bytes.length;
  text.clear();
  $("output").hidden = false;
  select(-1);
  draw();
}

let isScheduled = false;

function scheduleDraw() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => {
    isScheduled = false;
    if (running) draw();
  });
}

$("generate-form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("generate-form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

// Tabs

const tabs = [$("tab-generate"), $("tab-compare")];

function showTab(tab) {
  if (card) clearError();
  for (const one of tabs) {
    one.setAttribute("aria-selected", one === tab);
    one.tabIndex = one === tab ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
}

for (const tab of tabs) {
  tab.addEventListener("click", () => showTab(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[1 - tabs.indexOf(tab)];
    showTab(other);
    other.focus();
  });
}

$("take-output").addEventListener("click", () => compareWith(doc));

loadModel();
