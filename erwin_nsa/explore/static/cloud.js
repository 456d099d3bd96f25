// The point cloud widget of erwin_nsa: one WebGL2 scene with picking, spheres, lines, a legend and a keyboard.
// Written by hand and read by erwin_nsa/explore/cloud.py, for JupyterLab through anywidget and for pages without a kernel.
// Order: camera, picking, numbers as text, shaders, Scene (the GPU), View (page and input), pages without a kernel.

// ---- camera: [azimuth, elevation, distance, target x, y, z], angles in radians --------------------------------------

const FIELD_OF_VIEW = 0.7; // [rad] across the smaller side of the picture
const AXES = { x: [1, 2, 0], y: [2, 0, 1], z: [0, 1, 2] }; // two level axes, then the one that points up
const SPLAT = [2, 48]; // smallest and largest diameter of a point [CSS pixels]
const GROW = 1.7; // a highlighted point is this much larger

const dot = (p, q) => p[0] * q[0] + p[1] * q[1] + p[2] * q[2];
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// Where the camera stands and its three directions: right, above, and back (from the target towards the eye).
export function cameraFrame([azimuth, elevation, distance, ...target], up) {
  const [a, b, u] = AXES[up], right = [0, 0, 0], above = [0, 0, 0], back = [0, 0, 0];
  const [ca, sa, ce, se] = [Math.cos(azimuth), Math.sin(azimuth), Math.cos(elevation), Math.sin(elevation)];
  right[a] = -sa; right[b] = ca;
  above[a] = -se * ca; above[b] = -se * sa; above[u] = ce;
  back[a] = ce * ca; back[b] = ce * sa; back[u] = se;
  return { right, above, back, target, distance, eye: target.map((t, i) => t + distance * back[i]) };
}

// What the camera makes of a length: focal [pixels], and the range of depths that holds the whole cloud.
function lensOf(frame, bounds, width, height) {
  const focal = Math.min(width, height) / 2 / Math.tan(FIELD_OF_VIEW / 2);
  const reach = 1.05 * bounds.radius + Math.hypot(...frame.target.map((t, i) => t - bounds.centre[i]));
  return { focal, width, height, near: Math.max(frame.distance - reach, frame.distance / 1000), far: frame.distance + reach };
}

// Centre and radius of a ball around points and spheres.
function boundsOf(places, spheres) {
  const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
  for (let i = 0; i < places.length; i++) {
    const axis = i % 3, p = places[i];
    if (p < low[axis]) low[axis] = p;
    if (p > high[axis]) high[axis] = p;
  }
  for (let i = 0; i < spheres.length; i++) {
    const axis = i % 4, radius = spheres[i - axis + 3];
    if (axis === 3) continue;
    low[axis] = Math.min(low[axis], spheres[i] - radius);
    high[axis] = Math.max(high[axis], spheres[i] + radius);
  }
  const centre = low.map((l, i) => (l + high[i]) / 2);
  return { centre, radius: Math.hypot(...low.map((l, i) => high[i] - l)) / 2 || 1 };
}

// ---- picking: the same projection as in the vertex shader, for every point, on the CPU -------------------------------

// Row of the frontmost splat under (x, y) [CSS pixels], else of the nearest within 4 pixels, else -1.
export function pickRow({ places, diameter, highlight }, { right, above, back, eye }, { focal, width, height, near }, x, y) {
  let front = -1, frontDepth = Infinity, beside = -1, besideGap = 4;
  const look = (row, grow) => {
    const dx = places[3 * row] - eye[0], dy = places[3 * row + 1] - eye[1], dz = places[3 * row + 2] - eye[2];
    const depth = -(dx * back[0] + dy * back[1] + dz * back[2]);
    if (depth < near) return;
    const scale = focal / depth;
    const across = width / 2 + scale * (dx * right[0] + dy * right[1] + dz * right[2]) - x;
    const down = height / 2 - scale * (dx * above[0] + dy * above[1] + dz * above[2]) - y;
    const gap = Math.sqrt(across * across + down * down) - grow * clamp(diameter * scale, SPLAT[0], SPLAT[1]) / 2;
    if (gap <= 0 && depth < frontDepth) { front = row; frontDepth = depth; }
    if (gap > 0 && gap < besideGap) { beside = row; besideGap = gap; }
  };
  for (let row = 0; row < places.length / 3; row++) look(row, 1);
  for (const row of highlight) look(row, GROW);
  return front >= 0 ? front : beside;
}

// Where a row is on the screen: its middle and its radius [CSS pixels], or null behind the eye.
function placeOf(row, { places, diameter }, { right, above, back, eye }, { focal, width, height, near }) {
  const d = [0, 1, 2].map((i) => places[3 * row + i] - eye[i]), depth = -dot(d, back), scale = focal / depth;
  return depth < near ? null : { x: width / 2 + scale * dot(d, right), y: height / 2 - scale * dot(d, above), radius: clamp(diameter * scale, ...SPLAT) / 2 };
}

// Row of a point id in the ascending ids of the points drawn, or -1; without ids, row and id are the same.
function rowOf(id, ids, count) {
  if (!ids.length) return Number.isInteger(id) && id >= 0 && id < count ? id : -1;
  let low = 0, high = ids.length;
  while (low < high) { const middle = (low + high) >> 1; if (ids[middle] < id) low = middle + 1; else high = middle; }
  return ids[low] === id ? low : -1;
}

// ---- numbers as text --------------------------------------------------------------------------------------------------

const whole = (n) => n.toLocaleString("en-GB");
const raised = (n) => String(n).replace(/./g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));

