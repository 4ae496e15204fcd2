"use strict";
const began = performance.now();
const page = JSON.parse(document.getElementById("page").textContent);
const $ = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const numbers = new Float32Array(bytes(page.buffer));
const block = (place) => numbers.subarray(place[0], place[0] + place[1]);
const Z = page.latents, X = page.features, N = page.n;
const codes = block(page.codes), own = block(page.x), prior = block(page.prior);
const labels = page.labels === null ? null : new Int16Array(bytes(page.labels));

// The decoder: layers from a context to parameters, heads from these to means.
function erf(x) {
  const a = Math.abs(x);
  if (a > 3.5) return Math.sign(x) * (1 - (Math.exp(-a * a) / (a * Math.sqrt(Math.PI))) * (1 - 1 / (2 * a * a)));
  let term = a, sum = a;
  for (let n = 1; n < 90; n++) { term *= -(a * a) / n; sum += term / (2 * n + 1); }
  return Math.sign(x) * sum * 2 / Math.sqrt(Math.PI);
}
const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const acts = {
  tanh: Math.tanh, relu: (x) => Math.max(x, 0), elu: (x) => (x > 0 ? x : Math.expm1(x)), sigmoid, softplus,
  silu: (x) => x * sigmoid(x), gelu: (x) => x * 0.5 * (1 + erf(x / Math.SQRT2)),
};
const layers = {
  standardise(op, h) { const a = block(op.shift), s = block(op.scale); return h.map((v, i) => (v - a[i]) / s[i]); },
  chain(op, h, now) { return run(op.layers, h, now); },
  residual(op, h, now) { const made = run(op.layers, h, now); return made.map((v, i) => v + h[i]); },
  add(op, h) { const b = block(op.b); return h.map((v, i) => v + b[i]); },
  act(op, h) { return h.map(acts[op.kind]); },
  glu(op, h) { const half = h.length / 2; return h.slice(0, half).map((v, i) => v * sigmoid(h[half + i])); },
  shape(op, h, now) { now.shape = op.shape; return h; },
  affine(op, h) {
    const w = block(op.w), n = h.length, out = new Float64Array(w.length / n), b = op.b && block(op.b);
    for (let i = 0, at = 0; i < out.length; i++) { let sum = b ? b[i] : 0; for (let j = 0; j < n; j++) sum += w[at++] * h[j]; out[i] = sum; }
    return out;
  },
  norm(op, h) {
    const w = block(op.w), b = block(op.b), mean = h.reduce((s, v) => s + v, 0) / h.length;
    const sd = Math.sqrt(h.reduce((s, v) => s + (v - mean) ** 2, 0) / h.length + op.epsilon);
    return h.map((v, i) => ((v - mean) / sd) * w[i] + b[i]);
  },
  convolve(op, h, now) { return slide(op, h, now, false); },
  deconvolve(op, h, now) { return slide(op, h, now, true); },
};
function slide(op, h, now, up) {
  const [channels, high, wide] = now.shape, [kh, kw] = op.kernel, [sh, sw] = op.stride, [ph, pw] = op.pad, out = op.out;
  const tall = up ? (high - 1) * sh - 2 * ph + kh + op.more[0] : Math.floor((high + 2 * ph - kh) / sh) + 1;
  const broad = up ? (wide - 1) * sw - 2 * pw + kw + op.more[1] : Math.floor((wide + 2 * pw - kw) / sw) + 1;
  const w = block(op.w), b = op.b && block(op.b), made = new Float64Array(out * tall * broad);
  if (b) for (let o = 0; o < out; o++) made.fill(b[o], o * tall * broad, (o + 1) * tall * broad);
  const [rows, columns] = up ? [high, wide] : [tall, broad], [R, C] = up ? [tall, broad] : [high, wide];
  for (let c = 0; c < channels; c++) for (let o = 0; o < out; o++) {
    const first = (up ? c * out + o : o * channels + c) * kh * kw;
    for (let i = 0; i < rows; i++) for (let a = 0; a < kh; a++) {
      const y = i * sh - ph + a; if (y < 0 || y >= R) continue;
      for (let j = 0; j < columns; j++) for (let d = 0; d < kw; d++) {
        const x = j * sw - pw + d; if (x < 0 || x >= C) continue;
        const weight = w[first + a * kw + d];
        if (up) made[(o * tall + y) * broad + x] += weight * h[(c * high + i) * wide + j];
        else made[(o * tall + i) * broad + j] += weight * h[(c * high + y) * wide + x];
      }
    }
  }
  now.shape = [out, tall, broad];
  return made;
}
function run(list, h, now) { for (const op of list) h = layers[op.op](op, h, now); return h; }
function continuous(logit) {
  const t = Math.abs(logit) / 2, s = logit / 2;
  const inner = t < 0.1 ? s / 3 - s ** 3 / 45 + 2 * s ** 5 / 945 - s ** 7 / 4725 : Math.sign(logit) * (1 / Math.tanh(t) - 1 / t);
  return 0.5 + inner / 2;
}
const loc = (v) => v.loc, links = { identity: (x) => x, exp: (x) => Math.exp(x) + 1e-6, softplus: (x) => softplus(x) + 1e-6 };
const means = {
  Normal: loc, Laplace: loc, Logistic: loc, StudentT: (v) => (v.df > 1 ? v.loc : NaN), LogNormal: (v) => Math.exp(v.loc + v.scale ** 2 / 2),
  Gamma: (v) => v.concentration / v.rate, Beta: (v) => v.concentration1 / (v.concentration1 + v.concentration0),
  Bernoulli: (v) => sigmoid(v.logits), ContinuousBernoulli: (v) => continuous(v.logits), Binomial: (v) => v.total_count * sigmoid(v.logits),
  Poisson: (v) => v.rate, NegativeBinomial: (v) => v.rate,
  ZeroInflatedPoisson: (v) => sigmoid(-v.gate_logits) * v.rate, ZeroInflatedNegativeBinomial: (v) => sigmoid(-v.gate_logits) * v.rate,
};
function probabilities(head, j, raw) {
  if (head.cuts) { const below = [...head.cuts[j].map((cut) => sigmoid(cut - raw[j])), 1]; return below.map((p, k) => p - (k ? below[k - 1] : 0)); }
  const logits = head.place[j].map((at) => raw[at]), top = Math.max(...logits), each = logits.map((v) => Math.exp(v - top));
  const total = each.reduce((a, b) => a + b, 0);
  return each.map((p) => p / total);
}
function decode(z, given = state.given) {
  if (page.grid) return { mean: block(page.grid.mean).subarray(gridRow(z) * X, (gridRow(z) + 1) * X), word: {} };
  const more = page.given.length ? page.given[given].values : [], mean = new Float64Array(X), word = {};
  const all = run(page.decoder.layers, Float64Array.from([...z, ...more]), {});
  for (const head of page.decoder.heads) {
    const raw = all.subarray(head.first), n = head.columns.length;
    head.columns.forEach((column, j) => {
      if (head.levels) {
        const p = probabilities(head, j, raw);
        mean[column] = p.reduce((sum, value, k) => sum + k * value, 0);
        word[column] = p.indexOf(Math.max(...p));
        return;
      }
      const values = {};
      let place = 0;
      for (const one of head.values) values[one.name] = one.own ? block(one.own)[j] : links[one.link](raw[place++ * n + j]);
      mean[column] = means[head.kind](values);
    });
  }
  return { mean, word };
}
function nearest(ticks, value) { let best = 0; ticks.forEach((t, i) => { if (Math.abs(t - value) < Math.abs(ticks[best] - value)) best = i; }); return best; }
function gridRow(z) { const g = page.grid; return g.axes.reduce((row, axis, k) => row * g.at[k].length + nearest(g.at[k], z[axis]), 0); }

