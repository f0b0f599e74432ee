"use strict";
// What a depth map shows, as points in space to be turned, with the objects' true and predicted places.

// Where the onlooker stands: angles in radians, and how near.
const FROM_ABOVE = { yaw: 0, pitch: -1.35, closeness: 0.62 };
const FROM_CAMERA = { yaw: 0, pitch: 0, closeness: 1 };
const TILTED = { yaw: 0.35, pitch: -0.6, closeness: 0.95 };
const CEILING = -1.1; // metres: what is so far above the camera

/** Return the points of a depth map: {x, y, z, colour}, in metres of the camera frame. */
async function cloudOf(view) {
  const { columns, stride, far, levels } = view.depth;
  const bytes = Uint8Array.from(atob(levels), (character) => character.charCodeAt(0));
  const rows = bytes.length / columns;
  const pixels = view.src ? await coloursOf(view.src, columns, rows) : null;
  const [fx, fy, cx, cy] = view.camera;
  const points = [];
  bytes.forEach((level, index) => {
    if (!level) return;
    const z = (level / 255) * far;
    const u = (index % columns) * stride + Math.floor(stride / 2);
    const v = Math.floor(index / columns) * stride + Math.floor(stride / 2);
    const rgb = pixels ? pixels.slice(4 * index, 4 * index + 3).join(",") : "128,128,128";
    // As large as what it stands for.
    const size = (z * stride) / fx;
    points.push({ x: ((u - cx) * z) / fx, y: ((v - cy) * z) / fy, z, size, colour: `rgb(${rgb})` });
  });
  return points;
}

/** Return the image's colours on a grid, four bytes a point. */
async function coloursOf(src, columns, rows) {
  const image = new Image();
  image.src = src;
  await image.decode();
  const canvas = el("canvas", { width: columns, height: rows });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0, columns, rows);
  return pen.getImageData(0, 0, columns, rows).data;
}

