// Bytes of a text with their entropies and patches, and the characters that they form.

const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

export const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");

// Bytes that may follow each lead byte first, and the length of the character (Unicode, table 3-7).
function lead(byte) {
  if (byte < 0x80) return [1];
  if (byte >= 0xc2 && byte <= 0xdf) return [2, 0x80, 0xbf];
  if (byte >= 0xe0 && byte <= 0xef) {
    return [3, byte === 0xe0 ? 0xa0 : 0x80, byte === 0xed ? 0x9f : 0xbf];
  }
  if (byte >= 0xf0 && byte <= 0xf4) {
    return [4, byte === 0xf0 ? 0x90 : 0x80, byte === 0xf4 ? 0x8f : 0xbf];
  }
  return [0];
}

// Control characters have no shape, except those that lay out text.
const isControl = (byte) => (byte < 0x20 && byte !== 0x09 && byte !== 0x0a) || byte === 0x7f;

export class Doc {
  bytes = [];
  entropies = [];
  patchOf = [];
  /** Begin of each patch. */
  begins = [];
  /** Characters {begin, end, text}; `text` is null if the byte is part of no character. */
  tokens = [];
  /** Token of each byte; undefined while its character is incomplete. */
  tokenOf = [];
  numGiven = 0;
  hasEntropies = false;
  #pending = 0;
  #length = 0;

  add(byte, entropy, begins) {
    const index = this.bytes.length;
    if (begins || !index) this.begins.push(index);
    this.bytes.push(byte);
    this.entropies.push(entropy);
    this.hasEntropies ||= entropy !== null;
    this.patchOf.push(this.begins.length - 1);
    if (this.#pending) {
      const [, low, high] = lead(this.bytes[index - this.#pending]);
      const fits = this.#pending === 1 ? byte >= low && byte <= high : byte >> 6 === 2;
      if (fits) {
        if (++this.#pending === this.#length) this.#character(index + 1);
        return;
      }
      this.#invalid(index);
    }
    [this.#length] = lead(byte);
    this.#pending = 1;
    if (this.#length === 0 || isControl(byte)) this.#invalid(index + 1);
    else if (this.#length === 1) this.#character(index + 1);
  }

  /** Give up on an incomplete character at the end. */
  finish() {
    this.#invalid(this.bytes.length);
  }

  end(patch) {
    return this.begins[patch + 1] ?? this.bytes.length;
  }

  get text() {
    return decoder.decode(new Uint8Array(this.bytes));
  }

  #character(end) {
    const begin = end - this.#pending;
    this.#pending = 0;
    this.#push(begin, end, decoder.decode(new Uint8Array(this.bytes.slice(begin, end))));
  }

  #invalid(end) {
    for (let index = end - this.#pending; index < end; index++) this.#push(index, index + 1, null);
    this.#pending = 0;
  }

  #push(begin, end, text) {
    const token = { begin, end, text };
    this.tokens.push(token);
    for (let index = begin; index < end; index++) this.tokenOf[index] = token;
  }
}

export function fromPatches(found, numGiven = 0) {
  const doc = new Doc();
  doc.numGiven = numGiven;
  const begins = new Set(found.patches.map((patch) => patch.begin));
  found.bytes.forEach((byte, i) => doc.add(byte, found.entropies?.[i] ?? null, begins.has(i)));
  doc.finish();
  return doc;
}
