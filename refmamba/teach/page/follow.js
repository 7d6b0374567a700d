// Follow one number: a recorded forward, and what an operation did to make one element of it.
//
// Nothing is computed a second time but for display: what the element is comes from the record, and beside it stands the
// same operation in float64 on the same inputs, so that the rounding can be seen.
"use strict";

// Every operation of one forward, by the names of its results.
class Recording {
  constructor(model, tokens, steps) {
    this.model = model;
    this.tokens = tokens;
    this.made = new Map();
    for (const step of steps) {
      step.sites.forEach((site, i) => this.made.set(site, { step, value: step.sites.length > 1 ? step.result[i] : step.result }));
    }
    // A state belongs to the last token alone; the scan's own explanation shows it.
    this.sites = [...this.made.keys()].filter((site) => !site.endsWith("_state"));
  }

  static of(model, tokens) {
    const steps = [];
    forward(model, tokens, null, "all", (step) => steps.push(step));
    return new Recording(model, tokens, steps);
  }

  value(site) {
    return this.made.get(site).value;
  }

  numbers(site) {
    const value = this.value(site);
    return value.q ?? value;
  }

  element(site, t, c) {
    const x = this.numbers(site);
    return x.data[t * columns_of(x) + c];
  }

  // What a linear layer hands on: its last value.
  output(layer) {
    return this.sites.findLast((site) => site.startsWith(`${layer}.`));
  }
}

const layer_of = (site) => (site.startsWith("layers.") ? site.split(".").slice(0, 2).join(".") : "");
const scale_at = (scale, row) => scale.data[scale.shape.length ? row : 0];

// The exponent of the factor by which smoothing has divided a value, so that it can be compared with the plain one.
function smoothing_of(recording, site, c) {
  const k = recording.model.smoothing, at = layer_of(site), [layer, side] = kind_of(site).split(".");
  if (!k || !at) return 0;
  if (layer === "norm") return k[`${at}.in_proj`]?.[c] ?? 0;
  if (layer === "x_proj" && !/^(in_codes|transformed)/.test(side)) return k[`${at}.dt_proj`]?.[c] ?? 0;
  return /^(in_codes|transformed)/.test(side ?? "") ? (k[`${at}.${layer}`]?.[c] ?? 0) : 0;
}

// The real number that an element stands for.
function stands_for(recording, site, t, c) {
  const { step, value } = recording.made.get(site), x = recording.element(site, t, c), plain = two_to(smoothing_of(recording, site, c));
  if (value.scale) return (x / scale_at(value.scale, t)) * plain;
  if (value.exponent) return x * two_to(-value.exponent.data[t]) * plain;
  if (step.operation === "integer_product") return real_product(x, ...step.arguments, t, c) * plain;
  return x * plain;
}

function real_product(acc, x, w, t, c) {
  const powers = (x.exponent ? two_to(-x.exponent.data[t]) : 1) * (w.exponent ? two_to(-w.exponent.data[c]) : 1);
  return (acc * powers) / ((x.scale ? scale_at(x.scale, t) : 1) * (w.scale ? scale_at(w.scale, c) : 1));
}

// What a value within a linear layer is measured in: an input may be rotated, or a part of a sum; null elsewhere.
function terms_of(recording, site) {
  const [, layer, side] = /^(.*)\.(in_codes|transformed|acc|result)(_\d+)?$/.exec(site) ?? [];
  if (!layer) return null;
  if (recording.made.has(`${layer}.sum`) && side !== "transformed") return "part";
  const rotated = recording.model.scheme.rotate?.includes(kind_of(layer));
  return rotated && (side === "in_codes" || side === "transformed") ? "rotated" : null;
}

// The site of another forward with which a value can be compared; null where none is in the same terms.
function counterpart(baseline, recording, site) {
  const layer = site.slice(0, site.lastIndexOf("."));
  let name = site;
  if (!baseline.made.has(site)) name = /transformed/.test(site) ? `${layer}.in_codes` : /(result|sum|out_codes|out_value)$/.test(site) ? baseline.output(layer) : null;
  return name && terms_of(baseline, name) === terms_of(recording, site) ? name : null;
}