/** A small view in 3D on a canvas: drag to turn, wheel or buttons to come nearer. */
class Room {
  constructor(view, say) {
    this.view = view;
    this.say = say;
    this.cloud = [];
    this.points = [];
    this.angles = { ...TILTED };
    this.canvas = el("canvas", { class: "room", role: "img", "aria-label": "the room in 3D; drag to turn it" });
    this.element = el("div", { class: "space" }, this.canvas, this.tools());
    this.listen();
    this.isSeen = false;
    // A cloud takes its time: no room is drawn before somebody looks at it.
    new IntersectionObserver((entries) => this.look(entries.at(-1).isIntersecting), { rootMargin: "100px" }).observe(this.canvas);
    // The width is known once the canvas is in the page, and changes with it.
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  async look(isSeen) {
    this.isSeen = isSeen;
    if (isSeen && this.view.depth && !this.cloud.length) this.cloud = await cloudOf(this.view);
    this.draw();
  }

  tools() {
    const button = (label, angles) => el("button", { type: "button", onclick: () => this.turnTo(angles) }, label);
    return el("div", { class: "tools" }, button("above", FROM_ABOVE), button("camera", FROM_CAMERA), button("tilted", TILTED),
      el("button", { type: "button", onclick: () => this.zoom(1.25), "aria-label": "nearer" }, "+"),
      el("button", { type: "button", onclick: () => this.zoom(0.8), "aria-label": "farther" }, "−"));
  }

  listen() {
    let last = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      last = [event.clientX, event.clientY];
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!last) return this.point(event);
      this.angles.yaw += (event.clientX - last[0]) * 0.01;
      this.angles.pitch = Math.max(-1.57, Math.min(1.57, this.angles.pitch - (event.clientY - last[1]) * 0.01));
      last = [event.clientX, event.clientY];
      this.draw();
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (last = null));
  }

  turnTo(angles) {
    this.angles = { ...angles };
    this.draw();
  }

  zoom(factor) {
    this.angles.closeness = Math.min(Math.max(this.angles.closeness * factor, 0.4), 6);
    this.draw();
  }

  setPoints(points) {
    this.points = points;
    this.draw();
  }

  /** The depth of the middle, around which the room turns. */
  middle() {
    const far = this.view.depth ? this.view.depth.far : Math.max(2, ...this.points.map((point) => point.at[2]));
    return far / 2;
  }

  /** Return the screen's [x, y] and the depth of a point in space. */
  toScreen([x, y, z]) {
    const middle = this.middle();
    const { yaw, pitch } = this.angles;
    const forward = z - middle;
    const right = x * Math.cos(yaw) + forward * Math.sin(yaw);
    const ahead = forward * Math.cos(yaw) - x * Math.sin(yaw);
    const down = y * Math.cos(pitch) + ahead * Math.sin(pitch);
    const deep = ahead * Math.cos(pitch) - y * Math.sin(pitch);
    // From so far away that the whole room is seen.
    const away = deep + 2.6 * middle;
    const scale = this.scaleAt(away);
    return [this.width / 2 + right * scale, this.height / 2 + down * scale, away];
  }

  /** Return the pixels of a metre that is so far away from the onlooker. */
  scaleAt(away) {
    return (this.angles.closeness * 1.7 * Math.min(this.width, 1.4 * this.height)) / Math.max(away, 0.05);
  }

  draw() {
    const { clientWidth, clientHeight } = this.canvas;
    if (!clientWidth || !this.isSeen) return;
    const ratio = window.devicePixelRatio || 1;
    this.width = clientWidth;
    this.height = clientHeight;
    this.canvas.width = clientWidth * ratio;
    this.canvas.height = clientHeight * ratio;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    this.drawCloud(pen);
    for (const point of this.points) this.drawPoint(pen, point);
  }

  drawCloud(pen) {
    // From above, a ceiling would hide the room.
    const highest = this.angles.pitch < -0.3 ? CEILING : -Infinity;
    const seen = this.cloud.filter((point) => point.y > highest)
      .map((point) => ({ point, at: this.toScreen([point.x, point.y, point.z]) }));
    // What is far away is painted first.
    seen.sort((a, b) => b.at[2] - a.at[2]);
    for (const { point, at: [x, y, away] } of seen) {
      if (away < 0.1) continue;
      const size = Math.max(1.5, 1.15 * point.size * this.scaleAt(away));
      pen.fillStyle = point.colour;
      pen.fillRect(x - size / 2, y - size / 2, size, size);
    }
  }

  drawPoint(pen, point) {
    const [x, y] = this.toScreen(point.at);
    const colour = colourOf(point.mention);
    const truth = point.kind === "truth" ? null : truthOf(point, this.points);
    if (truth) this.stroke(pen, [[point.at, truth.at]], colour, 1, [3, 3]);
    if (point.size) {
      const places = corners(point);
      this.stroke(pen, EDGES.map(([a, b]) => [places[a], places[b]]), colour, 1.5, point.kind === "truth" ? [] : [5, 3]);
    }
    const shape = new Path2D();
    shape.addPath(new Path2D(SHAPES[point.kind]), new DOMMatrix([6, 0, 0, 6, x, y]));
    for (const [width, style] of [[4.5, "#fff"], [2.2, colour]]) {
      pen.lineWidth = width;
      pen.strokeStyle = style;
      pen.stroke(shape);
    }
  }

  stroke(pen, lines, colour, width, dash) {
    pen.setLineDash(dash);
    for (const [extra, style] of [[2, "rgba(255,255,255,.75)"], [0, colour]]) {
      pen.lineWidth = width + extra;
      pen.strokeStyle = style;
      pen.beginPath();
      for (const [from, to] of lines) {
        pen.moveTo(...this.toScreen(from).slice(0, 2));
        pen.lineTo(...this.toScreen(to).slice(0, 2));
      }
      pen.stroke();
    }
    pen.setLineDash([]);
  }

  /** Say what the pointer is at. */
  point(event) {
    const near = this.points.map((point) => {
      const [x, y] = this.toScreen(point.at);
      return [Math.hypot(x - event.offsetX, y - event.offsetY), point];
    }).sort((a, b) => a[0] - b[0])[0];
    this.say(near && near[0] < 12 ? pointText(near[1], this.points) : "");
  }
}
