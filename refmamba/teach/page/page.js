// What the reader sees and touches. Every number comes from the worker.
"use strict";

const $ = (id) => document.getElementById(id);
let worker, opened, recorded = null, shown = null;
const waiting = new Map();
const view = { site: "layers.0.in_proj.in_codes", token: 0, channel: 7, layer: 0, tile: [0, 0] };
const score = { right: 0, asked: 0 };

// --------------------------------------------------------------------------------------------------- the worker

// Ask the worker; progress is called with what comes before the result.
function ask(call, request = {}, progress = () => {}) {
  return new Promise((resolve, reject) => {
    const id = ask.last = (ask.last ?? 0) + 1;
    waiting.set(id, { resolve, reject, progress });
    worker.postMessage({ id, call, ...request });
  });
}

function answered({ data: { id, result, error, progress } }) {
  const { resolve, reject, progress: show } = waiting.get(id);
  if (progress !== undefined) return show(progress);
  waiting.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
}

// Only the last call within a moment counts, and only the last answer is shown.
function latest(work, delay = 150) {
  let timer, calls = 0;
  return (...values) => {
    clearTimeout(timer);
    const call = ++calls;
    return new Promise((resolve) => {
      timer = setTimeout(async () => {
        try {
          await work(() => call === calls, ...values);
        } catch (error) {
          say(error.message);
        }
        resolve();
      }, delay);
    });
  };
}

// The names of the schemes in groups, by what they quantize.
function scheme_options() {
  const groups = Object.groupBy(opened.schemes, (name) => (/^w\d-/.test(name) ? "weights" : /^w\da/.test(name) ? "weights and outputs" : "general"));
  return Object.entries(groups).map(([label, names]) => element("optgroup", { label }, ...names.map((name) => element("option", { value: name }, name))));
}

const say = (words) => { $("status").textContent = words; };

// ------------------------------------------------------------------------------------------------------- pieces

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "html") node.innerHTML = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const whole = (id, low, high) => Math.min(high, Math.max(low, Math.trunc(Number($(id).value)) || 0));
const percent = (x) => `${(100 * x).toFixed(x < 0.001 ? 3 : 1)} %`;
const short = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 || Math.abs(x) >= 1e6 ? x.toExponential(2) : String(Number(x.toPrecision(4))));

function svg(width, height, inner, label) {
  return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escaped(label)}">${inner}</svg>`;
}

// Words below a chart, from its left end to its right.
const ends_of = (...words) => `<div class="ends">${words.map((word) => `<span>${word}</span>`).join("")}</div>`;

function line_chart(values, label, marks = "") {
  const high = Math.max(...values, 0), low = Math.min(...values, 0), span = high - low || 1;
  const y = (value) => 8 + (104 * (high - value)) / span, x = (i) => (600 * i) / Math.max(1, values.length - 1);
  const points = values.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  const zero = `<line x1="0" x2="600" y1="${y(0)}" y2="${y(0)}" stroke="var(--line)"/>`;
  return svg(600, 120, `${zero}<polyline points="${points}" fill="none" stroke="var(--positive)" stroke-width="1.5"/>${marks}`, label);
}

function bar_chart(counts, high, label) {
  const top = Math.max(...counts), step = 600 / counts.length;
  const bars = counts.map((count, i) => {
    const height = count ? Math.max(1.5, (110 * Math.log1p(count)) / Math.log1p(top)) : 0, end = Math.abs(i - high) === high;
    return `<rect x="${(i * step).toFixed(2)}" y="${(116 - height).toFixed(1)}" width="${Math.max(0.8, step * 0.85).toFixed(2)}" height="${height.toFixed(1)}" fill="var(--${end ? "negative" : "positive"})"/>`;
  });
  return svg(600, 118, `${bars.join("")}`, label) + ends_of(`−${high}`, "0", high);
}

// A colour for a value between -1 and 1: orange, paper, blue. Square root, so that small values are seen.
function shade(value, [negative, zero, positive]) {
  const end = value < 0 ? negative : positive, part = Math.sqrt(Math.min(1, Math.abs(value)));
  return zero.map((from, i) => Math.round(from + (end[i] - from) * part));
}

function palette() {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  return ["--negative", "--paper", "--positive"].map((name) => {
    const swatch = element("span", { style: `color:var(${name})` });
    document.body.append(swatch);
    probe.fillStyle = getComputedStyle(swatch).color;
    swatch.remove();
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
  });
}

// Tiles of a canvas: value(i) in -1 .. 1 for column x and row y; one size in device pixels.
function paint(canvas, width, height, tile, place) {
  const colours = palette(), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [width, height];
  canvas.style.aspectRatio = `${width} / ${height}`;
  place((x, y, value) => {
    context.fillStyle = `rgb(${shade(value, colours).join(" ")})`;
    context.fillRect(x, y, tile, tile);
  });
  return context;
}