// The state, and what changes it.
const state = { z: new Float64Array(Z), axes: Z > 1 ? page.order.slice(0, 2).sort((a, b) => a - b) : [0, -1], datum: -1, given: 0, playing: false };
const code = (i) => codes.subarray(i * Z, (i + 1) * Z);
const average = new Float64Array(Z);
for (let i = 0; i < N; i++) for (let j = 0; j < Z; j++) average[j] += codes[i * Z + j] / N;
function inside(z) {
  z = Float64Array.from(z);
  if (page.grid) { z = Float64Array.from(page.grid.rest); page.grid.axes.forEach((axis, k) => { z[axis] = page.grid.at[k][nearest(page.grid.at[k], arguments[0][axis])]; }); }
  if (page.limits === "sphere") { const r = Math.hypot(...z) || 1; return z.map((v) => v / r); }
  if (page.limits === "simplex") { const up = z.map((v) => Math.max(v, 1e-9)), r = up.reduce((s, v) => s + v, 0); return up.map((v) => v / r); }
  const [low, high] = page.limits;
  return z.map((v) => Math.min(Math.max(v, low ?? -Infinity), high ?? Infinity));
}
function move(z) { state.z = inside(z); draw(); }
function choose(i, stay = false) {
  state.datum = i < 0 ? -1 : Math.min(Math.max(i, 0), page.few - 1);
  if (state.datum >= 0 && page.given.length > 1 && labels) { state.given = Math.max(labels[state.datum], 0); $("given").value = state.given; }
  if (state.datum >= 0 && !stay) state.z = inside(code(state.datum));
  draw();
}
function between(t) {
  const [a, b] = [$("from"), $("to")].map((box) => code(Math.min(Math.max(Math.round(+box.value) || 0, 0), page.few - 1)));
  const mix = (u, v) => Float64Array.from(a, (value, j) => u * value + v * b[j]);
  const [ra, rb] = [Math.hypot(...a), Math.hypot(...b)], cos = a.reduce((s, v, j) => s + v * b[j], 0) / (ra * rb || 1);
  const angle = Math.acos(Math.min(Math.max(cos, -1), 1));
  if ($("path").value === "line" || angle < 1e-6 || Math.PI - angle < 1e-6) return mix(1 - t, t);
  const r = (1 - t) * ra + t * rb;
  return mix((r * Math.sin((1 - t) * angle)) / Math.sin(angle) / ra, (r * Math.sin(t * angle)) / Math.sin(angle) / rb);
}
let clock = 0;
function play(on) {
  state.playing = on;
  $("play").textContent = on ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(on));
  if (!on) return;
  if (+$("way").value >= 1) $("way").value = 0;
  clock = performance.now();
  requestAnimationFrame(tick);
}
function tick(now) {
  if (!state.playing) return;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (!still || now - clock > 500) {
    $("way").value = Math.min(+$("way").value + (still ? 0.125 : (now - clock) / 4000), 1);
    clock = now;
    move(between(+$("way").value));
  }
  if (+$("way").value >= 1) play(false);
  else requestAnimationFrame(tick);
}

