// The specification (docs/SPEC.md) in JavaScript, in the document's order: the same bits as every other backend.
//
// A JavaScript number is a float64. Math.fround rounds it to float32, and one operation on float32 values inside one
// Math.fround is float32's own result (53 >= 2 * 24 + 2 bits), so it stands around every single operation below. Integers
// are exact in float64 up to 2^53; no 32-bit operator touches a sum. The operations bear the specification's names.
//
// A tensor is {shape, data}: data is a Float32Array, an array of integers, or a Float64Array, in C order.
"use strict";

const f = Math.fround;

class NonFiniteError extends Error {}
class RefmambaError extends Error {}

const tensor = (shape, data) => ({ shape, data });
const size = (shape) => shape.reduce((a, b) => a * b, 1);
const map = (x, operation) => tensor(x.shape, x.data.map(operation)); // of a Float32Array: each result is stored as float32
const floats = (shape) => tensor(shape, new Float32Array(size(shape)));

// ---------------------------------------------------------------------------------------------- 1. Arithmetic

const float_view = new Float32Array(1);
const bits_view = new Int32Array(float_view.buffer);

function bits_of(x) {
  float_view[0] = x;
  return bits_view[0];
}

function float_of(bits) {
  bits_view[0] = bits;
  return float_view[0];
}

// 2^n in float64, -1022 <= n <= 1023. Each doubling is exact.
const POWERS = new Float64Array(2046);
for (let n = 0, up = 1, down = 1; n < 1024; n++, up *= 2, down /= 2) {
  POWERS[1022 + n] = up;
  if (n < 1023) POWERS[1022 - n] = down;
}
const two_to = (n) => POWERS[1022 + n];

// The nearest integer, ties to even, for |x| <= 2^51: Math.round takes ties upwards. Never gives -0.
const rint = (x) => x + 6755399441055744 - 6755399441055744;

const LOG2_E = float_of(0x3fb8aa3b), LN2_HIGH = float_of(0x3f317200), LN2_LOW = float_of(0x35bfbe8e);
const EXP_LOW = float_of(0xc2aeac08 | 0), EXP_HIGH = float_of(0x42b171aa);
const [E0, E1, E2, E3, E4] = [0x3ab5121a, 0x3c091cf1, 0x3d2aac79, 0x3e2aaa49, 0x3efffffe].map(float_of);
const L = [0xbd9c5b57, 0x3e02ae2a, 0xbe06c2bc, 0x3e116d01, 0xbe2a391e, 0x3e4cd005, 0xbe800114, 0x3eaaaaaa].map((b) => float_of(b | 0));
const SQRT_HALF_BITS = 0x3f3504f3;

// (1)
function exp_of(x) {
  if (!(x >= EXP_LOW)) return x < EXP_LOW ? 0 : NaN;
  if (x > EXP_HIGH) return Infinity;
  const n = rint(f(x * LOG2_E));
  const r = f(f(x - f(n * LN2_HIGH)) - f(n * LN2_LOW));
  let p = f(f(E0 * r) + E1);
  p = f(f(p * r) + E2);
  p = f(f(p * r) + E3);
  p = f(f(p * r) + E4);
  p = f(f(f(p * f(r * r)) + r) + 1);
  const half = n >> 1; // 2^128 is no float32, so two factors
  return f(f(p * two_to(half)) * two_to(n - half));
}

// (2)
function log_of(x) {
  if (x === 0) return -Infinity;
  if (!(x > 0)) return NaN;
  if (x === Infinity) return x;
  const subnormal = x < two_to(-126);
  const bits = bits_of(subnormal ? f(x * two_to(25)) : x);
  const k = (bits - SQRT_HALF_BITS) >> 23;
  const m = f(float_of(bits - (k << 23)) - 1);
  const n = subnormal ? k - 25 : k;
  const s = f(m * m);
  let p = L[0];
  for (let i = 1; i < 8; i++) p = f(f(p * m) + L[i]);
  const y = f(f(f(f(f(p * m) * s) + f(n * LN2_LOW)) - f(0.5 * s)) + m);
  return f(y + f(n * LN2_HIGH));
}

// (3)
function log1p_of(y) {
  const u = f(1 + y);
  return f(log_of(u) + f(f(y - f(u - 1)) / u));
}

// (4)
function softplus_of(x) {
  if (x > 20) return x;
  return f(Math.max(x, 0) + log1p_of(exp_of(-Math.abs(x))));
}

// (5)
const silu_of = (x) => f(x / f(1 + exp_of(-x)));

function exp(x) { return map(x, exp_of); }
function log(x) { return map(x, log_of); }
function log1p(y) { return map(y, log1p_of); }
function softplus(x) { return map(x, softplus_of); }
function silu(x) { return map(x, silu_of); }

// (6) of terms[0 .. width): width is a power of two, what lies behind the last value is +0. The terms are used up.
function tree(terms, width) {
  while (width > 1) {
    width /= 2;
    for (let i = 0; i < width; i++) terms[i] = f(terms[i] + terms[i + width]);
  }
  return terms[0];
}

