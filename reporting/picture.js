"use strict";
// An image with regions, and what is true and said of its objects, projected onto it.

// Glyphs of radius 1.
const SHAPES = {
  truth: "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0 -2 0z",
  text: "M-1 -1L1 1M1 -1L-1 1",
  head: "M0 -1L1 0L0 1L-1 0z",
};
const WHO = { truth: "the truth", text: "the answer", head: "the 3D head" };

/** The pinhole camera of OpenCV: pixel centres lie at integers. Null behind the camera. */
function project([x, y, z], [fx, fy, cx, cy]) {
  return z > 0.01 ? [(fx * x) / z + cx, (fy * y) / z + cy] : null;
}

/** What is drawn of a question: its truths, and what one answer says. Points of all views. */
function pointsOf(question, answer) {
  const points = question.truths.map((box) => ({ ...box, kind: "truth" }));
  if (answer) {
    points.push(...answer.boxes.map((box) => ({ ...box, kind: "text" })));
    points.push(...(answer.head || []).map((box) => ({ ...box, kind: "head" })));
  }
  return points;
}

/** The true point that a point speaks of; where there is only one object, a name is not needed. */
function truthOf(point, points) {
  const truths = points.filter((other) => other.kind === "truth" && other.view === point.view);
  return truths.find((other) => other.mention === point.mention) || (truths.length === 1 ? truths[0] : null);
}

function distance(a, b) {
  return Math.hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);
}

/** A sentence about a point: who says what, and how far off that is. */
function pointText(point, points) {
  const at = point.at.map((value) => value.toFixed(2)).join(", ");
  const truth = truthOf(point, points);
  const off = point.kind !== "truth" && truth ? `, ${metres(distance(point.at, truth.at))} off` : "";
  return `${point.mention || "object"}: ${WHO[point.kind]} says (${at}) m${off}`.replace("the truth says", "truth");
}

/** The corners of a box along the camera's axes; sizes are those along x, y, z. */
function corners({ at, size }) {
  const found = [];
  for (let i = 0; i < 8; i++) {
    const sign = (bit) => (i & bit ? 0.5 : -0.5);
    found.push([at[0] + sign(1) * size[0], at[1] + sign(2) * size[1], at[2] + sign(4) * size[2]]);
  }
  return found;
}

// Pairs of corners that differ in one sign.
const EDGES = [];
for (let a = 0; a < 8; a++) for (const bit of [1, 2, 4]) if (!(a & bit)) EDGES.push([a, a | bit]);

/**
 * Draw one view of a question as SVG.
 * say(text) is told what the pointer is at, and "" where it is at nothing.
 */
function drawPicture(question, index, view, answer, say) {
  const [width, height] = view.size || [640, 480];
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "picture" });
  if (view.src) root.append(svg("image", { href: view.src, width, height, preserveAspectRatio: "none" }));
  else root.append(svg("text", { x: 8, y: height / 2, class: "missing" }, "no room for this image, or it is gone"));
  for (const region of question.regions.filter((region) => region.view === index)) {
    const [x, y, w, h] = region.box;
    const shape = { x, y, width: w, height: h };
    root.append(svg("rect", { class: "region under", ...shape }));
    root.append(svg("rect", { class: "region", stroke: colourOf(region.mention), ...shape }));
  }
  if (view.camera && view.size) drawPoints(root, pointsOf(question, answer), index, view, say);
  return root;
}

function drawPoints(root, points, index, view, say) {
  const radius = view.size[0] / 60;
  const line = svg("path", { class: "off" });
  root.append(line);
  for (const point of points.filter((point) => point.view === index)) {
    if (point.size) root.append(wireframe(point, view.camera));
    const at = project(point.at, view.camera);
    if (!at) continue;
    const truth = truthOf(point, points);
    const to = truth && project(truth.at, view.camera);
    const text = pointText(point, points);
    const enter = () => {
      line.setAttribute("d", to ? `M${at.join(" ")}L${to.join(" ")}` : "");
      say(text);
    };
    const leave = () => {
      line.setAttribute("d", "");
      say("");
    };
    const place = `translate(${at.map((v) => v.toFixed(1)).join(" ")})`;
    const glyph = { class: "glyph", "data-place": place, "data-radius": radius };
    root.append(svg("g", { ...glyph, transform: `${place} scale(${radius.toFixed(2)})`, onpointerenter: enter, onpointerleave: leave },
      svg("title", {}, text), svg("circle", { r: 1.6, class: "target" }), svg("path", { class: "halo", d: SHAPES[point.kind] }),
      svg("path", { stroke: colourOf(point.mention), d: SHAPES[point.kind] })));
  }
}

