// The formulas of docs/SPEC.md as MathML. Each is one function of its letters: called with symbols it is the formula, called
// with numbers the same formula with one element's numbers in it.
"use strict";

const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// A text as MathML: words, numbers and signs; what stands in ${} is MathML already.
function math(strings, ...values) {
  const written = (text) =>
    text.replace(/([\p{L}\p{M}]+′?)|([\d.]+)|(\s+)|(.)/gu, (_, word, number, space, sign) =>
      word ? `<mi>${word}</mi>` : number ? `<mn>${number}</mn>` : space ? "" : `<mo>${escaped(sign)}</mo>`);
  return `<mrow>${strings.map((text, i) => written(text) + (values[i] ?? "")).join("")}</mrow>`;
}
const fraction = (a, b) => `<mfrac>${a}${b}</mfrac>`;
const root = (a) => `<msqrt>${a}</msqrt>`;
const power = (a, b) => `<msup>${a}${b}</msup>`;
const two = (b) => power("<mn>2</mn>", b);
const below = (a, b) => `<msub>${a}${b}</msub>`;

// A letter of a formula: "s_x" has an index.
function symbol(name) {
  const [letter, index] = name.split("_"), letters = { delta: "δ", eps: "ε", acc: "acc" };
  const written = `<mi>${letters[letter] ?? letter}</mi>`;
  return index ? below(written, `<mi>${letters[index] ?? index}</mi>`) : written;
}

// A float32 in the fewest digits that read back to it; whole numbers as they are.
function digits(x) {
  if (Number.isInteger(x) && Math.abs(x) < 1e16) return x.toLocaleString("en").replaceAll(",", "\u202f");
  if (Math.fround(x) !== x) return String(Number(x.toPrecision(9)));
  for (let n = 1; n <= 9; n++) if (Math.fround(Number(x.toPrecision(n))) === x) return String(Number(x.toPrecision(n)));
  return String(x);
}

function number(x) {
  const [mantissa, exponent] = digits(Math.abs(x)).split("e");
  const written = exponent ? math`${`<mn>${mantissa}</mn>`}·${power("<mn>10</mn>", `<mn>${Number(exponent)}</mn>`)}` : `<mn>${mantissa}</mn>`;
  return x < 0 ? `<mrow><mo>(</mo><mo form="prefix" lspace="0" rspace="0">−</mo>${written}<mo>)</mo></mrow>` : written;
}

const product_sum = (v) => math`acc = ${v("q_0")} · ${v("w_0")} + ${v("q_1")} · ${v("w_1")} + … , ${v("K")} ${"<mtext>&nbsp;products</mtext>"}`;