function power_of_two(n) {
  let width = 1;
  while (width < n) width *= 2;
  return width;
}

// Over the last axis.
function tree_sum(x) {
  const n = x.shape.at(-1), y = floats(x.shape.slice(0, -1)), width = power_of_two(n), terms = new Float32Array(width);
  for (let row = 0; row < y.data.length; row++) {
    terms.fill(0);
    terms.set(x.data.subarray(row * n, (row + 1) * n));
    y.data[row] = tree(terms, width);
  }
  return y;
}

// ---------------------------------------------------------------------------------------- 2. Codes and products
//
// Codes are {q, scale, bits}: q a tensor of whole numbers (in a Float32Array, the fastest to multiply), scale a tensor of
// the shape [] (one) or [rows, 1]. With steps for groups of columns (30), {q, scale, bits, steps, group}: q * step stands under the scale. Fixed-point
// codes are {q, exponent}: q a tensor of int32, exponent an Int32Array tensor.

const ABSMAX_ZERO = two_to(-100);
const ACTIVATION_BITS = 30, WEIGHT_BITS = 22, LOW_PART = 4096, BLOCK = 4096, STEPPED = 126;

const largest_code = (bits) => two_to(bits - 1) - 1;
const columns_of = (x) => x.shape.at(-1);
const rows_of = (x) => x.data.length / columns_of(x);

// (7) of data[from .. to)
function absmax_of(data, from, to, site) {
  let m = 0;
  for (let i = from; i < to; i++) {
    const a = Math.abs(data[i]);
    if (!(a < Infinity)) throw new NonFiniteError(`${site}: a value is NaN or infinite, so it has no codes`);
    if (a > m) m = a;
  }
  return m < ABSMAX_ZERO ? 0 : m;
}

function absmax(x, site, granularity = "per_tensor") {
  if (granularity === "per_tensor") return tensor([], Float32Array.of(absmax_of(x.data, 0, x.data.length, site)));
  const m = floats([rows_of(x), 1]), n = columns_of(x);
  for (let row = 0; row < m.data.length; row++) m.data[row] = absmax_of(x.data, row * n, (row + 1) * n, site);
  return m;
}

// (7)
function scale_of(m, bits) {
  return map(m, (value) => (value === 0 ? 1 : f(largest_code(bits) / value)));
}

// (8). scale: one, or one for each row.
function quantize(x, scale, bits) {
  const q = floats(x.shape), high = largest_code(bits), n = scale.shape.length ? columns_of(x) : x.data.length;
  for (let from = 0, row = 0; from < x.data.length; from += n, row++) {
    const s = scale.data[row];
    for (let i = from; i < from + n; i++) {
      const y = f(x.data[i] * s);
      q.data[i] = rint(y > high ? high : y < -high ? -high : y);
    }
  }
  return q;
}

// What a product is of: q, times its group's step where there are steps; made once for a matrix.
function integers(codes) {
  if (!codes.steps) return codes.q;
  if (!codes.stepped) {
    const n = columns_of(codes.q), groups = columns_of(codes.steps);
    codes.stepped = floats(codes.q.shape);
    for (let row = 0, i = 0; row < rows_of(codes.q); row++) {
      for (let j = 0; j < n; j++, i++) codes.stepped.data[i] = codes.q.data[i] * codes.steps.data[row * groups + Math.floor(j / codes.group)];
    }
  }
  return codes.stepped;
}

// (9)
function dequantize(codes) {
  const q = integers(codes), { scale } = codes, x = floats(q.shape), n = scale.shape.length ? columns_of(q) : q.data.length;
  for (let i = 0; i < x.data.length; i++) x.data[i] = f(q.data[i] / scale.data[scale.shape.length ? (i / n) | 0 : 0]);
  return x;
}

function code(x, bits, site, granularity = "per_tensor") {
  const scale = scale_of(absmax(x, site, granularity), bits);
  return { q: quantize(x, scale, bits), scale, bits };
}

// The scale of a calibrated absolute maximum: larger values saturate.
function code_static(x, static_absmax, bits, site) {
  absmax(x, site);
  const m = map(static_absmax, (value) => (value < ABSMAX_ZERO ? 0 : value)), scale = scale_of(m, bits);
  return { q: quantize(m.data[0] === 0 ? floats(x.shape) : x, scale, bits), scale, bits };
}

// Codes that are not held at the largest one (33). threshold: its magnitude has the largest code.
function code_flattened(x, threshold, bits, site) {
  absmax(x, site);
  const m = map(threshold, (value) => (value < ABSMAX_ZERO ? 0 : value)), scale = scale_of(m, bits), most = two_to(ACTIVATION_BITS);
  const held = (value) => rint(Math.min(most, Math.max(-most, f(value * scale.data[0]))));
  return { q: tensor(x.shape, Int32Array.from(x.data, m.data[0] === 0 ? () => 0 : held)), scale, bits };
}

