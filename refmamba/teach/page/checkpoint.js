// What the page carries: gzip and base64 undone, and a checkpoint's tensors read from byte planes.
"use strict";

function base64_bytes(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function gunzip(base64) {
  const stream = new Blob([base64_bytes(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// float16 -> float32 is exact; there are only 65,536 of them.
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + fraction) * two_to(exponent - 25) : fraction * two_to(-24));
});

// tensors: [[name, shape], ...] in the order of the planes. planes: all first (lowest) bytes of the numbers, then all second
// bytes, and so on: two of them for float16, four for float32.
function checkpoint(config, tensors, planes) {
  const places = new Map(), total = tensors.reduce((n, [, shape]) => n + size(shape), 0), width = planes.length / total;
  let at = 0;
  for (const [name, shape] of tensors) {
    places.set(name, { shape, at });
    at += size(shape);
  }
  const read = (name) => {
    const { shape, at } = places.get(name), x = floats(shape);
    for (let i = 0; i < x.data.length; i++) {
      const low = planes[at + i] | (planes[total + at + i] << 8);
      x.data[i] = width === 2 ? HALVES[low] : float_of(low | (planes[2 * total + at + i] << 16) | (planes[3 * total + at + i] << 24));
    }
    return x;
  };
  return { config, names: [...places.keys()], has: (name) => places.has(name), read };
}