// What each operation did for element (t, c): {symbols, inputs, exact, and what is its own}. symbols: the values of the
// formula's letters. inputs: the elements that it read. exact: the same in float64.
const STORIES = {
  embed({ step, recording, t, c }) {
    const [tokens, embedding] = step.arguments, token = tokens[t];
    if (!embedding.q) return { form: "embed", symbols: { t: recording.tokens[t], x: recording.element("embedding", t, c) }, inputs: [], exact: recording.element("embedding", t, c) };
    const q = integers(embedding).data[token * columns_of(embedding.q) + c], s = scale_at(embedding.scale, token);
    return { form: "dequantize", symbols: { q, s }, inputs: [], exact: q / s };
  },

  rms_norm({ step, site, recording, t, c }) {
    const [x, weight, eps] = step.arguments, n = columns_of(x), row = x.data.subarray(t * n, (t + 1) * n);
    const sum = tree_sum(tensor([n], row.map((v) => f(v * v)))).data[0], value = row[c];
    return {
      symbols: { x: value, S: sum, d: n, eps: f(eps), w: weight.data[c] },
      inputs: [["x", residual_before(recording, site), t, c]],
      exact: (value / Math.sqrt(row.reduce((a, v) => a + v * v, 0) / n + eps)) * weight.data[c],
    };
  },

  code({ step, site, recording, t, c }) {
    const [x, bits, , granularity] = step.arguments, codes = step.result, n = columns_of(x);
    const per_tensor = granularity === "per_tensor", from = per_tensor ? 0 : t * n, to = per_tensor ? x.data.length : from + n;
    return coding(recording, site, x, codes, bits, t, c, from, to);
  },

  code_static({ step, site, recording, t, c }) {
    const [x, m, bits] = step.arguments;
    return { ...coding(recording, site, x, step.result, bits, t, c, 0, 0), calibrated: m.data[0] };
  },

  code_flattened({ step, site, recording, t, c }) {
    const [x, m, bits] = step.arguments;
    return { ...coding(recording, site, x, step.result, bits, t, c, 0, 0), form: "code_flattened", code: { q: step.result.q.data[t * columns_of(x) + c], bits: 32 }, calibrated: m.data[0], saturates: false };
  },

  fixed_point({ step, site, recording, t, c }) {
    const [x] = step.arguments, n = columns_of(x), { q, exponent } = step.result, e = exponent.data[t], value = x.data[t * n + c];
    const m = absmax_of(x.data, t * n, (t + 1) * n, site);
    return {
      symbols: { x: value, e, m, E: m ? (bits_of(m) >> 23) - 126 : 0, M: ACTIVATION_BITS },
      inputs: [["x", input_of(recording, site), t, c]],
      code: { q: q.data[t * n + c], bits: 32 },
      rounding: { before: value * two_to(e), after: q.data[t * n + c], unit: 1 },
      exact: value,
    };
  },

  integer_product({ step, site, t, c }) {
    const [x, w] = step.arguments, n = columns_of(x.q), terms = [], sums = [], form = x.exponent && w.exponent ? "wide_product" : "integer_product";
    if (!w.q) return { form, symbols: { K: n, q_0: x.q.data[t * n], q_1: x.q.data[t * n + 1] }, inputs: [["q", site.replace(".acc", ".in_codes"), t, 0]], exact: null, sum: true };
    const stepped = w.scale ? integers(w) : w.q;
    let sum = 0;
    for (let k = 0; k < n; k++) {
      const q = x.q.data[t * n + k], p = stepped.data[c * n + k];
      sum += q * p;
      terms.push([k, q, p, q * p]);
      sums.push(sum);
    }
    const codes = site.replace(".acc", ".in_codes");
    const largest = terms.toSorted((a, b) => Math.abs(b[3]) - Math.abs(a[3])).slice(0, 8);
    return {
      form, sum: true, symbols: { K: n, q_0: terms[0][1], w_0: terms[0][2], q_1: terms[1]?.[1] ?? 0, w_1: terms[1]?.[2] ?? 0 },
      inputs: largest.slice(0, 1).map(([k]) => ["q", codes, t, k]),
      partial: { sums, largest, codes },
      exact: null,
    };
  },

  rescale({ step, site, t, c }) {
    const [acc, x, w] = step.arguments, value = acc.data[t * columns_of(acc) + c];
    const e_x = x.exponent ? x.exponent.data[t] : 0, e_w = w.exponent ? w.exponent.data[c] : 0;
    return {
      symbols: { acc: value, e_x, e_w, s_x: x.scale ? scale_at(x.scale, t) : null, s_w: w.scale ? scale_at(w.scale, c) : null },
      inputs: [["acc", site.replace(".result", ".acc"), t, c]],
      rounding: { before: value * two_to(-e_x) * two_to(-e_w), after: f(value * two_to(-e_x) * two_to(-e_w)), unit: spacing(f(value * two_to(-e_x) * two_to(-e_w))) },
      exact: real_product(value, x, w, t, c),
    };
  },

  dequantize({ step, site, t, c }) {
    const [codes] = step.arguments, q = codes.q.data[t * columns_of(codes.q) + c], s = scale_at(codes.scale, t);
    return { symbols: { q, s }, inputs: [["q", site.replace("out_value", "out_codes"), t, c]], exact: q / s };
  },

  divide_channels({ step, site, recording, t, c }) {
    const [x, k] = step.arguments, value = x.data[t * columns_of(x) + c];
    return { symbols: { x: value, k: k[c] }, inputs: [["x", input_of(recording, site), t, c]], exact: value * two_to(-k[c]) };
  },

  rotate({ step, site, recording, t, c }) {
    const [x] = step.arguments, n = columns_of(x), block = hadamard_block(n), first = c - (c % block);
    const sign = (j) => (ones(j & (c - first)) % 2 ? -1 : 1), part = x.data.subarray(t * n + first, t * n + first + block);
    const largest = part.reduce((best, value, j) => (Math.abs(value) > Math.abs(part[best]) ? j : best), 0);
    return {
      symbols: { n: block, x_0: part[0], x_1: part[1] * sign(1) },
      inputs: [["the largest x", input_of(recording, site), t, first + largest]],
      exact: part.reduce((sum, value, j) => sum + sign(j) * value, 0),
    };
  },

  conv1d({ step, site, recording, t, c }) {
    const [x, , weight, bias] = step.arguments, taps = weight.shape[1], channels = columns_of(x), source = recording.output(`${layer_of(site)}.in_proj`);
    const rows = Array.from({ length: taps }, (_, i) => t - taps + 1 + i).map((at, i) => [at, at < 0 ? 0 : x.data[at * channels + c], weight.data[c * taps + i]]);
    return {
      symbols: { terms: rows.map(([, a, b]) => [a, b]), b: bias ? bias.data[c] : null },
      inputs: rows.filter(([at]) => at >= 0).map(([at]) => [`x at token ${at}`, source, at, c]),
      exact: rows.reduce((sum, [, a, b]) => sum + a * b, 0) + (bias ? bias.data[c] : 0),
    };
  },

  silu({ step, site, t, c }) {
    const value = step.arguments[0].data[t * columns_of(step.arguments[0]) + c];
    return { symbols: { x: value }, inputs: [["x", site.replace(/u$/, "conv1d"), t, c]], exact: value / (1 + Math.exp(-value)) };
  },

  step_size({ step, site, recording, t, c }) {
    const [dt, bias] = step.arguments, value = dt.data[t * columns_of(dt) + c], b = bias.data[c], x = value + b;
    return {
      symbols: { dt: value, b },
      inputs: [["dt", recording.output(`${layer_of(site)}.dt_proj`), t, c]],
      exact: x > 20 ? x : Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))),
    };
  },

  selective_scan({ step, site, recording, t, c }) {
    const { u, delta, D, states } = scan_of(step, t, c), at = layer_of(site), r = recording.model.config.dt_rank, n = states.length;
    const x_proj = recording.output(`${at}.x_proj`);
    return {
      symbols: { u, delta, D, sum: f(recording.element(site, t, c) - f(D * u)) },
      inputs: [["u", `${at}.u`, t, c], ["delta", `${at}.delta`, t, c], ["B of state 0", x_proj, t, r], ["C of state 0", x_proj, t, r + n]],
      states,
      exact: states.reduce((sum, s) => sum + s.C * (Math.exp(delta * s.A) * s.before + delta * u * s.B), 0) + D * u,
    };
  },

  gate({ step, site, recording, t, c }) {
    const [y, z] = step.arguments, e = columns_of(y), a = y.data[t * e + c], b = z.data[t * e + c], at = layer_of(site);
    return {
      symbols: { y: a, z: b },
      inputs: [["y", `${at}.scan`, t, c], ["z", recording.output(`${at}.in_proj`), t, e + c]],
      exact: (a * b) / (1 + Math.exp(-b)),
    };
  },

  add({ step, site, recording, t, c }) {
    const [x, y] = step.arguments, n = columns_of(x), a = x.data[t * n + c], b = y.data[y.shape.length > 1 ? t * n + c : c];
    const residual = site.endsWith("residual_out"), parts = [...recording.made.keys()], at = layer_of(site);
    const inputs = residual
      ? [["x", residual_before(recording, `${at}.norm`), t, c], ["y", recording.output(`${at}.out_proj`), t, c]]
      : [["x", parts[parts.indexOf(site) - 1], t, c]];
    return { symbols: { x: a, y: b }, inputs, exact: a + b };
  },
};