// Codes with a whole step for each group of columns (30), chosen in float64.
function code_grouped(x, bits, group, site) {
  const n = columns_of(x), rows = rows_of(x), groups = Math.ceil(n / group), high = largest_code(bits), most = Math.floor(STEPPED / high);
  const m = absmax(x, site, "per_row"), scale = map(m, (value) => (value === 0 ? 1 : f(STEPPED / value)));
  const q = floats(x.shape), steps = tensor([rows, groups], new Uint8Array(rows * groups).fill(1)), t = new Float64Array(group);
  const coded = (value, step) => Math.min(high, Math.max(-high, rint(value / step)));
  for (let row = 0; row < rows; row++) {
    if (m.data[row] === 0) continue;
    for (let g = 0; g < groups; g++) {
      const from = row * n + g * group, length = Math.min(group, n - g * group);
      let top = 0;
      for (let j = 0; j < length; j++) {
        t[j] = x.data[from + j] * scale.data[row];
        top = Math.max(top, Math.abs(t[j]));
      }
      const first = Math.min(most, Math.max(1, Math.ceil(top / high)));
      let least = Infinity, best = first;
      for (let step = first; step >= Math.max(1, first - 5); step--) {
        let error = 0;
        for (let j = 0; j < length; j++) {
          const off = t[j] - coded(t[j], step) * step;
          error += off * off;
        }
        if (error < least) [least, best] = [error, step];
      }
      steps.data[row * groups + g] = best;
      for (let j = 0; j < length; j++) q.data[from + j] = coded(t[j], best);
    }
  }
  return { q, scale, bits, steps, group };
}

// (10), each row with its own power of two.
function fixed_point(x, magnitude_bits, site) {
  const m = absmax(x, site, "per_row"), n = columns_of(x);
  const q = tensor(x.shape, new Int32Array(x.data.length)), exponent = tensor([m.data.length], new Int32Array(m.data.length));
  for (let row = 0; row < m.data.length; row++) {
    if (m.data[row] === 0) continue;
    const E = (bits_of(m.data[row]) >> 23) - 126; // 2^(E-1) <= absmax < 2^E
    const e = Math.min(126, magnitude_bits - E), power = two_to(e);
    exponent.data[row] = e;
    for (let i = row * n; i < (row + 1) * n; i++) q.data[i] = rint(x.data[i] * power);
  }
  return { q, exponent };
}

// y[row] = sum over columns [from, to) of w[row, column] x[column]: small integers times integers, four rows a pass.
function multiply(w, n, from, to, x, y) {
  const rows = y.length;
  let row = 0;
  for (; row + 3 < rows; row += 4) {
    const i0 = row * n, i1 = i0 + n, i2 = i1 + n, i3 = i2 + n;
    let a = 0, b = 0, c = 0, d = 0;
    for (let k = from; k < to; k++) {
      const value = x[k];
      a += w[i0 + k] * value;
      b += w[i1 + k] * value;
      c += w[i2 + k] * value;
      d += w[i3 + k] * value;
    }
    y[row] = a;
    y[row + 1] = b;
    y[row + 2] = c;
    y[row + 3] = d;
  }
  for (; row < rows; row++) {
    let a = 0;
    for (let k = from; k < to; k++) a += w[row * n + k] * x[k];
    y[row] = a;
  }
}

// A weight's fixed-point codes as 4096 * high + low with -2048 <= low <= 2047; made once for a matrix.
function split(w) {
  if (!w.high) {
    w.high = new Float32Array(w.q.data.length);
    w.low = new Float32Array(w.q.data.length);
    for (let i = 0; i < w.q.data.length; i++) {
      const low = ((w.q.data[i] + LOW_PART / 2) & (LOW_PART - 1)) - LOW_PART / 2;
      w.low[i] = low;
      w.high[i] = (w.q.data[i] - low) / LOW_PART;
    }
  }
  return w;
}

// (11), (12): (tokens, K), (rows, K) -> (tokens, rows), whole numbers in float64
function integer_product(x, w) {
  const n = columns_of(w.q), rows = w.q.shape[0], tokens = rows_of(x.q);
  const acc = tensor([tokens, rows], new Float64Array(tokens * rows)), values = new Float64Array(n);
  const high = new Float64Array(rows), low = new Float64Array(rows);
  for (let t = 0; t < tokens; t++) {
    values.set((x.scale ? integers(x) : x.q).data.subarray(t * n, (t + 1) * n));
    const y = acc.data.subarray(t * rows, (t + 1) * rows);
    if (x.scale || w.scale) {
      multiply(w.scale ? integers(w).data : Float64Array.from(w.q.data), n, 0, n, values, y);
      continue;
    }
    split(w);
    for (let from = 0; from < n; from += BLOCK) {
      const to = Math.min(n, from + BLOCK);
      multiply(w.high, n, from, to, values, high);
      multiply(w.low, n, from, to, values, low);
      for (let row = 0; row < rows; row++) y[row] += high[row] * LOW_PART + low[row];
    }
  }
  return acc;
}