// The plane.
const plane = $("plane"), base = document.createElement("canvas");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const shade = (k) => {
  if (page.names.length <= page.colours.length) { const c = page.colours[k]; return dark() && c === "#000000" ? "#ffffff" : c; }
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], t = (k / (page.names.length - 1)) * 4, i = Math.min(Math.floor(t), 3);
  return `rgb(${stops[i].map((v, c) => Math.round(v + (stops[i + 1][c] - v) * (t - i))).join()})`;
};
const across = (i) => codes[i * Z + state.axes[0]];
const jitter = (i) => ((i * 0.6180339887) % 1) * 1.6 - 0.8;
const up = (i) => (state.axes[1] < 0 ? jitter(i) : codes[i * Z + state.axes[1]]);
let view = { x: 0, y: 0, half: 1, size: 1, pad: 34 };
function frame() {
  const [a, b] = state.axes, low = [Infinity, Infinity], high = [-Infinity, -Infinity];
  const see = (x, y) => [x, y].forEach((v, k) => { low[k] = Math.min(low[k], v); high[k] = Math.max(high[k], v); });
  for (let i = 0; i < N; i++) see(across(i), up(i));
  for (let i = 0; i < prior.length; i += Z) see(prior[i + a], b < 0 ? 0 : prior[i + b]);
  const half = 0.58 * Math.max(high[0] - low[0], high[1] - low[1]) || 1;
  view = { ...view, x: (low[0] + high[0]) / 2, y: (low[1] + high[1]) / 2, half };
}
const room = () => view.size - view.pad;
const px = (x) => view.pad + ((x - view.x) / view.half / 2 + 0.5) * room();
const py = (y) => (0.5 - (y - view.y) / view.half / 2) * room();
const unpx = (x) => ((x - view.pad) / room() - 0.5) * 2 * view.half + view.x;
const unpy = (y) => (0.5 - y / room()) * 2 * view.half + view.y;
function ticks(low, high) {
  const rough = (high - low) / 5, ten = 10 ** Math.floor(Math.log10(rough)), step = ten * [1, 2, 5, 10].find((m) => m * ten >= rough), found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) found.push(Math.abs(v) < step / 1e6 ? 0 : v);
  return found;
}
function fmt(v) {
  if (!Number.isFinite(v)) return "–";
  const text = v !== 0 && (Math.abs(v) >= 1e6 || Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4));
  return text.replace("-", "\u2212");
}
const place = (v) => (Math.abs(v) < 0.005 ? 0 : v).toFixed(2).replace("-", "\u2212");
function dot(c, x, y, r) { c.beginPath(); c.arc(x, y, r, 0, 2 * Math.PI); }
function drawBase() {
  const ratio = window.devicePixelRatio || 1, size = plane.clientWidth;
  for (const canvas of [plane, base]) { canvas.width = canvas.height = Math.round(size * ratio); }
  view.size = size;
  const c = base.getContext("2d");
  c.scale(ratio, ratio);
  c.font = "12px system-ui, sans-serif";
  c.strokeStyle = colour("--grid"); c.fillStyle = colour("--soft"); c.lineWidth = 1;
  c.textAlign = "center";
  for (const v of ticks(view.x - view.half, view.x + view.half)) { c.beginPath(); c.moveTo(px(v), 0); c.lineTo(px(v), room()); c.stroke(); c.fillText(fmt(v), px(v), room() + 14); }
  c.fillText(`z${sub(state.axes[0])}`, view.pad + room() / 2, room() + 29);
  c.textAlign = "right";
  if (state.axes[1] >= 0) {
    for (const v of ticks(view.y - view.half, view.y + view.half)) { c.beginPath(); c.moveTo(view.pad, py(v)); c.lineTo(size, py(v)); c.stroke(); if (py(v) > 24) c.fillText(fmt(v), view.pad - 4, py(v) + 4); }
    c.fillText(`z${sub(state.axes[1])}`, view.pad - 12, 14);
  }
  c.fillStyle = colour("--prior");
  for (let i = 0; i < prior.length; i += Z) { dot(c, px(prior[i + state.axes[0]]), py(state.axes[1] < 0 ? jitter(i / Z) : prior[i + state.axes[1]]), 1.5); c.fill(); }
  const r = Math.min(Math.max(60 / Math.sqrt(N), 1.6), 4), by = new Map();
  for (let i = 0; i < N; i++) { const k = labels ? labels[i] : -2; if (!by.has(k)) by.set(k, []); by.get(k).push(i); }
  for (const [k, list] of [...by].sort((p, q) => p[0] - q[0])) {
    c.fillStyle = k === -2 ? colour("--point") : k === -1 ? colour("--soft") : shade(k);
    c.globalAlpha = 0.85;
    for (const i of list) { dot(c, px(across(i)), py(up(i)), r); c.fill(); }
  }
  c.globalAlpha = 0.7; c.strokeStyle = colour("--ink"); c.lineWidth = 0.7;
  for (let i = 0; i < page.few; i++) { dot(c, px(across(i)), py(up(i)), r + 1.2); c.stroke(); }
}
const sub = (j) => String(j).replace(/\d/g, (d) => "₀₁₂₃₄₅₆₇₈₉"[d]);
function ellipse(c, from, i, name) {
  const [a, b] = state.axes;
  if (b < 0) return;
  const mean = block(from.mean), packed = block(from.covariance), width = (Z * (Z + 1)) / 2;
  const v = (j, k) => packed[i * width + (Math.max(j, k) * (Math.max(j, k) + 1)) / 2 + Math.min(j, k)];
  const [p, q, r] = [v(a, a), v(b, b), v(a, b)], middle = (p + q) / 2, apart = Math.hypot((p - q) / 2, r);
  const angle = 0.5 * Math.atan2(2 * r, p - q), unit = room() / 2 / view.half;
  c.strokeStyle = colour(name); c.lineWidth = 2.2;
  for (const sd of [1, 2]) {
    c.beginPath();
    c.ellipse(px(mean[i * Z + a]), py(mean[i * Z + b]), sd * Math.sqrt(Math.max(middle + apart, 0)) * unit, sd * Math.sqrt(Math.max(middle - apart, 0)) * unit, -angle, 0, 2 * Math.PI);
    c.stroke();
  }
}
function drawPlane() {
  const c = plane.getContext("2d"), ratio = plane.width / view.size, i = state.datum, [a, b] = state.axes;
  c.setTransform(1, 0, 0, 1, 0, 0);
  c.clearRect(0, 0, plane.width, plane.height);
  c.drawImage(base, 0, 0);
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (i >= 0) {
    if (page.exact && $("show-exact").checked) ellipse(c, page.exact, i, "--exact");
    if ($("show-q").checked) ellipse(c, page.q, i, "--q");
    c.strokeStyle = colour("--ink"); c.lineWidth = 2; dot(c, px(across(i)), py(up(i)), 6); c.stroke();
  }
  const x = px(state.z[a]), y = py(b < 0 ? 0 : state.z[b]);
  c.lineWidth = 2; c.strokeStyle = colour("--handle"); c.fillStyle = colour("--ground");
  c.beginPath(); c.moveTo(x - 14, y); c.lineTo(x + 14, y); c.moveTo(x, y - 14); c.lineTo(x, y + 14); c.stroke();
  dot(c, x, y, 7); c.fill(); c.stroke();
}