// From a float32 to the next one.
function spacing(x) {
  return two_to(Math.max(-149, ((bits_of(x) >> 23) & 255) - 150));
}

// How many bits of a whole number are 1.
function ones(n) {
  return n ? (n & 1) + ones(n >>> 1) : 0;
}

function coding(recording, site, x, codes, bits, t, c, from, to) {
  const n = columns_of(x), value = x.data[t * n + c], s = scale_at(codes.scale, t), high = largest_code(bits), q = codes.q.data[t * n + c];
  let widest = from;
  for (let i = from; i < to; i++) if (Math.abs(x.data[i]) > Math.abs(x.data[widest])) widest = i;
  return {
    symbols: { x: value, s, Q: high, m: to > from ? Math.abs(x.data[widest]) : null },
    inputs: [["x", input_of(recording, site), t, c]],
    code: { q, bits },
    rounding: { before: f(value * s), after: q, unit: 1 },
    saturates: Math.abs(f(value * s)) > high + 0.5,
    widest: to > from ? { token: Math.floor(widest / n), channel: widest % n, value: x.data[widest] } : null,
    exact: value,
  };
}

function residual_before(recording, site) {
  const layer = /^layers\.(\d+)/.exec(site);
  const before = layer ? Number(layer[1]) - 1 : recording.model.config.n_layer - 1;
  return before < 0 ? "embedding" : `layers.${before}.residual_out`;
}