// (13)
function rescale(acc, x, w) {
  const [tokens, rows] = acc.shape, y = floats(acc.shape);
  const at = (scale, i) => scale.data[scale.shape.length ? i : 0];
  for (let t = 0; t < tokens; t++) {
    const x_power = x.exponent ? two_to(-x.exponent.data[t]) : 1, x_scale = x.scale ? at(x.scale, t) : 1;
    for (let row = 0; row < rows; row++) {
      const w_power = w.exponent ? two_to(-w.exponent.data[row]) : 1, w_scale = w.scale ? at(w.scale, row) : 1;
      const value = f(acc.data[t * rows + row] * x_power * w_power + 0);
      y.data[t * rows + row] = f(value / f(x_scale * w_scale)); // a missing scale is 1, which changes nothing
    }
  }
  return y;
}

// (14)
function pack4(q) {
  const [rows, columns] = q.shape, width = (columns + 1) >> 1, packed = tensor([rows, width], new Uint8Array(rows * width));
  for (let row = 0; row < rows; row++) {
    for (let j = 0; j < columns; j++) packed.data[row * width + (j >> 1)] |= (q.data[row * columns + j] & 15) << (4 * (j & 1));
  }
  return packed;
}

function unpack4(packed, columns) {
  const [rows, width] = packed.shape, q = floats([rows, columns]);
  for (let row = 0; row < rows; row++) {
    for (let j = 0; j < columns; j++) q.data[row * columns + j] = (packed.data[row * width + (j >> 1)] << (28 - 4 * (j & 1))) >> 28;
  }
  return q;
}

// ------------------------------------------------------------------------------------------------ 3. Operations

// (15): tokens (L,), embedding (vocabulary, d) in codes or float32 -> (L, d)
function embed(tokens, embedding) {
  const rows = embedding.q ? integers(embedding) : embedding, n = columns_of(rows), x = floats([tokens.length, n]);
  tokens.forEach((token, t) => x.data.set(rows.data.subarray(token * n, (token + 1) * n), t * n));
  if (!embedding.q) return x;
  const { scale } = embedding, per_tensor = !scale.shape.length;
  return dequantize({ q: x, scale: per_tensor ? scale : tensor([tokens.length, 1], Float32Array.from(tokens, (t) => scale.data[t])) });
}

// (16): x (L, d), weight (d,) -> (L, d)
function rms_norm(x, weight, eps) {
  const n = columns_of(x), y = floats(x.shape), mean = tree_sum(map(x, (value) => f(value * value)));
  for (let t = 0; t < mean.data.length; t++) {
    const root = f(Math.sqrt(f(f(mean.data[t] / n) + f(eps))));
    for (let i = 0; i < n; i++) y.data[t * n + i] = f(f(x.data[t * n + i] / root) * weight.data[i]);
  }
  return y;
}

// (17): x (L, e), conv_state (e, k-1), weight (e, k), bias (e,) or null -> (L, e), (e, k-1)
function conv1d(x, conv_state, weight, bias) {
  const [length, channels] = x.shape, taps = weight.shape[1], before = taps - 1;
  const y = floats(x.shape), state = floats(conv_state.shape);
  const input = (t, c) => (t < 0 ? conv_state.data[c * before + before + t] : x.data[t * channels + c]);
  for (let c = 0; c < channels; c++) {
    for (let t = 0; t < length; t++) {
      let sum = f(input(t - before, c) * weight.data[c * taps]);
      for (let tap = 1; tap < taps; tap++) sum = f(sum + f(input(t - before + tap, c) * weight.data[c * taps + tap]));
      y.data[t * channels + c] = bias ? f(sum + bias.data[c]) : sum;
    }
    for (let i = 0; i < before; i++) state.data[c * before + i] = input(length - before + i, c);
  }
  return [y, state];
}

// (18)
function step_size(dt, bias) {
  return softplus(add(dt, bias));
}

// (19)
function state_matrix(A_log) {
  return map(A_log, (value) => -exp_of(value));
}

// (20): delta (L, e), A (e, n), B (L, n), u (L, e) -> A_bar, B_bar_u (L, e, n)
function discretize(delta, A, B, u) {
  const [length, channels] = delta.shape, n = A.shape[1], A_bar = floats([length, channels, n]), B_bar_u = floats(A_bar.shape);
  for (let t = 0, i = 0; t < length; t++) {
    for (let c = 0; c < channels; c++) {
      const step = delta.data[t * channels + c], input = f(step * u.data[t * channels + c]);
      for (let s = 0; s < n; s++, i++) {
        A_bar.data[i] = exp_of(f(step * A.data[c * n + s]));
        B_bar_u.data[i] = f(input * B.data[t * n + s]);
      }
    }
  }
  return [A_bar, B_bar_u];
}