// Three significant digits; powers of ten where plain digits would be long.
export function shortNumber(value, digits = 3) {
  if (value === 0) return "0";
  const rounded = Number(value.toPrecision(digits)), power = Math.floor(Math.log10(Math.abs(rounded)));
  if (power >= -3 && power < 5) return String(rounded).replace("-", "−");
  const front = Number((rounded / 10 ** power).toPrecision(digits));
  return ({ 1: "", "-1": "−" }[front] ?? `${String(front).replace("-", "−")}·`) + `10${raised(power)}`;
}

// Where a colour bar gets labels: both ends, and round numbers (or decades) between that keep clear of them.
export function ticks(low, high, log) {
  const share = log ? (v) => Math.log(v / low) / Math.log(high / low) : (v) => (v - low) / (high - low);
  const between = [];
  if (log) {
    const first = Math.ceil(Math.log10(low)), last = Math.floor(Math.log10(high)), step = Math.max(1, Math.ceil((last - first) / 4));
    for (let power = first; power <= last; power += step) between.push(10 ** power);
  } else {
    const rough = (high - low) / 5, size = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((k) => k * size).find((s) => s >= rough * 0.999);
    for (let k = Math.ceil(low / step); k * step <= high; k++) between.push(k * step);
  }
  const inside = between.filter((v) => share(v) > 0.14 && share(v) < 0.86);
  const power = (v) => Math.round(Math.log10(v)), text = (v) => (log && inside.includes(v) && Math.abs(power(v)) > 1 ? `10${raised(power(v))}` : shortNumber(v));
  return [low, ...inside, high].map((value) => ({ share: share(value), text: text(value) }));
}

// ---- shaders ------------------------------------------------------------------------------------------------------------

const PROJECT = `#version 300 es
precision highp float; precision highp int;
uniform mat3 turn;      // columns: right, above, back
uniform vec3 eye;
uniform vec4 lens;      // focal x, focal y, and two numbers that map depth to [-1, 1]
vec4 project(vec3 place) {
  vec3 seen = (place - eye) * turn;
  return vec4(seen.xy * lens.xy, lens.z * seen.z + lens.w, -seen.z);
}`;

const POINT_VERTEX = `${PROJECT}
layout(location = 0) in vec3 place;
layout(location = 1) in float value;
uniform vec4 size;      // diameter in pixels at depth 1, smallest and largest [pixels], growth
uniform vec3 scale;     // low, 1 / (high - low), kind: 0 linear, 1 log, 2 category, 3 one colour
uniform sampler2D lut;
uniform vec3 plain;     // colour of points without a value
flat out vec3 colour;
flat out float radius;
void main() {
  gl_Position = project(place);
  gl_PointSize = clamp(size.x / gl_Position.w, size.y, size.z) * size.w;
  radius = gl_PointSize / 2.0;
  int n = textureSize(lut, 0).x, kind = int(scale.z), row = int(value) % n;
  if (kind == 3 || (kind == 2 && value < 0.0) || (kind == 1 && value <= 0.0)) { colour = plain; return; }
  float t = ((kind == 1 ? log(value) : value) - scale.x) * scale.y;
  if (kind != 2) row = int(clamp(t, 0.0, 1.0) * float(n - 1) + 0.5);
  colour = texelFetch(lut, ivec2(row, 0), 0).rgb;
}`;

const POINT_FRAGMENT = `#version 300 es
precision highp float;
flat in vec3 colour;
flat in float radius;
uniform vec4 outline;   // its colour, and 1 for a splat that has one, else 0
out vec4 shown;
void main() {
  float r = length(gl_PointCoord * 2.0 - 1.0);
  if (r > 1.0) discard;
  vec3 shaded = colour * (1.0 - 0.3 * smoothstep(0.4, 1.0, r) * step(1.5, radius));
  shown = vec4(outline.a > 0.0 && r > 1.0 - min(0.45, 1.4 / radius) ? outline.rgb : shaded, clamp((1.0 - r) * radius + 0.25, 0.0, 1.0));
}`;

const SPHERE_VERTEX = `${PROJECT}
layout(location = 0) in vec3 normal;
layout(location = 1) in vec4 ball;    // centre and radius, one a sphere
layout(location = 2) in vec3 tint;
out vec3 n, colour, way;
void main() {
  vec3 place = ball.xyz + ball.w * normal;
  n = normal; colour = tint; way = eye - place;
  gl_Position = project(place);
}`;

const SPHERE_FRAGMENT = `#version 300 es
precision highp float;
in vec3 n, colour, way;
out vec4 shown;
void main() {
  float grazing = 1.0 - abs(dot(normalize(n), normalize(way)));
  shown = vec4(colour, 0.12 + 0.6 * grazing * grazing * grazing);
}`;

const LINE_VERTEX = `${PROJECT}
layout(location = 0) in vec3 place;
void main() { gl_Position = project(place); }`;

const LINE_FRAGMENT = `#version 300 es
precision highp float;
uniform vec3 ink;
out vec4 shown;
void main() { shown = vec4(ink, 1.0); }`;

// ---- Scene: everything that lives on the GPU, rebuilt whole after a lost context -----------------------------------------

class Program {
  constructor(gl, vertex, fragment) {
    this.id = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(this.id, shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS) && !gl.isContextLost()) throw new Error(gl.getShaderInfoLog(shader));
    }
    gl.linkProgram(this.id);
    this.at = {}; // uniform name -> location
    const count = gl.getProgramParameter(this.id, gl.ACTIVE_UNIFORMS) || 0;
    for (let i = 0; i < count; i++) { const { name } = gl.getActiveUniform(this.id, i); this.at[name] = gl.getUniformLocation(this.id, name); }
  }
}