// What a linear layer's input is, or a value that is coded within it.
function input_of(recording, site) {
  const at = layer_of(site), [layer, side] = kind_of(site).split(".");
  if (side === "out_codes") return recording.sites[recording.sites.indexOf(site) - 1];
  const transformed = recording.sites.findLast((earlier) => earlier.startsWith(`${at}.${layer}.transformed`));
  if (side.startsWith("in_codes") && transformed) return transformed;
  const inputs = { in_proj: `${at}.norm`, x_proj: `${at}.u`, out_proj: `${at}.gate`, lm_head: "norm_f" };
  return inputs[layer] ?? recording.output(`${at}.x_proj`);
}

// The scan of one channel, token by token up to t, with the engine's own operations: its states before and after.
function scan_of(step, t, c) {
  const [u, delta, A, B, C, D, ssm_state] = step.arguments, e = columns_of(u), n = columns_of(A);
  let states = Array.from({ length: n }, (_, s) => ({ A: A.data[c * n + s], after: ssm_state.data[c * n + s] }));
  for (let at = 0; at <= t; at++) {
    const value_of = (x) => tensor([1, 1], Float32Array.of(x.data[at * e + c])), part = (x) => tensor([1, n], x.data.slice(at * n, (at + 1) * n));
    const [A_bar, B_bar_u] = discretize(value_of(delta), tensor([1, n], A.data.slice(c * n, (c + 1) * n)), part(B), value_of(u));
    states = states.map(({ A: a, after }, s) => ({
      A: a, B: B.data[at * n + s], C: C.data[at * n + s], before: after, A_bar: A_bar.data[s], B_bar_u: B_bar_u.data[s],
      after: f(f(A_bar.data[s] * after) + B_bar_u.data[s]),
    }));
  }
  return { u: u.data[t * e + c], delta: delta.data[t * e + c], D: D.data[c], states: states.map((s) => ({ ...s, term: f(s.C * s.after) })) };
}

// All that the page shows of one element.
function explain(recording, baseline, site, t, c) {
  const { step, value } = recording.made.get(site);
  const story = STORIES[step.operation]({ step, site, recording, t, c });
  const result = recording.element(site, t, c), meant = stands_for(recording, site, t, c);
  const x = recording.numbers(site), n = columns_of(x), site_of_baseline = counterpart(baseline, recording, site);
  const plain = site_of_baseline && stands_for(baseline, site_of_baseline, t, c);
  const unscaled = two_to(-smoothing_of(recording, site, c)), exact = story.exact;
  const bits = x.data instanceof Float32Array && !value.q && !value.exponent ? bits_of(result) >>> 0 : null;
  return {
    form: step.operation, ...story, site, operation: step.operation, token: t, channel: c, channels: n, result, bits,
    row: Array.from(x.data.subarray(t * n, (t + 1) * n)), stands_for: meant, plain, so_far: site_of_baseline && meant - plain,
    added: exact === null || value.exponent ? 0 : meant * unscaled - exact,
  };
}