// --------------------------------------------------------------------------------------------- writing, recording

async function write() {
  const request = {
    prompt: $("prompt").value, scheme: $("scheme").value, maxNewTokens: whole("count", 1, 400),
    seed: $("seed").value || 0, temperature: Number($("temperature").value) || 0,
  };
  $("generate").disabled = true;
  say("Writing …");
  show_command(request);
  const show = ({ text }) => $("text").replaceChildren(element("span", { class: "prompt" }, request.prompt), text);
  try {
    const result = await ask("generate", request, show);
    show(result);
    $("hash").textContent = result.logits_sha256;
    say(`${result.tokens.length} tokens${result.tokens_per_second ? `, ${result.tokens_per_second.toFixed(0)} a second` : ""}, under ${request.scheme}, in this page.`);
  } catch (error) {
    say(error.message);
  }
  $("generate").disabled = false;
}

function show_command({ prompt, scheme, maxNewTokens, seed, temperature }) {
  const quoted = `'${prompt.replaceAll("'", `'\\''`)}'`, sampled = temperature > 0 ? ` --temperature ${temperature} --seed ${seed}` : "";
  $("command").textContent = `refmamba generate ${quoted} --model ${opened.name} --scheme ${scheme} --max-new-tokens ${maxNewTokens}${sampled} --json`;
}

const show_tokens = latest(async (current) => {
  const { tokens, pieces } = await ask("encode", { text: $("prompt").value });
  if (current()) draw_tokens(tokens, pieces);
}, 60);

function draw_tokens(tokens, pieces) {
  $("tokens").replaceChildren(...pieces.map((piece, t) =>
    element("button", { type: "button", title: `token ${t}: ${tokens[t]}`, "aria-pressed": String(t === view.token), onclick: () => follow({ token: t }) }, piece.replaceAll("\n", "⏎"))));
}

const record = latest(async (current) => {
  const result = await ask("record", { prompt: $("prompt").value, scheme: $("scheme").value });
  if (!current()) return;
  recorded = { ...result, scheme: $("scheme").value };
  const last = recorded.tokens.length - 1;
  $("state-token").max = last;
  if (!record.done) Object.assign(view, { token: Math.min(view.token, last) }, from_fragment());
  record.done = true;
  draw_tokens(recorded.tokens, recorded.pieces);
  await Promise.all([show_number(), show_state(), ...(opened.recorded ? [] : [show_codes(), show_outlier(), show_weight()])]);
}, 200);

const request_of = (more) => ({ scheme: recorded.scheme, tokens: recorded.tokens, ...more });

// -------------------------------------------------------------------------------------------------- 1 · the state

const show_state = latest(async (current) => {
  const layer = whole("state-layer", 0, opened.config.n_layer - 1), token = whole("state-token", 0, recorded.tokens.length - 1);
  const state = await ask("state", request_of({ layer, token }));
  if (!current()) return;
  $("state-word").textContent = `${token}: ${JSON.stringify(recorded.pieces[token])}`;
  shown = { ...state, layer, token };
  draw_tiles();
  draw_forgetting();
  await show_tile();
}, 0);

function tile_places() {
  const canvas = $("tiles"), ratio = devicePixelRatio, size = Math.max(2, Math.round((canvas.clientWidth < 600 ? 4 : 6) * ratio));
  const width = Math.floor(canvas.clientWidth * ratio), across = Math.max(1, Math.floor(width / size));
  return { size, across, ratio, bands: Math.ceil(shown.channels / across), gap: size, width: Math.min(across, shown.channels) * size };
}

function draw_tiles() {
  const { size, across, bands, gap, width } = tile_places(), { h, channels, states } = shown;
  const largest = h.reduce((m, value) => Math.max(m, Math.abs(value)), 0) || 1, band = states * size + gap;
  const context = paint($("tiles"), width, bands * band - gap, size, (put) => {
    for (let c = 0; c < channels; c++) for (let s = 0; s < states; s++) put((c % across) * size, Math.floor(c / across) * band + s * size, h[c * states + s] / largest);
  });
  const [c, s] = view.tile;
  context.lineWidth = Math.max(2, size / 3);
  context.strokeStyle = getComputedStyle($("tiles")).color;
  context.strokeRect((c % across) * size - 1, Math.floor(c / across) * band + s * size - 1, size + 2, size + 2);
  $("tiles").setAttribute("aria-label", `State h of layer ${shown.layer} after token ${shown.token}: ${channels} channels of ${states} states, the largest magnitude ${short(largest)}.`);
}

const half_life = (keeps) => (keeps >= 1 ? Infinity : keeps <= 0 ? 0 : Math.log(0.5) / Math.log(keeps));

function draw_forgetting() {
  const sorted = shown.keeps.map(half_life).sort((a, b) => a - b), logs = sorted.map((n) => Math.log10(Math.min(1e5, Math.max(0.1, n))));
  const at = sorted.indexOf(half_life(shown.keeps[view.tile[0]])), span = Math.max(...logs, 0) - Math.min(...logs, 0) || 1;
  const x = (600 * at) / Math.max(1, sorted.length - 1), y = 8 + (104 * (Math.max(...logs, 0) - logs[at])) / span;
  const ends = `<circle cx="${x}" cy="${y}" r="4" fill="var(--mark)"/>`;
  $("forget").innerHTML = line_chart(logs, `Half-lives from ${short(sorted[0])} to ${short(sorted.at(-1))} tokens; the marked channel has ${short(sorted[at])}.`, ends) + ends_of(`${short(sorted[0])} tokens`, `${short(sorted.at(-1))} tokens`);
}

const show_tile = latest(async (current) => {
  const [channel, s] = view.tile, { layer, token } = shown;
  const { states } = await ask("tile", request_of({ layer, token, channel })), { A_bar, before, B_bar_u, after } = states[s];
  if (!current()) return;
  const equation = [math`h = Ā · h + B̄u`, math`= ${number(A_bar)} · ${number(before)}`, math`+ ${number(B_bar_u)}`, math`= ${number(after)}`];
  $("tile").innerHTML = `Channel ${channel}, state ${s}: ${equation.map((part) => `<math>${part}</math>`).join(" ")}. The channel keeps ${percent(shown.keeps[channel])} at this token: half is forgotten in ${short(half_life(shown.keeps[channel]))} tokens.`;
  $("tile").append(" ", element("button", { type: "button", onclick: () => follow({ site: `layers.${layer}.scan`, token, channel }, true) }, "Follow this channel"));
}, 30);

function move_tile(c, s) {
  view.tile = [Math.min(shown.channels - 1, Math.max(0, c)), Math.min(shown.states - 1, Math.max(0, s))];
  draw_tiles();
  draw_forgetting();
  show_tile();
}

function point_tile(event) {
  if (!shown) return;
  const { size, across, gap } = tile_places(), canvas = $("tiles"), scale = canvas.width / canvas.clientWidth, band = shown.states * size + gap;
  const x = Math.floor((event.offsetX * scale) / size), y = event.offsetY * scale;
  const c = Math.floor(y / band) * across + x, s = Math.floor((y % band) / size);
  if (c < shown.channels && s < shown.states && (c !== view.tile[0] || s !== view.tile[1])) move_tile(c, s);
}

// ---------------------------------------------------------------------------------------------------- 2 · follow

const layer_of_site = (site) => (site.startsWith("layers.") ? Number(site.split(".")[1]) : null);
const name_of_site = (site) => (site.startsWith("layers.") ? site.split(".").slice(2).join(".") : site);

// Change what is looked at. scroll: also bring it into view.
function follow(change, scroll = false) {
  Object.assign(view, change);
  if (scroll) $("follow").scrollIntoView();
  return show_number();
}

const show_number = latest(async (current) => {
  if (!recorded) return;
  if (!recorded.sites.includes(view.site)) view.site = recorded.sites.find((site) => site.startsWith(view.site.replace(/\.[a-z_]+$/, "."))) ?? recorded.sites[1];
  view.token = Math.min(recorded.tokens.length - 1, Math.max(0, view.token));
  view.channel = Math.max(0, view.channel);
  let e = await ask("explain", request_of({ site: view.site, token: view.token, channel: view.channel })).catch(() => null);
  if (e === null || view.channel >= e.channels) {
    view.channel = 0;
    e = await ask("explain", request_of({ site: view.site, token: view.token, channel: 0 }));
  }
  if (!current()) return;
  draw_controls(e);
  draw_number(e);
  to_fragment();
}, 0);

function draw_controls(e) {
  const layer = layer_of_site(view.site), sites = recorded.sites.filter((site) => layer_of_site(site) === layer);
  $("layer").max = opened.config.n_layer - 1;
  $("layer").value = layer ?? "";
  $("site").replaceChildren(...sites.map((site) => element("option", { value: site }, name_of_site(site))));
  $("site").value = view.site;
  Object.assign($("token"), { max: recorded.tokens.length - 1, value: view.token });
  Object.assign($("channel"), { max: e.channels - 1, value: view.channel });
  document.querySelectorAll("#tokens button").forEach((button, t) => button.setAttribute("aria-pressed", String(t === view.token)));
}

function bit_row(value, width, kind) {
  const bits = (BigInt(value) & ((1n << BigInt(width)) - 1n)).toString(2).padStart(width, "0");
  const part = (i) => (i === 0 ? "sign" : kind && i <= kind ? "exponent" : "fraction");
  return element("div", { class: "bitrow", role: "img", "aria-label": `bits ${bits}` }, ...[...bits].map((bit, i) => element("span", { class: part(i) }, bit)));
}

function facts(rows) {
  return element("dl", { class: "facts" }, ...rows.filter(Boolean).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

// The element of another site as a button that goes to it.
function link(words, site, token, channel) {
  return element("button", { type: "button", onclick: () => follow({ site, token, channel }).then(() => $("number").focus({ preventScroll: true })) }, `${words} ← ${name_of_site(site)} [${token}, ${channel}]`);
}

function draw_number(e) {
  const form = FORMS[e.form], written = formula(e.form, e.symbols), place = recorded.sites.indexOf(e.site) + 1;
  const heading = element("h3", {}, `${e.site} [token ${e.token}, channel ${e.channel}]`);
  const says = element("p", {}, `Operation ${place} of ${recorded.sites.length}: ${form.title}, equation (${form.equation}). ${form.says}`);
  const formulas = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The formula, and the same with this element's numbers", html: written.symbols + written.numbers.replace("<math", '<math class="numbers"') });
  const strip = element("canvas", { role: "img", "aria-label": `All ${e.channels} channels of this value at this token; the followed one is ${e.channel}.` });
  const body = element("div", { class: "panes" });
  const quiz = $("predict").checked && question(e, () => reveal(e, body, formulas));
  $("number").replaceChildren(heading, says, ...(quiz ? [quiz] : []), formulas, strip, body);
  draw_strip(strip, e);
  if (quiz) formulas.hidden = true;
  else reveal(e, body, formulas);
}

function reveal(e, body, formulas) {
  formulas.hidden = false;
  const result = e.code ? [
    ["code", digits(e.code.q)],
    ["it stands for", digits(e.stands_for)],
  ] : [
    [e.sum ? "sum" : "value", digits(e.result)],
    e.sum && ["it stands for", digits(e.stands_for)],
  ];
  const first = element("div", {}, element("h4", {}, "Result"), facts(result));
  if (e.code) first.append(bit_row(e.code.q, e.code.bits, 0));
  else if (e.bits !== null) first.append(bit_row(e.bits, 32, 8));
  const errors = element("div", {}, element("h4", {}, "Error"), facts([
    ["added by this operation", e.form === "integer_product" ? "0: whole numbers are added exactly" : digits(e.added)],
    e.plain === null ? ["beside fp32", "not to be compared: it is rotated, or one part of a sum"] : ["without quantization (fp32)", digits(e.plain)],
    e.plain !== null && ["error so far", digits(e.so_far)],
  ]));
  body.append(first, errors);
  if (e.rounding) body.append(rounding(e));
  if (e.inputs.length) body.append(element("div", {}, element("h4", {}, "Read from"), element("p", { class: "buttons" }, ...e.inputs.map((input) => link(...input)))));
  if (e.partial) body.append(partial_sums(e));
  if (e.states) body.append(states_table(e));
}

function rounding(e) {
  const { before, after, unit } = e.rounding, tie = 0.5 - Math.abs(before - after) / unit, words = [["before", digits(before)], ["after", digits(after)]];
  if (e.saturates) words.push(["beyond the last code", element("span", { class: "warn" }, "it saturates")]);
  else words.push(["distance to the tie", `${short(tie)} of a step of ${short(unit)}`]);
  if (e.widest) {
    const is_widest = e.widest.channel === e.channel && e.widest.token === e.token;
    words.push(["the scale is taken by", is_widest ? "this very value" : `token ${e.widest.token}, channel ${e.widest.channel}: ${digits(e.widest.value)}, ${short(Math.abs(e.widest.value / (e.symbols.x || Infinity)))} times this one`]);
  }
  if (e.calibrated !== undefined) words.push(["calibrated largest magnitude", digits(e.calibrated)]);
  return element("div", {}, element("h4", {}, "Rounding"), facts(words));
}

function partial_sums(e) {
  const rows = e.partial.largest.map(([k, q, w, product]) => element("tr", {}, element("td", {}, element("button", { type: "button", onclick: () => follow({ site: e.partial.codes, channel: k }) }, String(k))), ...[q, w, product, e.partial.sums[k]].map((value) => element("td", {}, digits(value)))));
  const head = element("tr", {}, ...["channel", "input", "weight", "product", "sum until here"].map((name) => element("th", { scope: "col" }, name)));
  return element("div", { class: "all" }, element("h4", {}, "The accumulator, channel by channel, and the eight largest products"),
    element("div", { html: line_chart(e.partial.sums, `Partial sums over ${e.partial.sums.length} channels, ending at ${digits(e.result)}`) }),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The largest products" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))));
}

function states_table(e) {
  const head = element("tr", {}, ...["state", "Ā", "h before", "B̄u", "h", "C", "C·h"].map((name) => element("th", { scope: "col" }, name)));
  const rows = e.states.map((s, i) => element("tr", {}, element("td", {}, String(i)), ...[s.A_bar, s.before, s.B_bar_u, s.after, s.C, s.term].map((value) => element("td", {}, short(value)))));
  return element("div", { class: "all" }, element("h4", {}, "The states of this channel"), element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "States" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))));
}

function draw_strip(canvas, e) {
  const ratio = devicePixelRatio, width = canvas.clientWidth * ratio, size = Math.max(Math.round(4 * ratio), Math.floor(width / 256)), per_row = Math.min(e.row.length, Math.floor(width / size));
  const largest = e.row.reduce((m, value) => Math.max(m, Math.abs(value)), 0) || 1, lines = Math.ceil(e.row.length / per_row), hidden = $("predict").checked && (e.code || e.sum);
  const context = paint(canvas, per_row * size, lines * size, size, (put) => e.row.forEach((value, i) => put((i % per_row) * size, Math.floor(i / per_row) * size, hidden ? 0 : value / largest)));
  context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = 2;
  context.strokeRect((e.channel % per_row) * size, Math.floor(e.channel / per_row) * size, size, size);
  canvas.onclick = (event) => {
    const scale = canvas.width / canvas.clientWidth, c = Math.floor((event.offsetY * scale) / size) * per_row + Math.floor((event.offsetX * scale) / size);
    if (c < e.row.length) follow({ channel: c });
  };
}

// Step to another operation, layer, token or channel: so many places of an axis on.
function step(axis, places) {
  const { sites } = recorded, at = sites.indexOf(view.site);
  if (axis === "site") follow({ site: sites[Math.min(sites.length - 1, Math.max(0, at + places))] });
  else if (axis === "layer") {
    const layer = Math.min(opened.config.n_layer - 1, Math.max(0, (layer_of_site(view.site) ?? (places > 0 ? -1 : opened.config.n_layer)) + places));
    const name = layer_of_site(view.site) === null ? "norm" : name_of_site(view.site);
    follow({ site: `layers.${layer}.${name}` });
  } else follow({ [axis]: Math.max(0, view[axis] + places) });
}

const KEYS = {
  ArrowLeft: ["site", -1], ArrowRight: ["site", 1], ArrowUp: ["layer", -1], ArrowDown: ["layer", 1], "[": ["token", -1], "]": ["token", 1], ",": ["channel", -1], ".": ["channel", 1],
};

// ---------------------------------------------------------------------------------------------- 7 · predict first

function judge(right, words) {
  score.asked++;
  score.right += right;
  $("score").textContent = `You predicted ${score.right} of ${score.asked} rightly.`;
  return element("span", { class: right ? "right" : "warn" }, `${right ? "Right" : "No"}: ${words}`);
}

// A question about an element; null where there is none to ask. on_answer: called when it is answered.
function question(e, on_answer) {
  const form = element("form", { class: "buttons", id: "question" }), answer = element("span", { "aria-live": "polite" });
  const finish = (right, words) => {
    form.querySelectorAll("input, button").forEach((control) => { control.disabled = true; });
    answer.replaceChildren(judge(right, words));
    on_answer();
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  if (e.sum) {
    const sign = Math.sign(e.result);
    const press = (words, value) => element("button", { type: "button", onclick: () => finish(sign === value, `the sum is ${digits(e.result)}.`) }, words);
    form.append("Is the sum below or above zero?", press("below", -1), press("above", 1), answer);
  } else if (e.code && e.symbols.s !== undefined) {
    const guess = element("input", { type: "number", required: "", "aria-label": "Your code" });
    const check = () => guess.value !== "" && finish(Math.abs(Number(guess.value) - e.code.q) <= 1, `${digits(e.symbols.x)} · ${digits(e.symbols.s)} is ${digits(e.rounding.before)}, so the code is ${e.code.q}.`);
    form.append(`x is ${digits(e.symbols.x)} and s is ${digits(e.symbols.s)}. Which code is it, to within 1?`, guess, element("button", { type: "submit" }, "Check"), answer);
    form.addEventListener("submit", check);
  } else return null;
  return form;
}

// -------------------------------------------------------------------------------------------------- 3 · bits

const lab_request = () => ({
  layer: whole("bits-layer", 0, opened.config.n_layer - 1), part: $("bits-part").value, bits: whole("bits-bits", 2, 8), granularity: $("bits-scale").value,
});

const show_codes = latest(async (current) => {
  const groups = $("bits-scale").querySelector("[value=groups]");
  groups.disabled = $("bits-part").value === "input";
  if (groups.disabled && $("bits-scale").value === "groups") $("bits-scale").value = "per_row";
  const request = lab_request();
  $("bits-out").textContent = request.bits;
  const codes = await ask("codes", { tokens: recorded.tokens, ...request });
  if (!current()) return;
  $("histogram").innerHTML = bar_chart(codes.counts, codes.high, `Codes from −${codes.high} to ${codes.high}; ${codes.used} of them are used.`);
  $("histogram-words").textContent = `${codes.used} of ${2 * codes.high + 1} codes are used; ${percent(codes.zero)} are 0, ${percent(codes.ends)} are at an end (orange). Relative error ${percent(codes.error)}, with ${codes.scales} ${codes.scales === 1 ? "scale" : "scales"}. Heights are logarithmic.`;
  show_paragraph();
}, 40);

const show_paragraph = latest(async (current) => {
  if (!show_paragraph.started) return;
  $("paragraph-words").textContent = "Measuring …";
  const request = lab_request(), { value, plain } = await ask("paragraph", { text: $("paragraph").value, ...request });
  if (current()) $("paragraph-words").textContent = `${value.toFixed(3)} bits a byte with the ${request.part === "weight" ? "weights" : "inputs"} of all four linear layers in every block coded so, in ${request.bits} bits; ${plain.toFixed(3)} without quantization.`;
}, 250);

// ------------------------------------------------------------------------------------------------ 4 · outlier

const show_outlier = latest(async (current) => {
  const channel = whole("outlier-channel", 0, opened.config.d_model - 1), power = whole("outlier-power", 0, 10), bits = whole("outlier-bits", 2, 8);
  const remedy = document.querySelector("[name=remedy]:checked").value, layer = whole("outlier-layer", 0, opened.config.n_layer - 1);
  $("outlier-out").textContent = power;
  const result = await ask("outlier", { tokens: recorded.tokens, layer, channel, power, remedy, bits });
  if (!current()) return;
  const step = 600 / result.row.length;
  const bars = result.row.map((q, i) => `<rect x="${(i * step).toFixed(1)}" width="${(step * 0.8).toFixed(1)}" y="${(60 - Math.max(0, (56 * q) / result.high)).toFixed(1)}" height="${Math.max(0.6, (56 * Math.abs(q)) / result.high).toFixed(1)}" fill="var(--${i === channel && remedy !== "hadamard" ? "negative" : "positive"})"/>`).join("");
  $("outlier-codes").innerHTML = svg(600, 120, bars, `Codes of the last token, one bar a channel, from −${result.high} to ${result.high}.`);
  $("outlier-words").textContent = `Codes of the last token's ${result.row.length} channels${remedy === "hadamard" ? ", after the rotation" : " (the grown one in orange)"}: ${new Set(result.row).size} different ones; of all tokens ${percent(result.zero)} are 0. Relative error of in_proj's output, beside what the other channels add to it: ${percent(result.error)}.`;
}, 40);

// -------------------------------------------------------------------------------------------- 5 · two schemes

async function compare_two() {
  const a = $("two-a").value, b = $("two-b").value;
  $("two-words").textContent = "Running both …";
  const rows = await ask("compare", { tokens: recorded.tokens, a, b }), first = rows.find((row) => row.first);
  $("two-words").textContent = first ? `They part at ${first.site} (${first.operation}), token ${first.first[0]}, channel ${first.first[1]}: ${digits(first.a)} under A, ${digits(first.b)} under B. At the logits the relative difference is ${percent(rows.at(-1).error)}.` : "Every value of every operation is the same.";
  const top = Math.max(...rows.map((row) => row.error)) || 1;
  const lines = rows.map((row) => {
    const button = element("button", { type: "button", onclick: () => { set_scheme(b); record().then(() => follow({ site: row.site, token: row.first?.[0] ?? view.token, channel: row.first?.[1] ?? 0 }, true)); } }, row.site);
    return element("tr", row === first ? { class: "first" } : {}, element("td", {}, button), element("td", {}, row.operation), element("td", {}, row.first ? percent(row.error) : "same"), element("td", {}, element("span", { class: "bar", style: `width:${(8 * row.error) / top}rem` })));
  });
  const head = element("tr", {}, ...["value", "operation", "difference", ""].map((name) => element(name ? "th" : "td", {}, name)));
  $("two-table").replaceChildren(element("div", { class: "scroll", style: "max-height:26rem;overflow:auto", tabindex: "0", role: "region", "aria-label": "Differences, operation by operation" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines))));
  lines.indexOf(lines.find((tr) => tr.className)) > 6 && $("two-table").querySelector(".first").scrollIntoView({ block: "nearest" });
}

async function guess_loser(guess) {
  $("two-answer").textContent = "Measuring …";
  const { a, b } = await ask("scheme_losses", { text: $("paragraph").value, a: $("two-a").value, b: $("two-b").value });
  const loser = a > b ? "a" : b > a ? "b" : null;
  $("two-answer").replaceChildren(judge(loser === guess, `A takes ${a.toFixed(4)} bits a byte, B ${b.toFixed(4)}${loser ? "" : ": they lose the same"}.`));
}

// ---------------------------------------------------------------------------------------------------- 6 · flip

const show_weight = latest(async (current) => {
  const name = $("flip-name").value, shape = opened.tensors.find(([parameter]) => parameter === name)[1], columns = shape.at(-1);
  const rows = shape.length > 1 ? shape[0] : 1, row = whole("flip-row", 0, rows - 1), column = whole("flip-column", 0, columns - 1), index = row * columns + column;
  [$("flip-row").max, $("flip-column").max, $("flip-row").value, $("flip-column").value] = [rows - 1, columns - 1, row, column];
  const { value, bits, flips } = await ask("weight", { name, index });
  if (!current()) return;
  if (!flips) {
    $("flip-words").textContent = "This model's weights are no float16.";
    return;
  }
  const button = (_, place) => {
    const bit = 15 - place, kind = bit === 15 ? "sign" : bit >= 10 ? "exponent" : "fraction";
    return element("button", { type: "button", class: kind, "aria-label": `${kind} bit ${bit} is ${(bits >> bit) & 1}: flip it, to ${digits(flips[bit])}`, onclick: () => flip(name, index, bit, value, flips[bit]) }, String((bits >> bit) & 1));
  };
  $("flip-bits").replaceChildren(...Array.from({ length: 16 }, button));
  $("flip-words").textContent = `The weight is ${digits(value)}.`;
}, 40);

async function flip(name, index, bit, value, flipped) {
  $("flip-words").textContent = `${digits(value)} becomes ${digits(flipped)}: running …`;
  try {
    const { first, broken, sites, before, after } = await ask("flip", request_of({ name, index, bit }));
    const words = first ? `the first other bits are in ${first.site} [token ${first.token}, channel ${first.channel}]; ${broken} of ${sites} values differ. The logits' hash was ${before.slice(0, 12)}… and is ${after.slice(0, 12)}….` : "no bit of any value differs: the code stayed the same, and so does the hash.";
    $("flip-words").replaceChildren(`${digits(value)} becomes ${digits(flipped)} under ${recorded.scheme}: ${words} `, first ? element("button", { type: "button", onclick: () => follow({ site: first.site, token: first.token, channel: first.channel }, true) }, "Go there") : "");
  } catch (error) {
    $("flip-words").textContent = `${digits(value)} becomes ${digits(flipped)}: the call fails, as it must. ${error.message}`;
  }
}