// Unit sphere: vertices (which are normals too) and triangles.
function sphereMesh(rows = 20) {
  const normals = [], faces = [], columns = 2 * rows;
  for (let i = 0; i <= rows; i++) for (let j = 0; j <= columns; j++) {
    const [v, u] = [Math.PI * i / rows, 2 * Math.PI * j / columns], corner = i * (columns + 1) + j;
    normals.push(Math.sin(v) * Math.cos(u), Math.sin(v) * Math.sin(u), Math.cos(v));
    if (i < rows && j < columns) faces.push(corner, corner + columns + 1, corner + 1, corner + 1, corner + columns + 1, corner + columns + 2);
  }
  return { normals: new Float32Array(normals), faces: new Uint16Array(faces) };
}

class Scene {
  constructor(canvas, smooth) { // smooth: several samples a pixel
    this.canvas = canvas;
    const gl = this.gl = canvas.getContext("webgl2", { alpha: false, antialias: smooth });
    if (!gl) throw new Error("given: a browser without WebGL2; needed: WebGL2 to draw the cloud; "
      + "do: switch on hardware acceleration in the browser's settings, or use a newer browser");
    this.build();
  }

  build() {
    const gl = this.gl;
    this.points = new Program(gl, POINT_VERTEX, POINT_FRAGMENT);
    this.balls = new Program(gl, SPHERE_VERTEX, SPHERE_FRAGMENT);
    this.lines = new Program(gl, LINE_VERTEX, LINE_FRAGMENT);
    this.lut = gl.createTexture();
    this.buffers = {};
    this.sizes = {}; // buffer -> bytes
    for (const name of ["places", "values", "highlight", "normals", "faces", "spheres", "segments"]) this.buffers[name] = gl.createBuffer();
    this.pointArray = gl.createVertexArray();
    this.attribute("places", 0, 3);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.buffers.highlight);
    this.sphereArray = gl.createVertexArray();
    gl.bindVertexArray(this.sphereArray);
    const mesh = sphereMesh();
    this.faces = mesh.faces.length;
    this.upload("normals", mesh.normals);
    this.attribute("normals", 0, 3, this.sphereArray);
    this.attribute("spheres", 1, 4, this.sphereArray, 28, 0, 1);
    this.attribute("spheres", 2, 3, this.sphereArray, 28, 16, 1);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.buffers.faces);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, mesh.faces, gl.STATIC_DRAW);
    this.lineArray = gl.createVertexArray();
    this.attribute("segments", 0, 3, this.lineArray);
    gl.bindVertexArray(null);
    gl.enable(gl.DEPTH_TEST);
  }

  attribute(name, index, width, array = this.pointArray, stride = 0, offset = 0, divisor = 0, type = this.gl.FLOAT) {
    const gl = this.gl;
    gl.bindVertexArray(array);
    gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
    gl.enableVertexAttribArray(index);
    gl.vertexAttribPointer(index, width, type, false, stride, offset);
    gl.vertexAttribDivisor(index, divisor);
  }

  upload(name, numbers) { // in place where the size stays, as when a cloud is recoloured
    const gl = this.gl;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
    if (this.sizes[name] === numbers.byteLength) gl.bufferSubData(gl.ARRAY_BUFFER, 0, numbers);
    else gl.bufferData(gl.ARRAY_BUFFER, numbers, gl.DYNAMIC_DRAW);
    this.sizes[name] = numbers.byteLength;
  }

  setPlaces(places) { this.upload("places", places); this.count = places.length / 3; }

  setValues(values, lut) {
    const gl = this.gl, types = { 1: gl.UNSIGNED_BYTE, 2: gl.UNSIGNED_SHORT, 4: values instanceof Int32Array ? gl.INT : gl.FLOAT };
    gl.bindVertexArray(this.pointArray);
    if (values.length) { this.upload("values", values); this.attribute("values", 1, 1, this.pointArray, 0, 0, 0, types[values.BYTES_PER_ELEMENT]); }
    else gl.disableVertexAttribArray(1);
    gl.bindVertexArray(null);
    gl.bindTexture(gl.TEXTURE_2D, this.lut);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB8, lut.length / 3, 1, 0, gl.RGB, gl.UNSIGNED_BYTE, lut);
    for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, filter, gl.NEAREST);
  }

  setMarks(highlight, spheres, tints, segments) {
    const gl = this.gl;
    gl.bindVertexArray(null);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.buffers.highlight);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, highlight, gl.DYNAMIC_DRAW);
    this.upload("segments", segments);
    Object.assign(this, { highlighted: highlight.length, spheres, tints, corners: segments.length / 3 });
  }

  sortedSpheres(eye) { // far ones first, since a near one is blended over what is behind it
    const { spheres, tints } = this, n = spheres.length / 4, data = new Float32Array(7 * n);
    const depth = Float32Array.from({ length: n }, (_, i) => Math.hypot(spheres[4 * i] - eye[0], spheres[4 * i + 1] - eye[1], spheres[4 * i + 2] - eye[2]));
    const order = Array.from({ length: n }, (_, i) => i).sort((i, j) => depth[j] - depth[i]);
    order.forEach((i, at) => {
      data.set(spheres.subarray(4 * i, 4 * i + 4), 7 * at);
      for (let c = 0; c < 3; c++) data[7 * at + 4 + c] = tints[3 * i + c] / 255;
    });
    return data;
  }

  use(program, frame, lens) {
    const gl = this.gl, { near, far, focal, width, height } = lens;
    gl.useProgram(program.id);
    gl.uniformMatrix3fv(program.at.turn, false, [...frame.right, ...frame.above, ...frame.back]);
    gl.uniform3fv(program.at.eye, frame.eye);
    gl.uniform4f(program.at.lens, 2 * focal / width, 2 * focal / height, -(far + near) / (far - near), -2 * far * near / (far - near));
  }

  draw(frame, lens, look) { // look: background, ink, plain, scale, diameter, ratio
    const gl = this.gl, { ratio } = look;
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.clearColor(...look.background, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    this.use(this.points, frame, lens);
    const { at } = this.points, size = (grow) => gl.uniform4f(at.size, look.diameter * lens.focal * ratio, SPLAT[0] * ratio, SPLAT[1] * ratio, grow);
    gl.uniform3fv(at.scale, look.scale);
    gl.uniform3fv(at.plain, look.plain);
    gl.bindTexture(gl.TEXTURE_2D, this.lut);
    gl.bindVertexArray(this.pointArray);
    gl.enable(gl.SAMPLE_ALPHA_TO_COVERAGE);
    gl.uniform4f(at.outline, 0, 0, 0, 0); size(1);
    gl.drawArrays(gl.POINTS, 0, this.count);
    if (this.highlighted) {
      gl.uniform4f(at.outline, ...look.ink, 1); size(GROW);
      gl.drawElements(gl.POINTS, this.highlighted, gl.UNSIGNED_INT, 0);
    }
    gl.disable(gl.SAMPLE_ALPHA_TO_COVERAGE);
    if (this.corners) this.drawLines(frame, lens, look.ink);
    if (this.spheres.length) this.drawSpheres(frame, lens);
  }

  drawLines(frame, lens, ink) {
    this.use(this.lines, frame, lens);
    this.gl.uniform3fv(this.lines.at.ink, ink);
    this.gl.bindVertexArray(this.lineArray);
    this.gl.drawArrays(this.gl.LINES, 0, this.corners);
  }

  drawSpheres(frame, lens) {
    const gl = this.gl;
    this.upload("spheres", this.sortedSpheres(frame.eye));
    this.use(this.balls, frame, lens);
    gl.enable(gl.BLEND); gl.depthMask(false);
    gl.blendFunc(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA);
    gl.bindVertexArray(this.sphereArray);
    gl.drawElementsInstanced(gl.TRIANGLES, this.faces, gl.UNSIGNED_SHORT, 0, this.spheres.length / 4);
    gl.disable(gl.BLEND); gl.depthMask(true);
  }
}

