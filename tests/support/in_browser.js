// Runs beside copies of a report's page, in frames of several widths; writes what it saw into #seen.
"use strict";

const WIDTHS = [390, 800, 1400];
const errors = []; // the frames push theirs

async function until(condition) {
  for (let i = 0; i < 400; i++) {
    if (condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
  throw new Error(`waited in vain for ${condition}`);
}

/** The colour that a text stands on: backgrounds from the page up to the element, painted in turn. */
function painted(element, css) {
  const page = element.ownerDocument;
  const pen = page.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const layers = [];
  for (let at = element; at; at = at.parentElement) layers.unshift(page.defaultView.getComputedStyle(at).backgroundColor);
  for (const layer of [...layers, css || "transparent"]) {
    pen.fillStyle = layer;
    pen.fillRect(0, 0, 1, 1);
  }
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

/** The contrast of a text by WCAG: 4.5 can be read. */
function contrast(element) {
  const color = element.ownerDocument.defaultView.getComputedStyle(element).color;
  const light = (rgb) => {
    const linear = rgb.map((value) => value / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const both = [light(painted(element)), light(painted(element, color))];
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}

function choose(page, form, name, value) {
  const input = page.getElementById(form).elements[name];
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

const ids = (page) => [...page.querySelectorAll("#cards .id")].map((node) => node.textContent);
const places = (page) => [...page.querySelectorAll("#cards .card")[0].querySelectorAll(".pictures .glyph")]
  .map((glyph) => glyph.getAttribute("transform"));

function seenOfGallery(page) {
  page.getElementById("more").click(); // whether or not it was scrolled to
  const seen = { first: ids(page), states: {} };
  for (const state of ["wrong", "right"]) {
    const cell = page.querySelector(`#cards .cell.${state}`);
    const style = page.defaultView.getComputedStyle(cell);
    seen.states[state] = { words: cell.querySelector(".verdict").textContent, edge: style.borderLeftColor };
  }
  const filters = { wrong: ["outcome", "wrong"], changed: ["outcome", "changed"], broken: ["outcome", "broken"],
    task: ["task", "order"], search: ["search", "S3-DIST"], path: ["path", "dtr"] };
  for (const [name, [field, value]] of Object.entries(filters)) {
    choose(page, "filter", field, value);
    page.getElementById("more").click();
    seen[name] = { ids: ids(page), count: page.getElementById("count").textContent,
      headings: [...page.querySelectorAll("#cards h4")].slice(0, 2).map((node) => node.firstChild.textContent) };
    choose(page, "filter", field, field === "outcome" ? "all" : "");
  }
  choose(page, "filter", "search", "s1-dist");
  return seen;
}

function seenOfScene(page) {
  const seen = { after: places(page) };
  page.querySelector(".switch button").click();
  seen.before = places(page);
  const text = page.querySelector('.glyph path[d*="M-1 -1"]').parentElement;
  text.dispatchEvent(new PointerEvent("pointerenter"));
  seen.told = page.querySelector("#cards .told").textContent;
  seen.line = page.querySelector("#cards .off").getAttribute("d");
  page.querySelector("#cards .picture").dispatchEvent(new MouseEvent("click"));
  const large = page.querySelector("#enlarged .picture");
  seen.whole = large.getAttribute("viewBox");
  seen.open = page.getElementById("enlarged").open;
  page.querySelector("[data-zoom=in]").click();
  seen.zoomed = large.getAttribute("viewBox");
  page.querySelector("[data-zoom=close]").click();
  seen.closed = !page.getElementById("enlarged").open;
  return seen;
}

async function seenOfRoom(page) {
  const canvas = page.querySelector("#cards canvas");
  const pixels = () => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const drawn = () => pixels().filter((value, index) => index % 4 === 3 && value > 0).length;
  canvas.scrollIntoView();
  await until(() => canvas.width > 300 && drawn() > 500);
  const before = pixels();
  const drag = (type, x) => canvas.dispatchEvent(new PointerEvent(type, { clientX: x, clientY: 0, pointerId: 1 }));
  canvas.setPointerCapture = () => {}; // there is no finger
  drag("pointerdown", 0);
  drag("pointermove", 60);
  drag("pointerup", 60);
  return { turned: pixels().some((value, index) => value !== before[index]) };
}

function seenOfRollouts(page) {
  const groups = () => [...page.querySelectorAll("#groups .note")].map((node) => node.textContent).filter((text) => text.includes("step"));
  const tint = () => page.defaultView.getComputedStyle(page.querySelector("#groups .token")).backgroundColor;
  const seen = { last: groups(), advantage: tint() };
  seen.bars = [...page.querySelectorAll("#groups .sample")[0].querySelectorAll(".part i")].map((bar) => bar.style.width);
  seen.text = page.querySelector("#groups .sample pre").textContent;
  choose(page, "steps", "colour", "probability");
  seen.probability = tint();
  page.querySelector("[data-go='-1']").click();
  seen.first = groups();
  choose(page, "steps", "path", "lor");
  seen.lor = groups();
  choose(page, "steps", "path", "");
  choose(page, "steps", "prompt", "s0-distance-dtr");
  seen.followed = groups();
  return seen;
}

async function look() {
  const seen = { overflow: {}, contrast: {} };
  for (const width of WIDTHS) {
    const frame = document.getElementById(`w${width}`);
    await until(() => frame.contentDocument?.documentElement?.dataset.ready);
    const root = frame.contentDocument.documentElement;
    seen.overflow[width] = root.scrollWidth - root.clientWidth;
  }
  const page = document.getElementById("w1400").contentDocument;
  for (const place of ["body", ".note", "td", ".change", ".cell.wrong pre", ".cell.wrong .verdict", ".section.answer",
    ".cell.right .verdict", ".part", ".truth", ".token", ".fact i", "button", ".last span"]) {
    seen.contrast[place] = contrast(page.querySelector(place));
  }
  page.querySelector(".what").click();
  seen.about = page.querySelector(":popover-open").textContent;
  page.querySelector(":popover-open").hidePopover();
  seen.rollouts = seenOfRollouts(page);
  seen.gallery = seenOfGallery(page);
  seen.scene = seenOfScene(page);
  seen.room = await seenOfRoom(page);
  return seen;
}

const dark = matchMedia("(prefers-color-scheme: dark)").matches;
look().then((seen) => ({ ...seen, errors, dark }), (error) => ({ failed: String(error.stack), errors }))
  .then((seen) => (document.getElementById("seen").textContent = JSON.stringify(seen)));
