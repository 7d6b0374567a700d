// A byte-level BPE tokenizer, as the tokenizers library reads it from tokenizer.json.
"use strict";

// Each byte as a printable character: those that are printable stay, the others follow from U+0100 on.
const BYTE_CHARACTERS = (() => {
  const printable = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : next++));
})();
const CHARACTER_BYTES = new Map(BYTE_CHARACTERS.map((character, b) => [character, b]));

// The library's \s is Unicode's White_Space (U+0085 is one, U+FEFF is none), and its \b knows Unicode's word characters.
// JavaScript's differ, so both are spelled out. GAP is white space that is no line feed. The file's own expression is
// '(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+(?!\S)|\s+
const SPACE = "\\p{White_Space}", GAP = `(?:(?!\\n)${SPACE})`;
const END_OF_WORD = "(?![\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}²³¹¼½¾])";
const PIECE = new RegExp(
  `'(?:s|t|re|ve|m|ll|d)${END_OF_WORD}| ?\\p{L}+| ?\\p{N}| ?[^${SPACE}\\p{L}\\p{N}]+|\\n+|${GAP}+(?!\\P{White_Space})|${SPACE}+`, "gu",
);

class Tokenizer {
  // json: tokenizer.json; special: {n_ids, ends, prefix}, what the command line takes from beside it.
  constructor(json, special) {
    this.vocabulary = new Map(Object.entries(json.model.vocab));
    this.ranks = new Map(json.model.merges.map((pair, rank) => [typeof pair === "string" ? pair : pair.join(" "), rank]));
    this.added = json.added_tokens.map(({ content, id }) => ({ content, id }));
    this.texts = [];
    for (const [text, id] of this.vocabulary) this.texts[id] = text;
    for (const { content, id } of this.added) this.texts[id] = content;
    Object.assign(this, special);
  }

  // Tokens of a text; an empty one becomes the prefix token. Throws for half of a surrogate pair, as the command line does.
  encode(text) {
    if (!text.isWellFormed()) throw new RefmambaError("the text has half of a character; give valid text");
    const tokens = [];
    for (let from = 0; from < text.length; ) {
      const [at, special] = this.next_added(text, from);
      for (const [piece] of text.slice(from, at).matchAll(PIECE)) tokens.push(...this.merge(piece));
      if (special) tokens.push(special.id);
      from = at + (special ? special.content.length : 0);
    }
    return tokens.length ? tokens : [this.prefix];
  }

  next_added(text, from) {
    let first = [text.length, null];
    for (const token of this.added) {
      const at = text.indexOf(token.content, from);
      if (at >= 0 && at < first[0]) first = [at, token];
    }
    return first;
  }

  // A piece's bytes, merged by the pair of the lowest rank, the leftmost first, until there is none.
  merge(piece) {
    const parts = Array.from(new TextEncoder().encode(piece), (b) => BYTE_CHARACTERS[b]);
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((part) => this.vocabulary.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  // The text of some tokens, special ones included. Broken UTF-8 becomes U+FFFD.
  decode(tokens) {
    const bytes = tokens.flatMap((token) => Array.from(this.texts[token] ?? "", (character) => CHARACTER_BYTES.get(character)));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
  }
}
