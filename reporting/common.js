"use strict";
// What the page's other scripts share. Whatever a model wrote becomes text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element; children are nodes or texts, and what is null or false is left out. */
function el(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== false));
  return element;
}

/** Read what Python packed: base64 of zlib of JSON. */
async function unpack(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/** Fill a <select>: pairs of value and label. One choice is no choice, and is hidden. */
function fillSelect(select, pairs) {
  select.replaceChildren(...pairs.map(([value, label]) => el("option", { value }, label)));
  select.closest("label").hidden = pairs.length < 2;
}

const unique = (values) => [...new Set(values)];
const upper = (path) => path.toUpperCase();
const metres = (value) => `${value.toFixed(2)} m`;

// The colour of an object's mark, by the words of its mention.
const COLOURS = {
  red: "#e5484d", blue: "#3e7bfa", green: "#2f9e5b", yellow: "#e2b203",
  purple: "#8e4ec6", orange: "#f76b15", cyan: "#00a2c7", pink: "#d6409f",
};

function colourOf(mention) {
  const word = mention.split(/\W+/).find((word) => word in COLOURS);
  return word ? COLOURS[word] : "#8e4ec6";
}

/** Cut an answer into [tag, what it encloses] and ["", what stands between]. */
function splitSections(text, tags) {
  // What is ill-formed has to be shown, too: so this is no parser.
  const block = new RegExp(`<(${tags.join("|")})>([\\s\\S]*?)</\\1>\\s*`, "g");
  const pieces = [];
  let end = 0;
  for (const match of text.matchAll(block)) {
    pieces.push(["", text.slice(end, match.index)], [match[1], match[2]]);
    end = match.index + match[0].length;
  }
  pieces.push(["", text.slice(end)]);
  return pieces.filter(([, piece]) => piece);
}

/** A question's text, with a mark in the colour of each region behind its mention. */
function questionText(question) {
  const texts = question.question.split("<mask>");
  const nodes = [];
  texts.forEach((text, index) => {
    nodes.push(text.replaceAll("<image>", ""));
    const region = question.regions[index];
    if (index < texts.length - 1) {
      const colour = colourOf(region ? region.mention : text.split(/\s/).slice(-3).join(" "));
      nodes.push(el("span", { class: "mark", style: `background:${colour}` }));
    }
  });
  return el("p", { class: "question" }, nodes);
}

/** Parts of a reward as bars, each from 0 to 1. */
function bars(parts) {
  return el("div", { class: "parts" }, Object.entries(parts).map(([name, value]) => {
    const share = Math.max(0, Math.min(1, ["official", "robust"].includes(name) ? value / 100 : value));
    return el("span", { class: "part", title: `${name} ${value}` },
      el("i", { style: `width:${100 * share}%` }), el("b", {}, name), ` ${value.toFixed(2)}`);
  }));
}
