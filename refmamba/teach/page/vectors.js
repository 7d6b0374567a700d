// The test vectors: their values, the comparison of results, and whole models' hashes (tests/vectors/README.md).
"use strict";

const ARRAYS = { f32: Float32Array, f64: Float64Array, i8: Int8Array, i16: Int16Array, i32: Int32Array, i64: Float64Array, u8: Uint8Array };

function decode_value(value) {
  if (value === null || typeof value !== "object") return value;
  if (value.codes) return Object.fromEntries(Object.entries(value.codes).map(([name, field]) => [name, decode_value(field)]));
  if (value.fixed_point) return { q: decode_value(value.fixed_point.q), exponent: decode_value(value.fixed_point.exponent) };
  if (value.tuple) return value.tuple.map(decode_value);
  if (value.float) return hexadecimal_float(value.float);
  const name = Object.keys(value).find((key) => key !== "shape"), values = value[name];
  if (name !== "f32" && name !== "f64") return tensor(value.shape, ARRAYS[name].from(values));
  const words = values ? values.split(" ") : [], bytes = new DataView(new ArrayBuffer(8));
  const read = (word) => {
    bytes.setBigUint64(0, BigInt(`0x${word.padEnd(16, "0")}`));
    return name === "f32" ? bytes.getFloat32(0) : bytes.getFloat64(0);
  };
  return tensor(value.shape, ARRAYS[name].from(words, read));
}

// "0x1.8p+0", as C writes a float64
function hexadecimal_float(text) {
  const [, sign, whole, fraction, exponent] = /^(-?)0x([01])(?:\.([0-9a-f]+))?p([+-]\d+)$/.exec(text);
  const value = Number(`0x${whole}${fraction ?? ""}`) * two_to(Number(exponent)) * two_to(-4 * (fraction ?? "").length);
  return sign ? -value : value;
}

// Steps between two float32 values: 0 for two NaN, and for both zeros.
function steps_between(a, b) {
  if (Number.isNaN(a) && Number.isNaN(b)) return 0;
  const place = (x) => (bits_of(x) < 0 ? -(bits_of(x) & 0x7fffffff) : bits_of(x));
  return Math.abs(place(a) - place(b));
}

function same(expected, result, compare) {
  const [rule, limit] = compare.split(":");
  if (rule === "ulp") return steps_between(expected, result) <= Number(limit);
  if (rule === "value") return expected === result;
  return Object.is(expected, result);
}

// What differs, in words; null where nothing does.
function difference(expected, result, compare) {
  if (Array.isArray(expected)) return expected.map((part, i) => difference(part, result[i], compare)).find(Boolean) ?? null;
  if (expected?.data) {
    if (String(expected.shape) !== String(result.shape)) return `the shape is ${result.shape}, not ${expected.shape}`;
    const at = expected.data.findIndex((value, i) => !same(value, result.data[i], compare));
    return at < 0 ? null : `element ${at} is ${result.data[at]}, not ${expected.data[at]}`;
  }
  if (expected?.q) return ["q", "scale", "exponent", "steps"].filter((name) => expected[name]).map((name) => difference(expected[name], result[name], compare)).find(Boolean) ?? null;
  return same(expected, result, compare) ? null : `is ${result}, not ${expected}`;
}

function check_vector(operation, vector) {
  const given = vector.arguments.map(decode_value), raises = Boolean(vector.result?.raises);
  let result;
  try {
    result = OPERATIONS[operation](...(operation === "embed" ? [Array.from(given[0].data), given[1]] : given));
  } catch (error) {
    return raises && error instanceof NonFiniteError ? null : String(error);
  }
  if (raises) return "a NaN or an infinity was not refused";
  const changed = difference(vector.arguments.map(decode_value), given, "exact");
  return changed ? `an argument was changed: ${changed}` : difference(decode_value(vector.result), result, vector.compare);
}

// One row for each operation: {check, cases, failed, first}, first being the first difference in words.
function* check_operations(vectors) {
  for (const [operation, list] of Object.entries(vectors)) {
    const wrong = list.map((vector) => [vector.name, check_vector(operation, vector)]).filter(([, words]) => words);
    yield { check: operation, cases: list.length, failed: wrong.length, first: wrong.length ? wrong[0].join(": ") : null };
  }
}

// One row for each scheme that the frozen hashes know. calibration: as quantize_model takes it, of a scheme.
async function check_model(title, source, scheme, calibration, expected) {
  const model = quantize_model(source, scheme, calibration);
  const logits = expected.sequences.map((tokens) => forward(model, tokens, null, "all").logits.data);
  const hash = await sha256(logits), frozen = expected.logits_sha256.schemes[scheme.name];
  return { check: `${title}, ${scheme.name}`, cases: 1, failed: Number(hash !== frozen), first: hash === frozen ? null : `${hash}, not ${frozen}` };
}