// What the point decodes to.
function paint(canvas, values) {
  const shape = page.shape.length === 3 ? page.shape : [1, ...page.shape], [channels, high, wide] = shape, [low, top] = page.shades;
  canvas.width = wide; canvas.height = high;
  const c = canvas.getContext("2d"), picture = c.createImageData(wide, high);
  for (let i = 0; i < high * wide; i++) {
    for (let k = 0; k < 3; k++) picture.data[4 * i + k] = ((values[(channels === 3 ? k : 0) * high * wide + i] - low) / (top - low)) * 255;
    picture.data[4 * i + 3] = 255;
  }
  c.putImageData(picture, 0, 0);
}
const units = (v, j) => (page.scale ? v * page.scale[j] + page.loc[j] : v);
const shown = (v, j, word) => {
  const words = page.words[page.columns[j]];
  if (Number.isNaN(v)) return "–";
  return words ? words[word ?? Math.min(Math.max(Math.round(v), 0), words.length - 1)] : fmt(units(v, j));
};
const asTable = !page.shape && (X <= 12 || page.columns[0] !== "column 1"), cells = [];
function drawCurve(values, datum) {
  const canvas = $("curve"), ratio = window.devicePixelRatio || 1, wide = canvas.clientWidth, high = canvas.clientHeight, c = canvas.getContext("2d");
  canvas.width = wide * ratio; canvas.height = high * ratio; c.scale(ratio, ratio);
  let low = Infinity, top = -Infinity;
  for (let j = 0; j < X; j++) { low = Math.min(low, units(page.shades[0], j)); top = Math.max(top, units(page.shades[1], j)); }
  const across = (j) => 52 + (j / Math.max(X - 1, 1)) * (wide - 64), up = (v) => high - 30 - ((v - low) / (top - low || 1)) * (high - 60);
  c.font = "12px system-ui, sans-serif"; c.fillStyle = colour("--soft"); c.strokeStyle = colour("--grid"); c.textAlign = "right";
  for (const v of ticks(low, top)) { c.beginPath(); c.moveTo(52, up(v)); c.lineTo(wide - 12, up(v)); c.stroke(); c.fillText(fmt(v), 46, up(v) + 4); }
  c.textAlign = "center"; c.fillText("0", across(0), high - 12); c.fillText("feature", wide / 2, high - 12); c.fillText(X - 1, across(X - 1), high - 12);
  c.textAlign = "left";
  for (const [line, name, told, place] of [[datum, "--soft", "datum", 130], [values, "--q", "decoded", 52]]) {
    if (!line) continue;
    c.strokeStyle = c.fillStyle = colour(name); c.fillText(told, place, 16); c.lineWidth = 1.6; c.beginPath();
    for (let j = 0; j < X; j++) c.lineTo(across(j), up(units(line[j], j)));
    c.stroke();
  }
}
function drawDecoded() {
  const { mean, word } = decode(state.z), i = state.datum, datum = i < 0 ? null : own.subarray(i * X, (i + 1) * X);
  if (page.shape) {
    paint($("picture"), mean);
    $("own").hidden = !datum;
    if (datum) { paint($("original"), datum); $("own-name").textContent = `datum ${i}`; }
  } else if (asTable) {
    cells.forEach(([decoded, beside, bar], j) => {
      decoded.textContent = shown(mean[j], j, word[j]);
      beside.textContent = datum ? shown(datum[j], j) : "";
      const [low, top] = page.ranges ? page.ranges[j] : page.shades;
      bar.style.left = `${Math.min(Math.max((mean[j] - low) / (top - low || 1), 0), 1) * 100}%`;
    });
  } else drawCurve(mean, datum);
  state.mean = mean;
}
function draw() {
  drawPlane();
  drawDecoded();
  document.querySelectorAll("#sliders input").forEach((slider) => {
    const j = +slider.dataset.latent;
    if (+slider.value !== state.z[j]) slider.value = state.z[j];
    slider.nextElementSibling.textContent = place(state.z[j]);
  });
  const i = state.datum, [a, b] = state.axes;
  if (document.activeElement !== $("datum")) $("datum").value = i < 0 ? "" : i;
  $("chosen").textContent = i < 0 ? `The ${page.few.toLocaleString("en")} ringed data can be chosen.` : `Datum ${i}: row ${page.rows[i]} of the source${labels && labels[i] >= 0 ? `, ${page.names[labels[i]]}` : ""}.`;
  $("status").textContent = `z${sub(a)} = ${place(state.z[a])}${b < 0 ? "" : `, z${sub(b)} = ${place(state.z[b])}`}`;
}