// --------------------------------------------------------------------------------------------------- verify

async function verify(options = {}) {
  const body = element("tbody");
  $("verify-table").replaceChildren(element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ...["check", "cases", "result"].map((name) => element("th", { scope: "col" }, name)))), body)));
  $("verify-words").textContent = "Running …";
  const result = await ask("verify", options, (row) => body.append(element("tr", {}, element("td", {}, row.check), element("td", {}, String(row.cases)), element("td", {}, row.failed ? element("span", { class: "warn" }, `${row.failed} differ: ${row.first}`) : "same bits"))));
  $("verify-words").textContent = result.ok ? `All ${result.rows.length} checks passed.` : "Something differs: see the table.";
  return result;
}

// ------------------------------------------------------------------------------------------- address and start

// #layer=3&op=in_proj.acc&token=5&channel=7&scheme=int8 opens that number.
function from_fragment() {
  const values = new URLSearchParams(location.hash.slice(1)), change = {};
  if (values.has("op")) change.site = values.has("layer") ? `layers.${values.get("layer")}.${values.get("op")}` : values.get("op");
  for (const name of ["token", "channel"]) if (values.has(name)) change[name] = Number(values.get(name)) || 0;
  return change;
}

function to_fragment() {
  const layer = layer_of_site(view.site), values = new URLSearchParams();
  if (layer !== null) values.set("layer", layer);
  for (const [name, value] of Object.entries({ op: name_of_site(view.site), token: view.token, channel: view.channel, scheme: recorded.scheme })) values.set(name, value);
  history.replaceState(null, "", `#${values}`);
}