// (20, 21, 22): u, delta (L, e), A (e, n), B, C (L, n), D (e,), ssm_state (e, n) -> (L, e), (e, n)
function selective_scan(u, delta, A, B, C, D, ssm_state) {
  const [length, channels] = u.shape, n = A.shape[1], width = power_of_two(n);
  const y = floats(u.shape), state = floats(ssm_state.shape), h = state.data, terms = new Float32Array(width);
  h.set(ssm_state.data);
  for (let t = 0; t < length; t++) {
    for (let c = 0; c < channels; c++) {
      const step = delta.data[t * channels + c], value = u.data[t * channels + c], input = f(step * value);
      terms.fill(0, n);
      for (let s = 0, i = c * n; s < n; s++, i++) {
        h[i] = f(f(exp_of(f(step * A.data[i])) * h[i]) + f(input * B.data[t * n + s]));
        terms[s] = f(C.data[t * n + s] * h[i]);
      }
      y.data[t * channels + c] = f(tree(terms, width) + f(D.data[c] * value));
    }
  }
  return [y, state];
}

// (23)
function gate(y, z) {
  return tensor(y.shape, y.data.map((value, i) => f(value * silu_of(z.data[i]))));
}

// x + y, where y may be one row for all tokens.
function add(x, y) {
  return tensor(x.shape, x.data.map((value, i) => f(value + y.data[i % y.data.length])));
}

// (25)
function log_softmax(logits) {
  const n = columns_of(logits), y = floats(logits.shape);
  for (let from = 0; from < y.data.length; from += n) {
    const m = logits.data.subarray(from, from + n).reduce((a, b) => Math.max(a, b));
    const shifted = tensor([n], logits.data.slice(from, from + n).map((value) => f(value - m)));
    const sum = log_of(tree_sum(exp(shifted)).data[0]);
    for (let i = 0; i < n; i++) y.data[from + i] = f(shifted.data[i] - sum);
  }
  return y;
}

// (26)
function sample(logits, draw, temperature = 1, top_k = 0, top_p = 1) {
  const x = logits.data;
  const m = x.reduce((a, b) => Math.max(a, b));
  if (f(temperature) === 0) return x.indexOf(m);
  const weights = x.map((value) => exp_of(f(f(value - m) / f(temperature))));
  const order = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a] || a - b).slice(0, top_k || undefined);
  let total = 0;
  let running = order.map((token) => (total += weights[token]));
  if (top_p < 1) running = running.slice(0, running.findIndex((sum) => sum >= top_p * total) + 1);
  const last = running.at(-1);
  return order[running.findIndex((sum) => sum > draw * last)];
}

// The uniform draws of a seed: PCG64 (XSL-RR 128/64), seeded by NumPy's SeedSequence.
function draws(seed) {
  const words = [];
  for (let rest = BigInt(seed); rest > 0n || !words.length; rest >>= 32n) words.push(Number(rest & 0xffffffffn));
  let constant = 0x43b0d7e5;
  const hashed = (value, multiplier) => {
    value ^= constant;
    constant = Math.imul(constant, multiplier);
    value = Math.imul(value, constant);
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mixed = (x, y) => {
    const value = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) | 0;
    return (value ^ (value >>> 16)) >>> 0;
  };
  const pool = [0, 1, 2, 3].map((i) => hashed(words[i] ?? 0, 0x931e8875));
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mixed(pool[to], hashed(pool[from], 0x931e8875));
  }
  for (const word of words.slice(4)) for (let to = 0; to < 4; to++) pool[to] = mixed(pool[to], hashed(word, 0x931e8875));
  constant = 0x8b51f9dd;
  const out = Array.from({ length: 8 }, (_, i) => BigInt(hashed(pool[i % 4], 0x58f38ded)));
  const wide = (i) => (out[i + 1] << 96n) | (out[i] << 64n) | (out[i + 3] << 32n) | out[i + 2];
  const low128 = (1n << 128n) - 1n, low64 = (1n << 64n) - 1n;
  const increment = ((wide(4) << 1n) | 1n) & low128;
  const next = (state) => (state * 0x2360ed051fc65da44385df649fccf645n + increment) & low128;
  let state = next((next(0n) + wide(0)) & low128);
  return () => {
    state = next(state);
    const value = ((state >> 64n) ^ state) & low64, turn = state >> 122n;
    const output = ((value >> turn) | (value << (64n - turn))) & low64;
    return Number(output >> 11n) / 9007199254740992;
  };
}

// --------------------------------------------------------------------------------------------------- 4. Schemes
//
// A scheme is what Scheme.to_json gives: {name, weights, inputs, outputs, smooth, rotate}, each site with {bits, scale} and, where
// its coder takes one, an option.

