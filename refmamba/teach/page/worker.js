// The worker: the only thread that computes. A request is {id, call, ...}; the answer has the same id, and progress may come before.
"use strict";

const BLOB_ARRAYS = { float32: Float32Array, float64: Float64Array, int8: Int8Array, int16: Int16Array, int32: Int32Array, uint8: Uint8Array };
let carried, source, tokenizer, tiny;
const PARAGRAPH = 128, PROMPT = 48; // tokens that are measured, and recorded, at most
const held = new Map(), recordings = new Map(), losses = new Map(); // the last few of each

const scheme_of = (name) => carried.schemes.find((scheme) => scheme.name === name) ?? parse_scheme(name);
const calibration_of = (data, scheme) => ({ absmax: data.calibration.absmax, exponents: data.calibration.exponents[scheme.name] ?? {} });

function kept(cache, key, make, limit = 3) {
  const value = cache.get(key) ?? make();
  cache.delete(key);
  cache.set(key, value);
  while (cache.size > limit) cache.delete(cache.keys().next().value);
  return value;
}

function model_of(name) {
  return kept(held, name, () => quantized(source, scheme_of(name)));
}

function quantized(from, scheme) {
  const calibration = calibration_of(carried.model, scheme), model = quantize_model(from, scheme, calibration);
  model.smoothing = Object.keys(scheme.smooth).length ? calibration.exponents : null;
  return model;
}

// A forward as Python recorded it. Arrays lie in the blob.
function restored(scheme, steps, blob) {
  const value = (x) => {
    if (Array.isArray(x)) return x.map(value);
    if (x === null || typeof x !== "object") return x;
    if (!x.array) return Object.fromEntries(Object.entries(x).map(([name, part]) => [name, value(part)]));
    const [dtype, shape, at] = x.array;
    return tensor(shape, new BLOB_ARRAYS[dtype](blob.buffer, at, size(shape)));
  };
  const { config, calibration } = carried.model, smoothing = calibration.exponents[scheme.name] ?? null;
  const decoded = steps.map((step) => ({ ...step, arguments: step.arguments.map(value), result: value(step.result) }));
  return new Recording({ config, scheme, smoothing }, carried.recorded.tokens, decoded);
}

function recording_of(name, tokens) {
  if (carried.recorded) return recordings.get(name);
  return kept(recordings, `${name} ${tokens}`, () => Recording.of(model_of(name), tokens), 4);
}

// Bits for each byte of a paragraph under a scheme.
const paragraph_of = (text) => tokenizer.encode(text).slice(0, PARAGRAPH);
const loss_of = (name, text) => kept(losses, `${name} ${text}`, () => bits_per_byte(model_of(name), tokenizer, paragraph_of(text)));