function set_scheme(name) {
  if (![...$("scheme").options].some((option) => option.value === name)) return;
  $("scheme").value = name;
}

function fragment_changed() {
  const values = new URLSearchParams(location.hash.slice(1));
  if (!values.has("op")) return;
  if (values.has("scheme") && values.get("scheme") !== $("scheme").value) {
    const change = from_fragment(); // now: recording rewrites the address
    set_scheme(values.get("scheme"));
    record().then(() => follow(change, true));
  } else follow(from_fragment(), true);
}

function listen() {
  const on = (ids, event, action) => ids.split(" ").forEach((id) => $(id).addEventListener(event, action));
  on("prompt", "input", () => { show_tokens(); record(); });
  on("scheme", "change", () => { record(); });
  on("generate", "click", write);
  on("state-layer state-token", "input", show_state);
  on("state-play", "click", play);
  on("tiles", "pointermove", point_tile);
  on("tiles", "click", point_tile);
  on("tiles", "keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move || !shown) return;
    event.preventDefault();
    move_tile(view.tile[0] + move[0], view.tile[1] + move[1]);
  });
  on("layer", "change", () => step("layer", whole("layer", 0, opened.config.n_layer - 1) - (layer_of_site(view.site) ?? -1)));
  on("site", "change", () => follow({ site: $("site").value }));
  on("token", "change", () => follow({ token: whole("token", 0, recorded.tokens.length - 1) }));
  on("channel", "change", () => follow({ channel: whole("channel", 0, Infinity) }));
  on("previous", "click", () => step("site", -1));
  on("next", "click", () => step("site", 1));
  on("predict", "change", () => show_number());
  on("number", "keydown", (event) => {
    if (!KEYS[event.key] || event.target.tagName === "INPUT" || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    step(...KEYS[event.key]);
    $("number").focus({ preventScroll: true });
  });
  on("bits-part bits-layer bits-bits bits-scale", "input", () => { show_paragraph.started = true; show_codes(); });
  on("paragraph", "input", () => { show_paragraph.started = true; show_paragraph(); });
  on("outlier-layer outlier-channel outlier-power outlier-bits", "input", show_outlier);
  document.querySelectorAll("[name=remedy]").forEach((radio) => radio.addEventListener("change", show_outlier));
  on("two-run", "click", compare_two);
  on("two-loses-a", "click", () => guess_loser("a"));
  on("two-loses-b", "click", () => guess_loser("b"));
  on("flip-name flip-row flip-column", "change", show_weight);
  on("verify-run", "click", () => verify());
  addEventListener("hashchange", fragment_changed);
  let width = innerWidth;
  addEventListener("resize", () => { if (width !== innerWidth && shown) { width = innerWidth; draw_tiles(); show_number(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (shown) { draw_tiles(); show_number(); } });
}

async function play() {
  for (let t = 0; t < recorded.tokens.length; t++) {
    $("state-token").value = t;
    await show_state();
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

async function start() {
  const fragment = location.hash.slice(1); // what is shown rewrites the address
  worker = new Worker(URL.createObjectURL(new Blob([$("worker").textContent], { type: "text/javascript" })));
  worker.onmessage = answered;
  const ready = ask("open", { data: $("data").textContent, weights: Array.from(document.querySelectorAll(".weights"), (piece) => piece.textContent).join("") });
  window.refmamba = {
    ready,
    encode: async (text) => (await ask("encode", { text })).tokens,
    generate: async (options) => {
      const { tokens, text, logits_sha256 } = await ask("generate", options);
      return { tokens, text, logits_sha256 };
    },
    verify,
  };
  opened = await ready;
  document.body.dataset.runs = opened.recorded ? "no" : "yes";
  for (const id of ["scheme", "two-a", "two-b"]) $(id).replaceChildren(...scheme_options());
  set_scheme(opened.schemes.includes("int8") ? "int8" : opened.schemes.at(-1));
  set_scheme(new URLSearchParams(location.hash.slice(1)).get("scheme"));
  $("two-a").value = opened.schemes[0];
  $("two-b").value = $("scheme").value;
  $("flip-name").replaceChildren(...opened.tensors.map(([name]) => element("option", { value: name }, name)));
  $("flip-name").value = opened.tensors.find(([name]) => name.endsWith("in_proj.weight"))[0];
  listen();
  if (!opened.recorded) {
    show_tokens();
    await write();
  } else say(`Recorded: ${opened.recorded} tokens of this prompt.`);
  await record();
  document.getElementById(fragment.includes("op=") ? "follow" : fragment)?.scrollIntoView(); // now: what is drawn above it moves it
  document.body.dataset.ready = "yes";
}