function wireframe(point, camera) {
  const pixels = corners(point).map((corner) => project(corner, camera));
  const edges = EDGES.filter(([a, b]) => pixels[a] && pixels[b]);
  const d = edges.map(([a, b]) => `M${pixels[a].join(" ")}L${pixels[b].join(" ")}`).join("");
  return svg("path", { class: `wire ${point.kind}`, d, stroke: colourOf(point.mention) });
}

/** The large view of an image: wheel, pinch or buttons zoom, dragging moves. */
class Enlarged {
  constructor(dialog) {
    this.dialog = dialog;
    this.stage = dialog.querySelector(".stage");
    this.fingers = new Map();
    dialog.querySelector(".tools").addEventListener("click", (event) => this.tool(event.target.dataset.zoom));
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    this.stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.stage.addEventListener("pointerdown", (event) => this.down(event));
    this.stage.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      this.stage.addEventListener(name, (event) => this.fingers.delete(event.pointerId));
    }
  }

  open(picture, [width, height]) {
    this.picture = picture;
    this.whole = [0, 0, width, height];
    this.stage.replaceChildren(picture);
    this.show(this.whole);
    this.dialog.showModal();
  }

  show(box) {
    this.box = box;
    this.picture.setAttribute("viewBox", box.map((value) => value.toFixed(2)).join(" "));
    // Marks stay as small as they are, so that what lies below them is seen.
    for (const glyph of this.picture.querySelectorAll(".glyph")) {
      const radius = (0.6 * glyph.dataset.radius * box[2]) / this.whole[2];
      glyph.setAttribute("transform", `${glyph.dataset.place} scale(${radius})`);
    }
  }

  tool(name) {
    const [x, y, width, height] = this.box;
    if (name === "in") this.zoom(0.7, x + width / 2, y + height / 2);
    if (name === "out") this.zoom(1 / 0.7, x + width / 2, y + height / 2);
    if (name === "fit") this.show(this.whole);
    if (name === "close") this.dialog.close();
  }

  /** Zoom so that what lies at (x, y) stays there. */
  zoom(factor, x, y) {
    const [left, top, width, height] = this.box;
    const bounded = Math.min(Math.max(factor, this.whole[2] / 40 / width), this.whole[2] / width);
    if (bounded * width >= this.whole[2]) this.show(this.whole);
    else this.show([x - (x - left) * bounded, y - (y - top) * bounded, width * bounded, height * bounded]);
  }

  /** From the screen's pixels to the image's. */
  place(event) {
    const matrix = this.picture.getScreenCTM().inverse();
    return new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
  }

  wheel(event) {
    event.preventDefault();
    const { x, y } = this.place(event);
    this.zoom(Math.exp(event.deltaY * 0.0015), x, y);
  }

  down(event) {
    this.fingers.set(event.pointerId, [event.clientX, event.clientY]);
    this.stage.setPointerCapture(event.pointerId);
  }

  move(event) {
    const before = this.fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    const scale = this.picture.getScreenCTM().a;
    const others = [...this.fingers].filter(([id]) => id !== event.pointerId);
    if (others.length === 1) {
      const other = others[0][1];
      const gap = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
      const { x, y } = this.place(event);
      this.zoom(gap(before) / gap(now), x, y);
    } else if (this.box !== this.whole) {
      const [left, top, width, height] = this.box;
      this.show([left - (now[0] - before[0]) / scale, top - (now[1] - before[1]) / scale, width, height]);
    }
    this.fingers.set(event.pointerId, now);
  }
}
