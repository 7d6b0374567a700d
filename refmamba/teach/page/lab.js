// Experiments on the model: what a scale does to codes, what an outlier does to a scale, where two forwards part.
"use strict";

// The codes of x (rows, K) at some bits, with a scale for the whole, for each row, or for each group of columns; read back.
function coded(x, bits, granularity, group = 64) {
  const n = columns_of(x), width = { per_tensor: x.data.length, per_row: n, groups: group }[granularity];
  const q = new Float32Array(x.data.length), value = new Float32Array(x.data.length), high = largest_code(bits);
  let scales = 0;
  for (let start = 0; start < x.data.length; start += granularity === "groups" ? n : width) {
    const end = granularity === "groups" ? start + n : start + width;
    for (let from = start; from < end; from += width, scales++) {
      const part = x.data.slice(from, Math.min(from + width, end));
      const codes = code(tensor([part.length], part), bits, "x");
      q.set(codes.q.data, from);
      value.set(dequantize(codes).data, from);
    }
  }
  return { q, value: tensor(x.shape, value), scales, high };
}

// How codes lie over their range: counts from -high to high (at most 255 columns), how many are at the ends, how many are 0.
function histogram({ q, high }) {
  const counts = new Array(2 * high + 1).fill(0);
  for (const value of q) counts[value + high]++;
  return { counts, high, ends: (counts[0] + counts[2 * high]) / q.length, zero: counts[high] / q.length, used: counts.filter(Boolean).length };
}

// The error of an approximation, relative to a signal.
function relative_error(exact, approximate, reference = exact) {
  let error = 0, signal = 0;
  for (let i = 0; i < exact.length; i++) {
    error += (exact[i] - approximate[i]) ** 2;
    signal += reference[i] ** 2;
  }
  return Math.sqrt(error / signal);
}

// A checkpoint whose four linear layers' weights went through codes and back, in groups of columns: no scheme of the
// specification, an experiment of the page.
function in_groups(source, bits, group) {
  const read = (name) => (LINEAR_WEIGHTS.includes(kind_of(name)) ? coded(source.read(name), bits, "groups", group).value : source.read(name));
  return { ...source, read };
}

// Bits for each byte of a text: minus log2 of the probability of all its tokens but the first, over the bytes of those.
function bits_per_byte(model, tokenizer, tokens) {
  const { logits } = forward(model, tokens, null, "all"), scores = log_softmax(logits), n = columns_of(logits);
  let bits = 0;
  for (let t = 1; t < tokens.length; t++) bits -= scores.data[(t - 1) * n + tokens[t]] / Math.LN2;
  return bits / new TextEncoder().encode(tokenizer.decode(tokens.slice(1))).length;
}

// x (L, K) and w (rows, K) of one linear layer; channel's values are multiplied by 2^power; then the remedy; then codes.
function outlier(x, w, { channel, power, remedy, bits }) {
  const n = columns_of(x);
  const grown = scaled(x, (i) => (i % n === channel ? power : 0)), exact = real_matrix(grown, w);
  let [left, right] = [grown, w];
  if (remedy === "smooth") {
    const m = (y, j) => absmax_of(Float32Array.from({ length: rows_of(y) }, (_, i) => y.data[i * n + j]), 0, rows_of(y), "x");
    const k = Array.from({ length: n }, (_, j) => (m(grown, j) && m(w, j) ? Math.round(Math.log2(Math.sqrt(m(grown, j) / m(w, j)))) : 0));
    [left, right] = [scaled(grown, (i) => -k[i % n]), scaled(w, (i) => k[i % n])];
  }
  if (remedy === "hadamard") [left, right] = [rotate(grown, "x"), rotated(w)];
  const a = coded(left, bits, remedy === "per_token" ? "per_row" : "per_tensor"), b = coded(right, bits, "per_row");
  const ordinary = real_matrix(tensor(x.shape, x.data.map((value, i) => (i % n === channel ? 0 : value))), w);
  return { ...histogram(a), row: Array.from(a.q.slice(-n)), error: relative_error(exact, real_matrix(a.value, b.value), ordinary) };
}

// x wᵀ in float64, rounding aside.
function real_matrix(x, w) {
  const n = columns_of(x), rows = w.shape[0], y = new Float64Array(rows_of(x) * rows);
  for (let t = 0; t < rows_of(x); t++) multiply(w.data, n, 0, n, Float64Array.from(x.data.subarray(t * n, (t + 1) * n)), y.subarray(t * rows, (t + 1) * rows));
  return y;
}

// The state h of one layer after token t: (e, n), and how much of it each channel keeps, the mean of its Ā.
function state_of(recording, layer, t) {
  const [u, delta, A, B, C, D, ssm_state] = recording.made.get(`layers.${layer}.scan`).step.arguments;
  const first_tokens = (x) => tensor([t + 1, columns_of(x)], x.data.slice(0, (t + 1) * columns_of(x)));
  const [, h] = selective_scan(first_tokens(u), first_tokens(delta), A, first_tokens(B), first_tokens(C), D, ssm_state);
  const e = columns_of(u), n = columns_of(A), keeps = [];
  for (let c = 0; c < e; c++) {
    let sum = 0;
    for (let s = 0; s < n; s++) sum += exp_of(f(delta.data[t * e + c] * A.data[c * n + s]));
    keeps.push(sum / n);
  }
  return { h: h.data, channels: e, states: n, keeps };
}

// Two recordings of the same tokens, site by site: the relative error of b beside a, and the first element that differs.
function compare(a, b) {
  const rows = [];
  for (const site of b.sites) {
    const site_of_a = counterpart(a, b, site);
    if (!site_of_a) continue;
    const x = a.numbers(site_of_a), y = b.numbers(site), n = columns_of(x);
    let error = 0, signal = 0, first = null, p0 = null, q0 = null;
    for (let i = 0; i < x.data.length; i++) {
      const [t, c] = [Math.floor(i / n), i % n], p = stands_for(a, site_of_a, t, c), q = stands_for(b, site, t, c);
      if (first === null && p !== q) [first, p0, q0] = [i, p, q];
      error += (p - q) ** 2;
      signal += p ** 2;
    }
    rows.push({ site, operation: b.made.get(site).step.operation, error: signal ? Math.sqrt(error / signal) : 0, first: first === null ? null : [Math.floor(first / n), first % n], a: p0, b: q0 });
  }
  return rows;
}

// The checkpoint with one bit of one float16 weight turned over.
function flipped(source, name, index, bit) {
  const read = (parameter) => {
    const x = source.read(parameter);
    if (parameter === name) x.data[index] = HALVES[half_bits(x.data[index]) ^ (1 << bit)];
    return x;
  };
  return { ...source, read };
}

// float32 -> the bits of the same float16.
const half_bits = (value) => HALVES.findIndex((half) => Object.is(half, value));

// Where bits first differ between two recordings: {site, token, channel}, in how many sites they do, and of how many.
function first_break(a, b) {
  let first = null, broken = 0;
  for (const site of a.sites) {
    const x = a.numbers(site), y = b.numbers(site), at = x.data.findIndex((value, i) => !Object.is(value, y.data[i]));
    if (at >= 0) first ??= { site, token: Math.floor(at / columns_of(x)), channel: at % columns_of(x) };
    broken += at >= 0;
  }
  return { first, broken, sites: a.sites.length };
}
