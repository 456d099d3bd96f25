// The page of `erwin-nsa explore --html`: two linked scenes, what was predicted and what was read, from numbers in the page.
// Written by hand and put behind cloud.js by erwin_nsa/explore/page.py. `page` holds words and places, `bytes` all arrays.

const page = JSON.parse(document.getElementById("erwin-page").textContent);
const bytes = unpacked(document.getElementById("erwin-page-bytes").textContent);
const at = (id) => document.getElementById(id);
const [left, right] = globalThis.erwinClouds;
let settling = false; // while the page itself sets what is picked

function unpacked(text) {
  const letters = atob(text), out = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) out[i] = letters.charCodeAt(i);
  return out.buffer;
}

// An array by its place: [type, first byte, length].
function array([type, start, length]) {
  return new { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array }[type](bytes, start, length);
}

// Codes 1 to 255 are steps of a logarithmic scale from low to high, 0 is exactly nothing.
function weight(code, low, high) { return code ? low * (high / low) ** ((code - 1) / 254) : 0; }

// Weights on all drawn points of one query, block and branch; `gated` adds the branches, each times its gate.
function weights(query, layer, branch) {
  const out = new Float32Array(page.count), gated = branch === "gated";
  for (const part of page.parts[query][layer]) {
    if (!gated && part.branch !== branch) continue;
    const { place, low, high } = part[gated ? "gated" : "plain"], codes = array(place);
    if (part.group !== undefined) {
      const group = array(page.groups[part.group]), values = Float32Array.from(codes, (c) => weight(c, low, high));
      for (let row = 0; row < out.length; row++) out[row] += values[group[row]];
    } else {
      const rows = array(part.rows);
      for (let i = 0; i < rows.length; i++) out[rows[i]] += weight(codes[i], low, high);
    }
  }
  return out;
}

function put(model, traits) { for (const [name, value] of Object.entries(traits)) model.set(name, value); }

function showField() {
  const field = page.fields[at("field").value], codes = array(field.place), [low, high] = field.range;
  const values = Float32Array.from(codes, (c) => low + (high - low) * c / 65535);
  put(left, { values: new DataView(values.buffer), value_type: "f4", lut: new DataView(bytes, page.luts[field.colours], 768), label: field.label, unit: field.unit, limits: field.limits, scale: "linear" });
}

function showWeights() {
  const [query, layer, branch, scale] = ["query", "layer", "branch", "scale"].map((name) => at(name).value);
  const values = weights(query, layer, branch), title = `${at("branch").selectedOptions[0].textContent}, ${page.layers[layer]}, read from point ${page.queries[query].id}`;
  let least = Infinity, most = 0;
  for (const v of values) { if (v > most) most = v; if (v > 0 && v < least) least = v; }
  if (!most) { least = 0; most = 1; }
  const limits = scale === "log" ? [Math.min(Math.max(least || most / 10, most * 1e-6), most / 2), most] : [0, most];
  const balls = branch === "selected" || branch === "gated" ? page.balls[query][layer] : [];
  put(right, { values: new DataView(values.buffer), value_type: "f4", lut: new DataView(bytes, page.luts.viridis, 768), label: "weight, mean of heads", unit: "-", limits, scale, ...spheres(balls) });
  at("right-title").textContent = title;
  settling = true;
  for (const model of [left, right]) model.set("picked", page.queries[query].id);
  settling = false;
  showGates(page.gates[query][layer]);
  showBalls(balls);
}

function spheres(balls) {
  const drawn = balls.filter((ball) => ball.radius > 0), tint = (i) => page.tints[i % page.tints.length];
  const numbers = Float32Array.from(drawn.flatMap((ball) => [...ball.centre, ball.radius])), colours = Uint8Array.from(drawn.flatMap((_, i) => tint(i)));
  return { spheres: new DataView(numbers.buffer), sphere_colours: new DataView(colours.buffer) };
}

function cell(row, text, kind = "td") { const node = document.createElement(kind); node.textContent = text; row.append(node); return node; }

function showGates(gates) { // one row a branch, one bar a head
  const table = at("gates");
  table.replaceChildren();
  gates.forEach((heads, i) => {
    if (!heads) return;
    const row = document.createElement("tr"), bars = document.createElement("td");
    cell(row, page.branches[i], "th");
    bars.className = "bars";
    heads.forEach((g, h) => {
      const bar = document.createElement("i");
      bar.style.height = `${Math.round(32 * g)}px`;
      bar.style.background = page.branchColours[i];
      bar.title = `head ${h}: ${g}`;
      bars.append(bar);
    });
    row.append(bars);
    cell(row, `mean ${(heads.reduce((a, b) => a + b, 0) / heads.length).toFixed(3)}`);
    table.append(row);
  });
}

function showBalls(balls) {
  const table = at("balls");
  table.replaceChildren();
  if (balls.length) { const head = document.createElement("tr"); for (const text of ["rank", "ball", "weight [-]", "score [-]", "key heads"]) cell(head, text, "th"); table.append(head); }
  balls.forEach((ball, i) => {
    const row = document.createElement("tr"), rank = cell(row, ` ${i + 1}`), swatch = document.createElement("i");
    swatch.className = "swatch";
    if (ball.radius > 0) swatch.style.background = `rgb(${page.tints[balls.slice(0, i).filter((b) => b.radius > 0).length % page.tints.length].join(" ")})`;
    rank.prepend(swatch);
    for (const text of [ball.ball, shortNumber(ball.weight), shortNumber(ball.score), ball.heads]) cell(row, text);
    table.append(row);
  });
}

// A click on a point that is not among the precomputed ones shows the nearest that is, and says so.
function picked(model) {
  if (settling) return;
  const id = model.get("picked"), known = page.queries.findIndex((q) => q.id === id);
  if (id < 0) return;
  let chosen = known, says = "";
  if (known < 0) {
    const ids = array(page.ids), row = ids.length ? ids.indexOf(id) : id, places = new Float32Array(array(page.places));
    const here = places.subarray(3 * row, 3 * row + 3), far = page.queries.map((q) => Math.hypot(...q.pos.map((p, i) => p - here[i])));
    chosen = far.indexOf(Math.min(...far));
    says = `Point ${id} was not computed. Shown is the nearest of the ${page.queries.length} that were: point ${page.queries[chosen].id}, ${shortNumber(far[chosen])} ${page.unit} away.`;
  }
  at("note").textContent = says;
  if (String(chosen) !== at("query").value || known < 0) { at("query").value = chosen; showWeights(); }
}

function fill(id, texts) { texts.forEach((text, i) => at(id).append(new Option(text, i))); }

fill("field", page.fields.map((f) => f.label));
fill("query", page.queries.map((q) => `point ${q.id}`));
fill("layer", page.layers);
for (const [i, branch] of page.views.entries()) at("branch").append(new Option(page.viewNames[i], branch));
at("layer").value = page.layers.length - 1;
at("branch").value = page.views[page.views.length - 1];
put(right, { positions: left.get("positions") });
at("field").addEventListener("change", showField);
for (const id of ["query", "layer", "branch", "scale"]) at(id).addEventListener("change", () => { at("note").textContent = ""; showWeights(); });
for (const model of [left, right]) model.on("change:picked", () => picked(model));
showField();
showWeights();
globalThis.erwinPage = { page, weights };