// ---- View: page, input and one Scene --------------------------------------------------------------------------------------

const MOST_LIVE = 4, SMOOTH_UP_TO = 20000; // points: several samples a pixel cost software rendering three times as much
const LIVE = (globalThis[Symbol.for("erwin_nsa.cloud.live")] ??= new Set()); // shared by all copies of this module; oldest first
const THEMES = {
  light: { background: [0.97, 0.973, 0.98], ink: [0.1, 0.11, 0.13], plain: [0.69, 0.7, 0.72] },
  dark: { background: [0.078, 0.086, 0.102], ink: [0.95, 0.95, 0.96], plain: [0.38, 0.39, 0.42] },
};
const TYPES = { f4: Float32Array, u1: Uint8Array, u2: Uint16Array, i4: Int32Array };
const GROUPS = { // what has to be done again when a trait changes; anything else only needs a new frame
  places: ["positions", "ids", "total", "up", "point_size", "home"],
  paint: ["values", "value_type", "lut", "categorical", "label", "unit", "scale", "limits", "names"],
  marks: ["highlight", "spheres", "sphere_colours", "segments"],
  page: ["theme", "height", "message"],
  frame: ["camera"],
  rings: ["picked", "hovered"], // on the page above the scene: no new frame
};
const HELP = "Drag: turn. Shift and drag: move. Wheel (after a click): zoom. Click: pick. Keys: arrows turn, Shift and arrows move, + and − zoom, "
  + "Enter picks the point in the middle, Escape lets go, R resets.";

// The DataView of a bytes trait as numbers, without a copy where its start allows.
function numbers(view, type) {
  const Type = TYPES[type];
  if (!view || !view.byteLength) return new Type(0);
  const length = Math.floor(view.byteLength / Type.BYTES_PER_ELEMENT), end = view.byteOffset + length * Type.BYTES_PER_ELEMENT;
  if (view.byteOffset % Type.BYTES_PER_ELEMENT === 0) return new Type(view.buffer, view.byteOffset, length);
  return new Type(view.buffer.slice(view.byteOffset, end));
}

function make(parent, tag, name, text = "") {
  const node = document.createElement(tag);
  node.className = `erwin-cloud-${name}`;
  node.textContent = text;
  parent.append(node);
  return node;
}