// The page.
function option(select, value, text) { const one = document.createElement("option"); one.value = value; one.textContent = text; select.append(one); }
function mark(text, shape, paintIt) {
  const item = document.createElement("li"), sign = document.createElement("span");
  sign.className = `mark ${shape}`;
  paintIt(sign.style);
  item.append(sign, document.createTextNode(text));
  $("legend").append(item);
}
function legend() {
  $("legend").replaceChildren();
  const filled = (c) => (style) => { style.background = c; }, line = (name) => (style) => { style.borderTopColor = `var(${name})`; };
  if (!labels) mark("data: the guide's means", "", filled("var(--point)"));
  else if (page.names.length <= page.colours.length) page.names.forEach((name, k) => mark(name, "", filled(shade(k))));
  else [0, page.names.length - 1].forEach((k) => mark(page.names[k], "", filled(shade(k))));
  if (labels && labels.includes(-1)) mark("no label", "", filled("var(--soft)"));
  if (prior.length) mark("draws of the prior", "", filled("var(--prior)"));
  if (Z > 1) mark(`q(z | x) of the datum, 1 and 2 sd${page.gaussian ? "" : ", by its covariance"}`, "line", line("--q"));
  if (page.exact && Z > 1) mark("exact p(z | x), 1 and 2 sd", "line", line("--exact"));
}
function build() {
  const count = (n) => n.toLocaleString("en");
  const some = page.n < page.all ? `${count(page.n)} of ${count(page.all)}` : count(page.n);
  $("about").textContent = `${some} ${page.part} data in ${Z} latent${Z > 1 ? "s" : ""}.`;
  $("how").textContent = page.grid
    ? `This decoder does not run in the page: shown is the nearest of ${count(page.grid.at.map((t) => t.length).reduce((p, q) => p * q))} points decoded beforehand${Z > 2 ? ", the other latents at their average" : ""}.`
    : "The decoder runs in this page.";
  const fixed = page.grid !== null || Z < 3;
  for (const [k, id] of ["across", "up"].entries()) {
    for (const j of page.order) option($(id), j, `z${sub(j)}`);
    $(id).value = state.axes[k];
    $(id).onchange = () => {
      const other = state.axes[1 - k];
      if (+$(id).value === other) { state.axes[1 - k] = state.axes[k]; $(["across", "up"][1 - k]).value = state.axes[k]; }
      state.axes[k] = +$(id).value;
      frame(); drawBase(); draw();
    };
  }
  $("axes").hidden = fixed;
  page.given.forEach((one, k) => option($("given"), k, one.name));
  $("given-row").hidden = page.given.length === 0;
  $("given").onchange = () => { state.given = +$("given").value; draw(); };
  $("exact-label").hidden = !page.exact || Z < 2;
  $("path-label").hidden = Z < 2 || typeof page.limits === "string";
  if (page.limits === "sphere") $("path").value = "circle";
  $("pictures").hidden = !page.shape; $("table").hidden = !asTable; $("curve").hidden = !!page.shape || asTable;
  if (asTable) {
    const body = document.querySelector("#table tbody");
    page.columns.forEach((name) => {
      const row = document.createElement("tr"), head = document.createElement("th"), decoded = document.createElement("td"), beside = document.createElement("td");
      const last = document.createElement("td"), track = document.createElement("div"), bar = document.createElement("i");
      head.scope = "row"; name.split(/(?<=_)/).forEach((part) => head.append(part, document.createElement("wbr"))); last.className = "bar";
      track.append(bar); last.append(track); row.append(head, decoded, beside, last); body.append(row);
      cells.push([decoded, beside, bar]);
    });
  }
  if (!fixed) {
    $("sliders-box").hidden = false;
    for (const j of page.order) {
      let low = page.limits[0] ?? -3, high = page.limits[1] ?? 3;
      if (page.limits === "sphere") { low = -1; high = 1; }
      if (page.limits === "simplex") { low = 0; high = 1; }
      for (let i = 0; i < N; i++) { low = Math.min(low, codes[i * Z + j]); high = Math.max(high, codes[i * Z + j]); }
      const row = document.createElement("label"), name = document.createElement("span"), slider = document.createElement("input"), out = document.createElement("output");
      row.className = "slider"; name.textContent = `z${sub(j)}`;
      Object.assign(slider, { type: "range", min: low, max: high, step: "any" });
      slider.dataset.latent = j; slider.dataset.testid = `slider-${j}`;
      slider.oninput = () => { const z = Float64Array.from(state.z); z[j] = +slider.value; move(z); };
      row.append(name, slider, out); $("sliders").append(row);
    }
  }
  $("datum").max = $("from").max = $("to").max = page.few - 1;
  $("to").value = Math.min(1, page.few - 1);
  $("datum").onchange = () => choose($("datum").value === "" ? -1 : Math.round(+$("datum").value));
  const step = (by) => choose(state.datum < 0 ? (by > 0 ? 0 : page.few - 1) : (state.datum + by + page.few) % page.few);
  $("previous").onclick = () => step(-1); $("next").onclick = () => step(1); $("none").onclick = () => choose(-1);
  $("show-q").onchange = $("show-exact").onchange = draw;
  $("play").onclick = () => play(!state.playing);
  $("way").oninput = $("from").onchange = $("to").onchange = $("path").onchange = () => { play(false); move(between(+$("way").value)); };
  let held = null;
  const to = (event) => {
    const box = plane.getBoundingClientRect(), z = Float64Array.from(state.z);
    z[state.axes[0]] = unpx(event.clientX - box.left);
    if (state.axes[1] >= 0) z[state.axes[1]] = unpy(event.clientY - box.top);
    return z;
  };
  plane.onpointerdown = (event) => { plane.setPointerCapture(event.pointerId); held = [event.clientX, event.clientY, false]; play(false); plane.focus({ preventScroll: true }); event.preventDefault(); };
  plane.onpointermove = (event) => {
    if (!held) return;
    held[2] ||= Math.hypot(event.clientX - held[0], event.clientY - held[1]) > 4;
    if (held[2]) move(to(event));
  };
  plane.onpointerup = (event) => {
    if (held && !held[2]) {
      const box = plane.getBoundingClientRect(), [x, y] = [event.clientX - box.left, event.clientY - box.top];
      let best = -1, least = 9;
      for (let i = 0; i < page.few; i++) { const d = Math.hypot(px(across(i)) - x, py(up(i)) - y); if (d < least) { least = d; best = i; } }
      if (best >= 0) choose(best); else move(to(event));
    }
    held = null;
  };
  plane.onpointercancel = () => { held = null; };
  plane.onkeydown = (event) => {
    const by = view.half / 40 * (event.shiftKey ? 5 : 1), z = Float64Array.from(state.z), [a, b] = state.axes;
    const width = page.grid ? (k) => page.grid.at[k][1] - page.grid.at[k][0] : () => by;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "ArrowLeft") z[a] -= width(0);
    else if (event.key === "ArrowRight") z[a] += width(0);
    else if (event.key === "ArrowUp" && b >= 0) z[b] += width(1);
    else if (event.key === "ArrowDown" && b >= 0) z[b] -= width(1);
    else if (event.key === "Home") z.set(average);
    else if (event.key === "n" || event.key === "N") { step(1); return; }
    else if (event.key === "p" || event.key === "P") { step(-1); return; }
    else if (event.key === " ") { event.preventDefault(); play(!state.playing); return; }
    else return;
    event.preventDefault();
    play(false);
    move(z);
  };
  const anew = () => { legend(); drawBase(); draw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", anew);
  new ResizeObserver(() => { if (plane.clientWidth > 0 && plane.clientWidth !== view.size) { drawBase(); draw(); } }).observe(plane);
  legend(); frame(); state.z = inside(average); drawBase(); draw();
}
build();
window.explorer = { page, state, decode, move, choose, between, px, py, code, block, milliseconds: performance.now() - began };
document.documentElement.dataset.ready = "true";