const REQUESTS = {
  async open({ data, weights }) {
    const [json, planes] = await Promise.all([gunzip(data), gunzip(weights)]);
    carried = JSON.parse(new TextDecoder().decode(json));
    if (carried.recorded) {
      for (const scheme of carried.schemes) recordings.set(scheme.name, restored(scheme, carried.recorded.forwards[scheme.name], planes));
    } else {
      source = checkpoint(carried.model.config, carried.model.tensors, planes);
      tokenizer = new Tokenizer(carried.tokenizer, carried.special);
    }
    return { recorded: carried.recorded?.tokens.length, name: carried.name, config: carried.model.config, schemes: carried.schemes.map(({ name }) => name), tensors: carried.model.tensors };
  },

  encode({ text }) {
    const tokens = tokenizer.encode(text);
    return { tokens, pieces: tokens.map((token) => tokenizer.decode([token])) };
  },

  async generate({ prompt, scheme, maxNewTokens = 40, seed = 0, temperature = 0, topK = 0, topP = 1 }, progress) {
    const model = model_of(scheme), tokens = [], logits = [];
    const options = { maxNewTokens, seed, temperature, top_k: topK, top_p: topP, ...carried.special };
    const text = () => tokenizer.decode(carried.special.ends.includes(tokens.at(-1)) ? tokens.slice(0, -1) : tokens);
    const started = performance.now();
    let first = 0;
    for (const chosen of generate(model, tokenizer.encode(prompt), options)) {
      first = first || performance.now();
      tokens.push(chosen.token);
      logits.push(chosen.logits);
      progress({ tokens: tokens.length, text: text() });
    }
    const seconds = (performance.now() - first) / 1000;
    return {
      tokens, text: text(), logits_sha256: await sha256(logits), prefill_seconds: (first - started) / 1000,
      tokens_per_second: tokens.length > 1 ? (tokens.length - 1) / seconds : null,
    };
  },

  async verify({ schemes }, progress) {
    const rows = [], put = (row) => progress(rows[rows.push(row) - 1]);
    for (const row of check_operations(carried.vectors)) put(row);
    tiny ??= checkpoint(carried.tiny.config, carried.tiny.tensors, base64_bytes(carried.tiny.weights));
    for (const [title, data, from] of [["tiny model", carried.tiny, tiny], ...(carried.recorded ? [] : [["this model", carried.model, source]])]) {
      for (const name of Object.keys(data.expected?.logits_sha256.schemes ?? {})) {
        const scheme = parse_scheme(name);
        if (title === "this model" && !(schemes ?? carried.schemes.map((s) => s.name)).includes(name)) continue;
        put(await check_model(title, from, scheme, calibration_of(data, scheme), data.expected));
      }
    }
    return { rows, ok: rows.every((row) => row.failed === 0) };
  },

  record({ prompt, scheme }) {
    if (carried.recorded) {
      const { tokens, pieces } = carried.recorded;
      return { tokens, pieces, sites: recording_of(scheme).sites };
    }
    const tokens = tokenizer.encode(prompt).slice(0, PROMPT);
    const recording = recording_of(scheme, tokens);
    recording_of("fp32", tokens);
    return { tokens, pieces: tokens.map((token) => tokenizer.decode([token])), sites: recording.sites };
  },

  explain({ scheme, tokens, site, token, channel }) {
    return explain(recording_of(scheme, tokens), recording_of("fp32", tokens), site, token, channel);
  },

  state({ scheme, tokens, layer, token }) {
    return state_of(recording_of(scheme, tokens), layer, token);
  },

  tile({ scheme, tokens, layer, token, channel }) {
    return scan_of(recording_of(scheme, tokens).made.get(`layers.${layer}.scan`).step, token, channel);
  },

  codes({ tokens, layer, part, bits, granularity }) {
    const at = `layers.${layer}.in_proj`;
    const x = part === "weight" ? source.read(`${at}.weight`) : recording_of("fp32", tokens).value(`layers.${layer}.norm`);
    const codes = coded(x, bits, granularity);
    return { ...histogram(codes), error: relative_error(x.data, codes.value.data), scales: codes.scales };
  },

  paragraph({ text, part, bits, granularity }) {
    let scheme = { ...parse_scheme("fp32"), name: "page" }, from = source;
    if (part === "weight" && granularity === "groups") from = in_groups(source, bits, 64);
    else if (part === "weight") scheme.weights = alike(LINEAR_WEIGHTS, { bits, scale: granularity === "per_row" ? "per_channel" : "per_tensor" });
    else scheme.inputs = alike(LINEAR_LAYERS, { bits, scale: granularity === "per_row" ? "per_token" : "per_tensor" });
    return { value: bits_per_byte(quantize_model(from, scheme, {}), tokenizer, paragraph_of(text)), plain: loss_of("fp32", text) };
  },

  outlier({ tokens, layer, channel, power, remedy, bits }) {
    const x = recording_of("fp32", tokens).value(`layers.${layer}.norm`);
    return outlier(x, source.read(`layers.${layer}.in_proj.weight`), { channel, power, remedy, bits });
  },

  compare({ tokens, a, b }) {
    return compare(recording_of(a, tokens), recording_of(b, tokens));
  },

  scheme_losses({ text, a, b }) {
    return { a: loss_of(a, text), b: loss_of(b, text) };
  },

  weight({ name, index }) {
    const x = source.read(name), value = x.data[index], bits = half_bits(value);
    return { value, bits, shape: x.shape, flips: bits < 0 ? null : Array.from({ length: 16 }, (_, bit) => HALVES[bits ^ (1 << bit)]) };
  },

  async flip({ scheme, tokens, name, index, bit }) {
    const before = recording_of(scheme, tokens), after = Recording.of(quantized(flipped(source, name, index, bit), scheme_of(scheme)), tokens);
    const last = (recording) => recording.value(recording.output("lm_head")).data;
    return { ...first_break(before, after), before: await sha256([last(before)]), after: await sha256([last(after)]) };
  },
};

onmessage = async ({ data: { id, call, ...request } }) => {
  try {
    const result = await REQUESTS[call](request, (progress) => postMessage({ id, progress }));
    postMessage({ id, result });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
};
