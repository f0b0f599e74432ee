"use strict";
// The rollouts: what the policy wrote, step by step, a group's completions side by side.

class Rollouts {
  constructor(runs, views) {
    this.runs = runs;
    this.views = views;
    this.form = document.getElementById("steps");
    this.groups = document.getElementById("groups");
    const { run } = this.form.elements;
    fillSelect(run, runs.map((one, index) => [index, one.name]));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", (event) => {
      if (event.target.name === "run") this.openRun();
      this.show();
    });
    for (const button of this.form.querySelectorAll("[data-go]")) {
      button.addEventListener("click", () => this.go(Number(button.dataset.go)));
    }
    this.openRun();
    this.show();
  }

  openRun() {
    const { run, path, prompt, place } = this.form.elements;
    this.run = this.runs[Number(run.value) || 0];
    this.steps = unique(this.run.groups.map((group) => group.step));
    const paths = unique(this.run.groups.map((group) => group.path));
    fillSelect(path, [["", "all"], ...paths.map((one) => [one, upper(one)])]);
    const times = new Map();
    for (const { id } of this.run.groups) times.set(id, (times.get(id) || 0) + 1);
    const often = [...times].filter(([, count]) => count > 1).sort((a, b) => b[1] - a[1]);
    const none = often.length ? "none" : "none recurs";
    fillSelect(prompt, [["", none], ...often.map(([id, count]) => [id, `${id} (${count} steps)`])]);
    prompt.closest("label").hidden = false;
    prompt.disabled = !often.length;
    place.max = this.steps.length - 1;
    place.value = this.steps.length - 1;
  }

  go(by) {
    const { place } = this.form.elements;
    place.value = Number(place.value) + by;
    this.show();
  }

  show() {
    const { path, prompt, place, step, colour } = this.form.elements;
    const at = this.steps[Number(place.value)];
    step.value = prompt.value ? "all" : `${at} of ${this.run.steps}`;
    place.disabled = Boolean(prompt.value);
    const fits = (group) => (prompt.value ? group.id === prompt.value : group.step === at);
    const shown = this.run.groups.filter((group) => fits(group) && (!path.value || group.path === path.value));
    this.groups.replaceChildren(...shown.map((group) => this.group(group, colour.value)));
    document.getElementById("scale").replaceChildren(...this.scale(colour.value, shown));
  }

  /** What the colours mean. */
  scale(colour) {
    const sample = (style, text) => [el("span", { class: "token", style }, text), " "];
    if (colour === "advantage") {
      return [sample(advantageColour(2), "above its group"), sample(advantageColour(-2), "below its group"),
        "The optimiser makes the first likelier and the second less likely."].flat();
    }
    return [sample(probabilityColour(5), "5 %"), sample(probabilityColour(40), "40 %"), sample(probabilityColour(80), "80 %"),
      sample(probabilityColour(100), "100 %"), "The policy's own probability of the token: where it hesitates."].flat();
  }

  group(group, colour) {
    const told = el("p", { class: "told" });
    const say = (text) => (told.textContent = text);
    const pictures = el("div", { class: "pictures" });
    const show = (sample) => pictures.replaceChildren(...group.views.map((number, index) =>
      drawPicture(group, index, this.views[number], sample, say)));
    show(null);
    const mean = group.samples.reduce((sum, sample) => sum + sample.total, 0) / group.samples.length;
    const facts = `step ${group.step} · ${upper(group.path)} · mean reward ${mean.toFixed(2)} · ` +
      (group.kept ? "trained on" : "not trained on: all earned the same accuracy");
    const best = [...group.samples].sort((a, b) => b.total - a.total);
    const cells = best.map((sample) => {
      const cell = this.sample(sample, colour);
      // The picture shows where the completion says that the objects are.
      if (sample.boxes.length) cell.addEventListener("pointerenter", () => show(sample));
      return cell;
    });
    const start = best.find((sample) => sample.boxes.length);
    if (start) show(start);
    return el("article", { class: `group ${group.kept ? "" : "dropped"}` },
      el("div", { class: "asked" }, el("div", { class: "scene" }, pictures, told),
        el("div", {}, el("h3", {}, group.task || group.id, el("span", { class: "truth" }, "truth ", el("b", {}, group.truth))),
          questionText(group), el("p", { class: "note" }, facts), el("p", { class: "id" }, group.id))),
      el("div", { class: "samples", tabindex: "0", role: "region", "aria-label": "completions" }, cells));
  }

  sample(sample, colour) {
    const tokens = sample.pieces.map((piece, index) => {
      const sure = sample.sure[index];
      const style = colour === "advantage" ? advantageColour(sample.advantage) : probabilityColour(sure);
      return el("span", { class: "token", style, title: `${sure} %` }, piece);
    });
    const sign = sample.advantage > 0 ? "+" : "";
    return el("div", { class: "sample" },
      el("h4", {}, `reward ${sample.total.toFixed(2)}`,
        el("span", { class: sample.advantage > 0 ? "up" : "down" }, `advantage ${sign}${sample.advantage.toFixed(2)}`)),
      bars(sample.parts),
      !sample.finished && el("p", { class: "note" }, "cut at --max-new-tokens"),
      el("pre", {}, tokens));
  }
}

/** Green above the group's mean, red below, stronger to 2 standard deviations. */
function advantageColour(advantage) {
  const strength = Math.min(Math.abs(advantage) / 2, 1) * 42;
  return `background:color-mix(in srgb, var(${advantage > 0 ? "--gain" : "--loss"}) ${strength.toFixed(0)}%, transparent)`;
}

/** The less likely a token was, the stronger. */
function probabilityColour(percent) {
  const strength = Math.min(-Math.log2(Math.max(percent, 1) / 100) / 5, 1) * 55;
  return `background:color-mix(in srgb, var(--doubt) ${strength.toFixed(0)}%, transparent)`;
}

async function start() {
  const { sets, rollouts } = await unpack("answers");
  const views = await unpack("images");
  const tags = JSON.parse(document.getElementById("tags").textContent);
  if (sets.length) new Gallery(sets, views, tags);
  if (rollouts.length) new Rollouts(rollouts, views);
  // For whoever waits for the page.
  document.documentElement.dataset.ready = "yes";
}
start();