// name -> {equation, title, says, math(v, e)}: v(letter) is MathML; e has the raw values where the form depends on them.
const FORMS = {
  embed: { equation: "15", title: "look up the embedding", says: "The row of the token, as it is in the checkpoint.", math: (v) => math`x = row(${v("t")})` },
  dequantize: { equation: "9", title: "read a code back", says: "One float32 division; the codes were made once, or an operation ago.", math: (v) => math`x̂ = ${fraction(v("q"), v("s"))}` },
  rms_norm: {
    equation: "16", title: "normalize", says: "S is the tree sum of the squares of all channels of this token.",
    math: (v) => math`y = ${fraction(v("x"), root(math`${fraction(v("S"), v("d"))} + ${v("eps")}`))} · ${v("w")}`,
  },
  code: {
    equation: "7, 8", title: "make a code", says: "The largest magnitude m gets the largest code Q; everything else is rounded to a whole number of steps.",
    math: (v) => math`s = ${fraction(v("Q"), v("m"))} , q = rint(clamp(${v("x")} · ${v("s")}, −${v("Q")}, ${v("Q")}))`,
  },
  code_static: {
    equation: "7, 8", title: "make a code, scale from calibration", says: "The scale was fixed on another text: what is larger than that saturates.",
    math: (v) => math`q = rint(clamp(${v("x")} · ${v("s")}, −${v("Q")}, ${v("Q")}))`,
  },
  fixed_point: {
    equation: "10", title: "write in fixed point", says: "This scheme does not quantize this input: 31 bits with a power of two for the token, so that the product is a product of integers all the same.",
    math: (v) => math`e = min(126, ${v("M")} − ${v("E")}) , q = rint(${v("x")} · ${two(v("e"))})`,
  },
  code_flattened: {
    equation: "33", title: "make a code that may be wide", says: "The scale is that of a threshold from calibration; a larger value has a larger code, as if its channel were split.",
    math: (v) => math`q = rint(${v("x")} · ${v("s")})`,
  },
  rotate: {
    equation: "31", title: "rotate", says: "Every channel of the block is added or subtracted, by the rows of Hadamard's matrix: an outlier is spread over all n of them, in whole numbers.",
    math: (v) => math`x′ = ${v("x_0")} + ${v("x_1")} + … , n = ${v("n")}`,
  },
  integer_product: {
    equation: "11", title: "multiply and add whole numbers", says: "Every product and every partial sum is a whole number that float64 holds exactly, so the order does not matter.",
    math: product_sum,
  },
  wide_product: {
    equation: "12", title: "multiply and add in fixed point", says: "Both factors are wide, so the weight is split into 4096 · high + low: two exact sums, joined with one rounding in float64.",
    math: product_sum,
  },
  rescale: {
    equation: "13", title: "turn the sum into its value", says: "Powers of two first, which is exact; one rounding to float32; one division by the scales.",
    math: (v, e) => {
      const above = math`float32(${v("acc")} · ${two(math`−${v("e_x")}`)} · ${two(math`−${v("e_w")}`)})`;
      const scales = [e.s_x !== null && v("s_x"), e.s_w !== null && v("s_w")].filter(Boolean);
      return scales.length ? math`y = ${fraction(above, scales.length > 1 ? math`${scales[0]} · ${scales[1]}` : scales[0])}` : math`y = ${above}`;
    },
  },
  divide_channels: { equation: "29", title: "smooth", says: "SmoothQuant: the channel is divided by a power of two, and the weight's column was multiplied by it.", math: (v) => math`x′ = ${v("x")} · ${two(math`−${v("k")}`)}` },
  conv1d: {
    equation: "17", title: "convolve", says: "This channel's last inputs, oldest first, each times its tap; then the bias.",
    math: (v, e) => e.terms.map((_, i) => math`${v(`x_${i}`)} · ${v(`w_${i}`)}`).reduce((a, b) => math`${a} + ${b}`) + (e.b === null ? "" : math`+ ${v("b")}`),
  },
  silu: { equation: "5", title: "silu", says: "exp is the specification's own polynomial, the same bits everywhere.", math: (v) => math`u = ${fraction(v("x"), math`1 + exp(−${v("x")})`)}` },
  step_size: { equation: "18, 4", title: "the step δ", says: "How far time moves for this channel at this token: a large step forgets more and takes in more.", math: (v) => math`${symbol("delta")} = softplus(${v("dt")} + ${v("b")})` },
  selective_scan: {
    equation: "20, 21, 22", title: "scan", says: "Each state of the channel fades by Ā and takes in B̄u; C reads them out, D lets u past. The rows below are the states.",
    math: (v) => math`h ← Ā · h + B̄u , y = tree(C · h) + D · u = ${v("sum")} + ${v("D")} · ${v("u")}`,
  },
  gate: { equation: "23", title: "gate", says: "The other half of in_proj's output decides how much of the channel passes.", math: (v) => math`${v("y")} · silu(${v("z")})` },
  add: { equation: "24", title: "add", says: "One float32 addition.", math: (v) => math`${v("x")} + ${v("y")}` },
};

function formula(form, values) {
  const entry = FORMS[form];
  const flat = { ...values };
  values.terms?.forEach(([a, b], i) => Object.assign(flat, { [`x_${i}`]: a, [`w_${i}`]: b }));
  const wrap = (inner) => `<math display="block">${inner}</math>`;
  const put = (name) => (flat[name] === null || flat[name] === undefined ? symbol(name) : number(flat[name]));
  return { symbols: wrap(entry.math(symbol, values)), numbers: wrap(entry.math(put, values)) };
}