const LINEAR_LAYERS = ["in_proj", "x_proj", "dt_proj", "out_proj"];
const LINEAR_WEIGHTS = LINEAR_LAYERS.map((layer) => `${layer}.weight`);
const HEAD_WEIGHTS = ["embedding.weight", "lm_head.weight"];
const OTHER_PARAMETERS = ["norm.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "dt_proj.bias", "A_log", "D", "out_proj.bias", "norm_f.weight"];

// The schemes of 8-bit inputs: how those are coded.
const INT8 = {
  int8: "per_token", "int8-static": "static", "int8-smooth": "static", int4: "per_token", "int4-all": "per_token",
  "int8-hadamard": "static", "llm-int8": "per_token_outliers", "flatten-int8": "flattened",
};

const alike = (sites, value) => Object.fromEntries(sites.map((site) => [site, value]));

function parse_scheme(name) {
  const scheme = { name, weights: {}, inputs: {}, outputs: {}, smooth: {} };
  const match = /^w([2-8])(?:a([2-9]|1[0-6]))?-(mlp|all)$/.exec(name);
  if (match) {
    const sites = match[3] === "mlp" ? LINEAR_WEIGHTS : [...HEAD_WEIGHTS, ...LINEAR_WEIGHTS, ...OTHER_PARAMETERS];
    scheme.weights = alike(sites, { bits: Number(match[1]), scale: "per_tensor" });
    if (match[2]) scheme.outputs = alike(LINEAR_LAYERS, { bits: Number(match[2]), scale: "per_tensor" });
  } else if (name in INT8) {
    scheme.weights = alike([...HEAD_WEIGHTS, ...LINEAR_WEIGHTS], { bits: 8, scale: "per_channel" });
    scheme.inputs = alike([...LINEAR_LAYERS, "lm_head"], { bits: 8, scale: INT8[name] });
    if (name.startsWith("int4")) Object.assign(scheme.weights, alike(name === "int4" ? LINEAR_WEIGHTS : Object.keys(scheme.weights), { bits: 4, scale: "grouped" }));
    if (name === "int8-smooth") scheme.smooth = alike(LINEAR_LAYERS, 0.5);
    if (name === "int8-hadamard") scheme.rotate = ["in_proj", "out_proj"];
  } else if (name !== "fp32") {
    throw new RefmambaError(`unknown scheme '${name}'`);
  }
  return scheme;
}

// A coder is one function. Of a parameter: (x, quantizer, name) -> codes. Of one side of a linear layer: it lists the operations
// that make its parts, each a factor of a product of its own.
const PARAMETER_CODERS = {
  per_tensor: (x, { bits }, name) => code(x, bits, name, "per_tensor"),
  per_channel: (x, { bits }, name) => code(x, bits, name, "per_row"),
  grouped: (x, { bits, group = 64 }, name) => code_grouped(x, bits, group, name),
};
const CODERS = {
  per_token: ({ bits }) => (x, site) => [[code, x, bits, site, "per_row"]],
  per_tensor: ({ bits }) => (x, site) => [[code, x, bits, site, "per_tensor"]],
  static: ({ bits, absmax }) => (x, site) => [[code_static, x, absmax, bits, site]],
  flattened: ({ bits, absmax }) => (x, site) => [[code_flattened, x, absmax, bits, site]],
  per_token_outliers: ({ bits, threshold = 6 }) => (x, site) => {
    const inside = x.data.map((value) => Math.abs(value) < f(threshold)); // 1 or 0; a NaN is an outlier, and is refused there
    const part = (kept) => tensor(x.shape, x.data.map((value, i) => (inside[i] === kept ? value : 0)));
    return [[code, part(1), bits, site, "per_row"], [fixed_point, part(0), ACTIVATION_BITS, site]];
  },
  unquantized: () => (x, site) => [[fixed_point, x, ACTIVATION_BITS, site]],
};

// The absolute maximum of a site from those of its channels, in order.
const REDUCE = {
  static: (maxima) => maxima.at(-1),
  flattened: (maxima, { quantile = 0.98 }) => maxima[Math.ceil(quantile * (maxima.length - 1))],
};

const kind_of = (name) => (name.startsWith("layers.") ? name.split(".").slice(2).join(".") : name);
const sites_of = (config) =>
  [...Array(config.n_layer).keys()].flatMap((i) => LINEAR_LAYERS.map((layer) => `layers.${i}.${layer}`)).concat("lm_head");

// ----------------------------------------------------------------------------------- 5. Calibration and smoothing

const scaled = (x, exponent) => tensor(x.shape, x.data.map((value, i) => f(value * two_to(exponent(i)))));

// (29), where no weight before the product could be divided
function divide_channels(x, exponents) {
  return scaled(x, (i) => -exponents[i % exponents.length]);
}

// (29): a parameter with the factors folded in. k: site -> exponents of its input channels, from (28), which Python computed.
function smoothed(source, k) {
  const read = (name) => {
    let x = source.read(name);
    const site = name.slice(0, name.lastIndexOf(".")), before = site.slice(0, site.lastIndexOf(".") + 1);
    if (!name.endsWith(".weight")) return x;
    if (k[site]) x = scaled(x, (i) => k[site][i % k[site].length]);
    const norm = k[`${before}in_proj`], dt = k[`${before}dt_proj`];
    if (site.endsWith(".norm") && norm) x = scaled(x, (i) => -norm[i]);
    if (site.endsWith(".x_proj") && dt) x = scaled(x, (i) => -(dt[Math.floor(i / columns_of(x))] ?? 0));
    return x;
  };
  return { config: source.config, read };
}

// (31): Hadamard's matrix times each block of columns, stage by stage, in place. values: a Float64Array.
function butterfly(values, block) {
  for (let half = 1; half < block; half *= 2) {
    for (let from = 0; from < values.length; from += 2 * half) {
      for (let i = from; i < from + half; i++) {
        const a = values[i], b = values[i + half];
        values[i] = a + b;
        values[i + half] = a - b;
      }
    }
  }
  return values;
}

const hadamard_block = (channels) => channels & -channels;

// (31) of an activation: sums of integers, one rounding to float32.
function rotate(x, site) {
  const { q, exponent } = fixed_point(x, ACTIVATION_BITS, site), n = columns_of(x), sums = butterfly(new Float64Array(q.data), hadamard_block(n));
  return map(x, (_, i) => sums[i] * two_to(-exponent.data[Math.floor(i / n)]));
}

// (31) of a matrix
function rotated(x) {
  const block = hadamard_block(columns_of(x)), sums = butterfly(new Float64Array(x.data), block);
  return map(x, (_, i) => sums[i] / block);
}

// A checkpoint {config, read} under a scheme. calibration: {absmax: site -> Float32Array, exponents: site -> Int32Array}.
function quantize_model(source, scheme, calibration) {
  const { config } = source, k = Object.keys(scheme.smooth).length ? calibration.exponents : {};
  const checkpoint = smoothed(source, k), tied = !source.has("lm_head.weight"), params = {};
  const parameter = (name, kind) => {
    const plain = checkpoint.read(name), quantizer = scheme.weights[kind];
    const x = scheme.rotate?.includes(kind.replace(/\.weight$/, "")) ? rotated(plain) : plain;
    if (quantizer) return PARAMETER_CODERS[quantizer.scale](x, quantizer, name);
    return LINEAR_WEIGHTS.includes(kind) || kind === "lm_head.weight" ? fixed_point(x, WEIGHT_BITS, name) : x;
  };
  for (const name of source.names) params[name] = parameter(name, kind_of(name));
  if (tied) {
    params["lm_head.weight"] = scheme.weights["embedding.weight"] ? params["embedding.weight"] : parameter("embedding.weight", "lm_head.weight");
  }
  const values = {}, linear = {};
  for (const [name, x] of Object.entries(params)) if (!LINEAR_WEIGHTS.includes(kind_of(name)) && !HEAD_WEIGHTS.includes(name)) values[name] = x.q ? dequantize(x) : x;
  for (const site of sites_of(config)) {
    const layer = kind_of(site), input = { ...(scheme.inputs[layer] ?? { scale: "unquantized" }) }, output = scheme.outputs[layer];
    const turned = scheme.rotate?.includes(layer) ?? false, folded = layer === "in_proj" || layer === "dt_proj";
    if (REDUCE[input.scale]) {
      const maxima = calibration.absmax[turned ? `${site}.rotated` : site].map((value, j) => f(value * two_to(-(k[site]?.[j] ?? 0))));
      input.absmax = tensor([], Float32Array.of(REDUCE[input.scale](maxima.sort((a, b) => a - b), input)));
    }
    const transforms = !folded && k[site] ? [(x) => [divide_channels, x, k[site]]] : [];
    if (turned) transforms.push((x) => [rotate, x, `${site}.in`]);
    linear[site] = {
      site, weight: params[`${site}.weight`], transforms,
      input: CODERS[input.scale](input), output: output ? CODERS[output.scale](output) : null,
      bias: layer === "dt_proj" ? null : (values[`${site}.bias`] ?? null),
    };
  }
  const A = [...Array(config.n_layer).keys()].map((i) => state_matrix(values[`layers.${i}.A_log`]));
  return { config, scheme, params, values, linear, A };
}

// ------------------------------------------------------------------------------------- 6. Model, state and calls

// Calls operations one by one. record: takes each as {operation, arguments, sites, result}; null for speed.
function tracer(record) {
  if (!record) return (sites, operation, ...rest) => operation(...rest);
  return (sites, operation, ...rest) => {
    const result = operation(...rest);
    record({ operation: operation.name, arguments: rest, sites: sites.split(" "), result });
    return result;
  };
}

function numbered(site, n) {
  return n ? `${site}_${n + 1}` : site;
}

function linear(layer, x, run) {
  const { site, weight } = layer;
  layer.transforms.forEach((transform, n) => { x = run(numbered(`${site}.transformed`, n), ...transform(x)); });
  let y = null;
  layer.input(x, `${site}.in`).forEach(([operation, ...rest], n) => {
    const codes = run(numbered(`${site}.in_codes`, n), operation, ...rest);
    const acc = run(numbered(`${site}.acc`, n), integer_product, codes, weight);
    const value = run(numbered(`${site}.result`, n), rescale, acc, codes, weight);
    y = y ? run(numbered(`${site}.sum`, n - 1), add, y, value) : value;
  });
  if (layer.output) {
    const [[operation, ...rest]] = layer.output(y, `${site}.result`);
    y = run(`${site}.out_value`, dequantize, run(`${site}.out_codes`, operation, ...rest));
  }
  return layer.bias ? run(`${site}.out`, add, y, layer.bias) : y;
}

function columns(x, from, to) {
  const [rows, n] = x.shape, part = floats([rows, to - from]);
  for (let row = 0; row < rows; row++) part.data.set(x.data.subarray(row * n + from, row * n + to), row * (to - from));
  return part;
}

// (24)
function block(model, i, x, conv_state, ssm_state, run) {
  const at = `layers.${i}`, { values, config } = model, { dt_rank: r, d_state: n } = config;
  const normed = run(`${at}.norm`, rms_norm, x, values[`${at}.norm.weight`], config.norm_eps);
  const xz = linear(model.linear[`${at}.in_proj`], normed, run), e = columns_of(xz) / 2, z = columns(xz, e, 2 * e);
  const [c, conv] = run(
    `${at}.conv1d ${at}.conv_state`, conv1d, columns(xz, 0, e), conv_state, values[`${at}.conv1d.weight`], values[`${at}.conv1d.bias`] ?? null,
  );
  const u = run(`${at}.u`, silu, c);
  const dtBC = linear(model.linear[`${at}.x_proj`], u, run);
  const B = columns(dtBC, r, r + n), C = columns(dtBC, r + n, r + 2 * n);
  const dt = linear(model.linear[`${at}.dt_proj`], columns(dtBC, 0, r), run);
  const delta = run(`${at}.delta`, step_size, dt, values[`${at}.dt_proj.bias`]);
  const [y, ssm] = run(`${at}.scan ${at}.ssm_state`, selective_scan, u, delta, model.A[i], B, C, values[`${at}.D`], ssm_state);
  const gated = run(`${at}.gate`, gate, y, z);
  return [run(`${at}.residual_out`, add, x, linear(model.linear[`${at}.out_proj`], gated, run)), conv, ssm];
}

// A state is a value: {conv: a tensor for each layer, ssm: likewise}.
function initial_state({ n_layer, d_inner, d_conv, d_state }) {
  const of_layers = (width) => Array.from({ length: n_layer }, () => floats([d_inner, width]));
  return { conv: of_layers(d_conv - 1), ssm: of_layers(d_state) };
}

// tokens (L,) from a state on -> {logits (L or 1, vocabulary), state}. positions: "all" or "last".
function forward(model, tokens, state = null, positions = "last", record = null) {
  const run = tracer(record), { config } = model, after = { conv: [], ssm: [] };
  state = state ?? initial_state(config);
  let x = run("embedding", embed, tokens, model.params["embedding.weight"]);
  for (let i = 0; i < config.n_layer; i++) [x, after.conv[i], after.ssm[i]] = block(model, i, x, state.conv[i], state.ssm[i], run);
  if (positions === "last") x = tensor([1, config.d_model], x.data.slice(-config.d_model));
  const logits = linear(model.linear.lm_head, run("norm_f", rms_norm, x, model.values["norm_f.weight"], config.norm_eps), run);
  if (!logits.data.every(Number.isFinite)) throw new NonFiniteError("lm_head: a logit is NaN or infinite; check the weights and the input");
  return { logits, state: after };
}

// The tokens that follow a prompt, one for each turn of the iteration: {token, logits}.
function* generate(model, prompt, { maxNewTokens, temperature = 0, top_k = 0, top_p = 1, seed = 0, n_ids, ends }) {
  const draw = draws(seed);
  let { logits, state } = forward(model, prompt);
  for (let n = 0; n < maxNewTokens; n++) {
    const row = tensor([n_ids], logits.data.subarray(0, n_ids));
    const token = sample(row, temperature > 0 ? draw() : 0, temperature, top_k, top_p);
    yield { token, logits: logits.data };
    if (ends.includes(token) || n === maxNewTokens - 1) return;
    ({ logits, state } = forward(model, [token], state));
  }
}

// SHA-256 of float32 values, little-endian, one array after the other: hexadecimal.
async function sha256(arrays) {
  const bytes = new Uint8Array(arrays.reduce((n, x) => n + 4 * x.length, 0)), view = new DataView(bytes.buffer);
  let at = 0;
  for (const x of arrays) for (let i = 0; i < x.length; i++, at += 4) view.setFloat32(at, x[i], true);
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
}

const OPERATIONS = {
  exp, log, log1p, softplus, silu, tree_sum, absmax, scale_of, quantize, code, code_static, code_grouped, code_flattened,
  fixed_point, rotate, integer_product, rescale, pack4, unpack4, embed, rms_norm, conv1d, step_size, state_matrix, discretize,
  selective_scan, gate, log_softmax, sample,
};