class View {
  constructor(model, el) {
    Object.assign(this, { model, dirty: new Set(), hover: null, pointers: new Map(), frames: 0, ratio: 1, size: [300, 150], ended: new AbortController() });
    this.layOut(el);
    for (const [group, names] of Object.entries(GROUPS)) for (const name of names) this.listen(`change:${name}`, () => this.request(group));
    this.listen("msg:custom", (message) => { if (message?.kind === "screenshot") this.sendPicture(message.name); });
    const { signal } = this.ended;
    this.resized = new ResizeObserver(() => this.request("size"));
    this.resized.observe(this.stage);
    addEventListener("resize", () => this.request("size"), { signal });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.request("page"), { signal });
    this.themed = new MutationObserver(() => this.request("page"));
    this.themed.observe(document.body, { attributes: true, attributeFilter: ["class", "data-jp-theme-light"] });
    this.setPage();
    this.start();
  }

  listen(event, act) {
    this.model.on(event, act);
    this.ended.signal.addEventListener("abort", () => this.model.off(event, act));
  }

  layOut(el) {
    const { signal } = this.ended, button = (text, title, act) => {
      const node = make(this.tools, "button", "button", text);
      node.title = title; node.type = "button";
      node.addEventListener("click", act, { signal });
      return node;
    };
    this.root = make(el, "div", "root");
    this.stage = make(this.root, "div", "stage");
    this.tools = make(this.stage, "div", "tools");
    button("Reset", "See the whole cloud again (R)", () => this.reset());
    button("PNG", "Save this picture", () => this.savePicture());
    const help = button("?", HELP, () => { this.help.hidden = !this.help.hidden; help.setAttribute("aria-expanded", String(!this.help.hidden)); });
    help.setAttribute("aria-label", "Mouse and keys");
    this.help = make(this.stage, "div", "help", HELP);
    this.help.hidden = true;
    this.rings = ["hovered", "picked"].map((kind) => make(this.stage, "div", `ring ${kind}`)); // picked is on top
    this.note = make(this.stage, "div", "note");
    this.note.setAttribute("role", "alert");
    this.foot = make(this.root, "div", "foot");
    this.legend = make(this.foot, "div", "legend");
    const says = make(this.foot, "div", "says");
    this.status = make(says, "div", "status");
    this.status.setAttribute("aria-live", "polite");
    this.amount = make(says, "div", "amount");
  }

  // -- life: start, sleep (another scene took over), rebuild (the context is gone for good), remove

  start() {
    for (const view of LIVE) if (view.wasShown && !view.root.isConnected) view.sleep();
    if (LIVE.size >= MOST_LIVE) return this.say(`${MOST_LIVE} scenes are live on this page, the most that is drawn at once.`, "Show this one", () => this.takeOver());
    this.say("");
    LIVE.add(this);
    const problem = this.problem(); // an empty or broken cloud needs no canvas yet
    if (problem) { LIVE.delete(this); this.waiting = true; return this.say(problem); }
    this.waiting = false;
    this.canvas = make(this.stage, "canvas", "canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    try {
      const count = (this.model.get("positions")?.byteLength ?? 0) / 12;
      this.scene = new Scene(this.canvas, count <= SMOOTH_UP_TO);
    } catch (error) { this.sleep(); return this.say(error.message); }
    this.awake = new AbortController();
    this.hear();
    for (const group of ["size", "page", "places", "paint", "marks"]) this.dirty.add(group);
    this.request();
  }

  takeOver() { // from the scene that was used longest ago
    if (LIVE.size >= MOST_LIVE) LIVE.values().next().value.sleep();
    this.start();
  }

  sleep() {
    LIVE.delete(this);
    this.awake?.abort();
    if (this.scene && !this.scene.gl.isContextLost()) this.scene.gl.getExtension("WEBGL_lose_context")?.loseContext(); // frees its memory now
    this.canvas?.remove();
    this.scene = this.canvas = null;
    this.say(`Another scene took this one's place: ${MOST_LIVE} are drawn at once.`, "Show this one", () => this.takeOver());
  }

  remove() {
    this.sleep();
    this.ended.abort();
    this.resized.disconnect();
    this.themed.disconnect();
    this.root.remove();
  }

  say(text, action = "", act = null) { // a message in place of the scene; none for an empty text
    this.note.hidden = !text;
    this.note.replaceChildren();
    make(this.note, "p", "text", text);
    if (action) make(this.note, "button", "button", action).addEventListener("click", act);
    this.root.classList.toggle("silent", Boolean(text));
  }

  lost(event) {
    event.preventDefault(); // else the browser would not restore it
    this.say("The browser took the graphics memory back. Waiting for it …", "Rebuild the scene", () => { this.sleep(); this.start(); });
  }

  restored() {
    this.scene.build();
    this.say("");
    for (const group of ["places", "paint", "marks"]) this.dirty.add(group);
    this.request();
  }

  // -- frames

  request(group = "frame") {
    this.dirty.add(group);
    if (this.waiting && group !== "size" && !this.problem()) return this.start();
    if (this.asked) return;
    this.asked = requestAnimationFrame(() => { this.asked = 0; this.update(); });
  }

  update() {
    if (this.root.isConnected) this.wasShown = true;
    if (this.dirty.has("page")) this.setPage();
    if (this.waiting) this.say(this.problem());
    if (!this.scene || this.scene.gl.isContextLost()) return;
    const problem = this.problem();
    if (problem || this.silenced) this.say(problem);
    this.silenced = Boolean(problem);
    if (problem) return;
    this.setSize();
    if (this.dirty.has("places")) this.setPlaces();
    if (this.dirty.has("marks") || this.dirty.has("places")) this.setMarks();
    if (this.dirty.has("paint") || this.dirty.has("places")) this.setPaint();
    if (["paint", "places", "page"].some((group) => this.dirty.has(group))) this.setLegend();
    const quick = this.dirty.size === 1 && this.dirty.has("rings");
    this.dirty.clear();
    this.setStatus();
    if (quick) this.placeRings();
    else this.draw();
  }

  problem() { // what is wrong with the traits, or ""
    const get = (name) => this.model.get(name), n = (get("positions")?.byteLength ?? 0) / 12;
    if (get("message")) return get("message");
    if (!n) return "No points yet.";
    const values = (get("values")?.byteLength ?? 0) / TYPES[get("value_type") || "f4"].BYTES_PER_ELEMENT, [low, high] = get("limits");
    if (values && values !== n) return `given: ${whole(values)} values for ${whole(n)} points; needed: one value a point; do: send both together`;
    if (!(low < high) || (get("scale") === "log" && low <= 0))
      return `given: limits ${low} and ${high}; needed: the lower first${get("scale") === "log" ? ", above zero on a logarithmic scale" : ""}; do: set other limits`;
    const camera = get("camera");
    if (camera.length !== 6 || !camera.every(Number.isFinite) || camera[2] <= 0)
      return `given: camera ${camera}; needed: azimuth, elevation, a distance above zero, and a target of three numbers; do: set it to the trait home`;
    return "";
  }

  setPage() {
    const { model, root } = this, wish = model.get("theme"), { jpThemeLight } = document.body.dataset;
    const outside = jpThemeLight !== undefined ? jpThemeLight === "false"
      : document.body.classList.contains("quarto-dark") || (!document.body.classList.contains("quarto-light") && matchMedia("(prefers-color-scheme: dark)").matches);
    this.theme = wish === "auto" ? (outside ? "dark" : "light") : wish;
    root.classList.toggle("dark", this.theme === "dark");
    this.stage.style.height = `${model.get("height")}px`;
  }

  setSize() { // asked each time, because a page that hides its outputs for a moment (JupyterLab changing its theme) tells no observer
    const { canvas } = this, { clientWidth, clientHeight } = this.stage, ratio = globalThis.devicePixelRatio || 1;
    const [width, height] = [clientWidth, clientHeight].map((length) => Math.round(length * ratio));
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    Object.assign(this, { ratio, size: [clientWidth, clientHeight] });
    this.foot.classList.toggle("narrow", clientWidth < 520);
  }

  setPlaces() {
    const { model, scene } = this;
    this.cloud = { places: numbers(model.get("positions"), "f4"), diameter: model.get("point_size"), highlight: [] };
    this.ids = numbers(model.get("ids"), "i4");
    this.count = this.cloud.places.length / 3;
    scene.setPlaces(this.cloud.places);
    const all = this.ids.length === 0, total = model.get("total") || this.count;
    this.amount.textContent = all ? `${whole(this.count)} points` : `${whole(this.count)} of ${whole(total)} points shown `;
    if (!all && model.send) make(this.amount, "button", "link", "show all").addEventListener("click", () => { model.set("full", true); model.save_changes(); });
  }

  setMarks() {
    const get = (name, type) => numbers(this.model.get(name), type), spheres = get("spheres", "f4");
    const rows = Array.from(get("highlight", "i4"), (id) => rowOf(id, this.ids, this.count)).filter((row) => row >= 0);
    this.cloud.highlight = new Uint32Array(rows);
    this.bounds = boundsOf(this.cloud.places, spheres);
    this.scene.setMarks(this.cloud.highlight, spheres, get("sphere_colours", "u1"), get("segments", "f4"));
  }

  setPaint() {
    const { model } = this, [low, high] = model.get("limits"), log = model.get("scale") === "log";
    this.values = numbers(model.get("values"), model.get("value_type") || "f4");
    this.lut = numbers(model.get("lut"), "u1");
    const kind = !this.values.length ? 3 : model.get("categorical") ? 2 : log ? 1 : 0;
    this.scale = kind === 1 ? [Math.log(low), 1 / Math.log(high / low), 1] : [low, 1 / (high - low), kind];
    this.scene.setValues(this.values, this.lut);
  }

  colourAt(row) { const [r, g, b] = this.lut.subarray(3 * row, 3 * row + 3); return `rgb(${r} ${g} ${b})`; }

  // Everything the legend says, for the page and for the saved picture: title, colours of the bar (in steps for ids), labels below it, single keys.
  legendParts() {
    const { model, values } = this, unit = model.get("unit"), label = model.get("label");
    if (!values.length) return { title: label, bar: [], labels: [], keys: [] };
    let least = Infinity, most = -Infinity;
    for (let i = 0; i < values.length; i++) { const v = values[i]; if (v < least) least = v; if (v > most) most = v; }
    const title = label + (unit ? ` [${unit}]` : ""), plain = `rgb(${THEMES[this.theme].plain.map((c) => Math.round(255 * c)).join(" ")})`;
    return model.get("categorical") ? this.idLegend(title, plain, least, most) : this.valueLegend(title, plain, least, most);
  }

  idLegend(title, plain, least, most) {
    const names = this.model.get("names"), colours = this.lut.length / 3, none = least < 0 ? [{ colour: plain, text: "none" }] : [];
    const rows = Array.from({ length: Math.min(most + 1, colours) }, (_, i) => i);
    if (most < Math.min(12, colours)) return { title, bar: [], labels: [], keys: [...rows.map((i) => ({ colour: this.colourAt(i), text: names[i] ?? String(i) })), ...none] };
    const labels = [{ share: 0, text: "0" }, { share: 1, text: whole(rows.length - 1) }];
    const repeats = most >= colours ? `: ${whole(most + 1)} ids, colours repeat after ${colours}` : "";
    return { title: title + repeats, bar: rows.map((i) => this.colourAt(i)), labels, keys: none, steps: true };
  }

  valueLegend(title, plain, least, most) {
    const [low, high] = this.model.get("limits"), log = this.model.get("scale") === "log", labels = ticks(low, high, log), last = labels[labels.length - 1];
    const slack = 1e-6 * (high - low), step = (this.lut.length / 3 - 1) / 32, unplaced = log && least <= 0;
    if (least < low - slack && !unplaced) labels[0].text = `≤ ${labels[0].text}`;
    if (most > high + slack) last.text = `≥ ${last.text}`;
    const bar = Array.from({ length: 33 }, (_, i) => this.colourAt(Math.round(i * step)));
    return { title, bar, labels, keys: unplaced ? [{ colour: plain, text: least < 0 ? "0 or less" : "0" }] : [] };
  }

  setLegend() {
    const { title, bar, labels, keys, steps } = this.legendParts(), { legend } = this;
    legend.replaceChildren();
    if (title) make(legend, "div", "title", title);
    const line = make(legend, "div", "line");
    if (bar.length) {
      const scale = make(line, "div", "scale"), stops = steps ? bar.map((c, i) => `${c} ${100 * i / bar.length}% ${100 * (i + 1) / bar.length}%`) : bar;
      make(scale, "div", "bar").style.background = `linear-gradient(to right, ${stops.join(",")})`;
      for (const { share, text } of labels) {
        const tick = make(scale, "span", "tick", text);
        tick.style.left = `${100 * share}%`;
        tick.style.transform = `translateX(${-100 * share}%)`;
      }
    }
    for (const { colour, text } of keys) {
      const key = make(line, "span", "key");
      make(key, "i", "swatch").style.background = colour;
      key.append(text);
    }
    this.canvas.setAttribute("aria-label", `Point cloud of ${whole(this.count)} points${title ? `, coloured by ${title}` : ""}. ${HELP}`);
  }

  describe(row) {
    const { model, values } = this, id = this.ids.length ? this.ids[row] : row, p = [0, 1, 2].map((i) => shortNumber(this.cloud.places[3 * row + i]));
    const names = model.get("names"), value = values[row], unit = model.get("unit");
    const told = !values.length ? "" : !model.get("categorical") ? shortNumber(value, 4) + (unit && unit !== "-" ? ` ${unit}` : "")
      : value < 0 ? "none" : names[value] ?? whole(value);
    return `point ${whole(id)}${told && `: ${told}`} at (${p.join(", ")})`;
  }

  setStatus() {
    const row = (name) => rowOf(this.model.get(name), this.ids, this.count);
    this.rows = { hovered: row("hovered"), picked: row("picked") }; // -1 for none, and for points that are not drawn
    const { hovered, picked } = this.rows, asked = this.model.get("picked"), total = this.model.get("total") || this.count;
    const absent = asked < total ? "is not among the points shown" : `does not exist: ids run from 0 to ${whole(total - 1)}`;
    this.status.textContent = hovered >= 0 ? this.describe(hovered) : picked >= 0 ? `picked ${this.describe(picked)}` : asked < 0 ? "" : `point ${whole(asked)} ${absent}`;
    this.status.title = this.status.textContent; // whole where the line is too short for it
  }

  aim() {
    const frame = cameraFrame(this.model.get("camera"), this.model.get("up"));
    return { frame, lens: lensOf(frame, this.bounds, ...this.size) };
  }

  draw() {
    const { frame, lens } = this.aim();
    this.scene.draw(frame, lens, { ...THEMES[this.theme], scale: this.scale, diameter: this.cloud.diameter, ratio: this.ratio });
    this.placeRings();
    Object.assign(this.canvas.dataset, { frames: ++this.frames, points: this.count, theme: this.theme });
  }

  ringOf(row) { // middle and radius [CSS pixels], or null
    const { frame, lens } = this.aim(), at = row < 0 ? null : placeOf(row, this.cloud, frame, lens);
    return at && { ...at, radius: Math.max(7, 1.5 * at.radius + 3) };
  }

  placeRings() {
    for (const node of this.rings) {
      const at = this.ringOf(this.rows[node.classList.contains("picked") ? "picked" : "hovered"]);
      node.hidden = !at;
      if (at) Object.assign(node.style, { left: `${at.x - at.radius}px`, top: `${at.y - at.radius}px`, width: `${2 * at.radius}px`, height: `${2 * at.radius}px` });
    }
  }

  // -- input

  set(name, value) { this.model.set(name, value); this.model.save_changes(); }

  setCamera(camera) {
    const [azimuth, elevation, distance, ...target] = camera, { radius } = this.bounds;
    this.set("camera", [azimuth, clamp(elevation, -Math.PI / 2, Math.PI / 2), clamp(distance, radius / 500, 100 * radius), ...target]);
  }

  reset() { if (this.ready()) this.setCamera(this.model.get("home")); }

  turn(across, down) {
    const [azimuth, elevation, ...rest] = this.model.get("camera");
    this.setCamera([azimuth - across, elevation + down, ...rest]);
  }

  move(across, down) { // [pixels]
    const { frame, lens } = this.aim(), scale = frame.distance / lens.focal;
    this.setCamera([...this.model.get("camera").slice(0, 3), ...frame.target.map((t, i) => t + scale * (down * frame.above[i] - across * frame.right[i]))]);
  }

  zoom(factor) {
    const camera = [...this.model.get("camera")];
    camera[2] *= factor;
    this.setCamera(camera);
  }

  idAt(x, y) {
    const { frame, lens } = this.aim(), row = pickRow(this.cloud, frame, lens, x, y);
    return row >= 0 && this.ids.length ? this.ids[row] : row;
  }

  ready() { return this.scene && this.bounds && !this.silenced && !this.scene.gl.isContextLost(); }

  hear() {
    const { canvas, awake: { signal } } = this, on = (name, act, options = {}) => canvas.addEventListener(name, act, { signal, ...options });
    on("webglcontextlost", (event) => this.lost(event));
    on("webglcontextrestored", () => this.restored());
    on("contextmenu", (event) => event.preventDefault());
    on("pointerdown", (event) => this.press(event));
    on("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel"]) on(name, (event) => this.release(event));
    on("pointerleave", () => { this.hover = null; this.set("hovered", -1); });
    on("wheel", (event) => this.roll(event), { passive: false });
    on("keydown", (event) => this.key(event));
  }

  press(event) {
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    if (!this.pointers.size) this.travelled = 0;
    this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    LIVE.delete(this); LIVE.add(this); // the scene in use is the last to be put to sleep
  }

  drag(event) {
    if (!this.ready()) return;
    const before = this.pointers.get(event.pointerId), now = [event.offsetX, event.offsetY];
    if (!before) return this.point(now);
    const [across, down] = [now[0] - before[0], now[1] - before[1]];
    this.travelled += Math.abs(across) + Math.abs(down);
    this.pointers.set(event.pointerId, now);
    if (this.travelled < 4) return;
    if (this.pointers.size === 2) { // two fingers: their middle moves the cloud, their distance zooms
      const other = [...this.pointers].find(([id]) => id !== event.pointerId)[1], apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
      this.move(across / 2, down / 2);
      this.zoom(apart(before) / apart(now));
    } else if (event.shiftKey || event.buttons > 1) this.move(across, down);
    else this.turn(0.008 * across, 0.008 * down);
  }

  release(event) {
    const alone = this.pointers.size === 1;
    this.pointers.delete(event.pointerId);
    if (event.type === "pointerup" && alone && this.travelled < 4 && this.ready()) this.pick(event.offsetX, event.offsetY);
  }

  pick(x, y) {
    const id = this.idAt(x, y);
    if (id >= 0) this.set("picked", id);
  }

  point(at) { // hovering, once a frame
    const waits = this.hover !== null;
    this.hover = at;
    if (waits) return;
    requestAnimationFrame(() => {
      if (this.hover && this.ready() && !this.pointers.size) this.set("hovered", this.idAt(...this.hover));
      this.hover = null;
    });
  }

  roll(event) { // without focus the page scrolls
    if (!this.ready() || (this.canvas.getRootNode().activeElement !== this.canvas && !event.ctrlKey)) return;
    event.preventDefault();
    this.zoom(Math.exp(clamp(event.deltaY * (event.deltaMode ? 20 : 1), -240, 240) * (event.ctrlKey ? 0.008 : 0.0015)));
  }

  key(event) {
    if (!this.ready() || event.ctrlKey || event.metaKey || event.altKey) return;
    const [width, height] = this.size, go = (across, down) => (event.shiftKey ? this.move(24 * across, 24 * down) : this.turn(0.1 * across, 0.1 * down));
    const acts = {
      ArrowLeft: () => go(-1, 0), ArrowRight: () => go(1, 0), ArrowUp: () => go(0, -1), ArrowDown: () => go(0, 1),
      "+": () => this.zoom(0.87), "=": () => this.zoom(0.87), "-": () => this.zoom(1.15), "_": () => this.zoom(1.15),
      r: () => this.reset(), R: () => this.reset(),
      Enter: () => this.pick(width / 2, height / 2), Escape: () => this.set("picked", -1),
    };
    if (!acts[event.key]) return;
    event.preventDefault(); event.stopPropagation(); // JupyterLab has keys of its own
    acts[event.key]();
  }

  // -- pictures

  picture() { // the scene and its legend on one canvas
    const { canvas, ratio } = this, style = getComputedStyle(this.root), wide = canvas.width / ratio, high = canvas.height / ratio, margin = 14;
    const { title, bar, labels, keys, steps } = this.legendParts(), out = document.createElement("canvas"), pen = out.getContext("2d");
    out.width = canvas.width; out.height = canvas.height + Math.round(64 * ratio);
    pen.fillStyle = style.backgroundColor; pen.fillRect(0, 0, out.width, out.height);
    this.draw();
    pen.drawImage(canvas, 0, 0);
    pen.scale(ratio, ratio);
    const ring = this.ringOf(this.rows.picked);
    pen.beginPath();
    if (ring) pen.arc(ring.x, ring.y, ring.radius, 0, 2 * Math.PI);
    Object.assign(pen, { strokeStyle: style.getPropertyValue("--accent"), lineWidth: 2.5 }).stroke();
    const write = (text, x, y, align = "left") => { pen.textAlign = align; pen.fillStyle = style.color; pen.fillText(text, x, y); };
    pen.font = `600 13px ${style.fontFamily}`; write(title, margin, high + 20);
    pen.font = `12px ${style.fontFamily}`; write(this.amount.firstChild?.textContent.trim() ?? "", wide - margin, high + 20, "right");
    const length = bar.length ? Math.min(320, wide - 2 * margin) : 0;
    bar.forEach((colour, i) => {
      const [from, to] = [margin + length * i / bar.length, margin + length * (i + 1) / bar.length];
      pen.fillStyle = colour; pen.fillRect(from, high + 28, steps ? to - from : to - from + 0.5, 10);
    });
    for (const { share, text } of labels) write(text, margin + share * length, high + 54, share === 0 ? "left" : share === 1 ? "right" : "center");
    let x = margin + (length ? length + 18 : 0);
    for (const { colour, text } of keys) {
      pen.fillStyle = colour; pen.fillRect(x, high + 28, 10, 10);
      write(text, x + 15, high + 37);
      x += 32 + pen.measureText(text).width;
    }
    return out;
  }

  savePicture() {
    if (!this.ready()) return;
    this.picture().toBlob((blob) => {
      const link = document.createElement("a");
      Object.assign(link, { href: URL.createObjectURL(blob), download: "cloud.png" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }

  sendPicture(name) {
    if (!this.ready()) return;
    this.picture().toBlob(async (blob) => this.model.send({ kind: "png", name }, undefined, [await blob.arrayBuffer()]));
  }
}

export function render({ model, el }) {
  const view = new View(model, el);
  return () => view.remove();
}

// ---- pages without a kernel -------------------------------------------------------------------------------------------

// What anywidget hands to `render`, over the numbers in a page.
class PageModel {
  constructor(traits) { this.traits = traits; this.heard = {}; }
  get(name) { return this.traits[name]; }
  set(name, value) {
    if (JSON.stringify(this.traits[name]) === JSON.stringify(value) && !ArrayBuffer.isView(value)) return;
    this.traits[name] = value;
    for (const act of this.heard[`change:${name}`] ?? []) act();
  }
  save_changes() {}
  on(event, act) { (this.heard[event] ??= []).push(act); }
  off(event, act) { this.heard[event] = (this.heard[event] ?? []).filter((other) => other !== act); }
}

function decoded(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new DataView(bytes.buffer);
}

// Fill every <div class="erwin-cloud-place"> from the JSON inside it; with `linked` all share one camera.
export function openPage(linked) {
  const models = Array.from(document.querySelectorAll(".erwin-cloud-place"), (el) => {
    const { plain, bytes } = JSON.parse(el.querySelector("script").textContent);
    for (const name of Object.keys(bytes)) plain[name] = decoded(bytes[name]);
    const model = new PageModel(plain);
    render({ model, el });
    return model;
  });
  if (linked) for (const model of models) model.on("change:camera", () => models.forEach((other) => other.set("camera", model.get("camera"))));
  globalThis.erwinClouds = models; // for scripts of the page
}

export default { render };
