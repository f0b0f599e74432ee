"use strict";
// The gallery: every question with its answers, filtered and searched, a screenful at a time.

const RIGHT = 0.5; // of the accuracy there is
const BATCH = 6; // cards that are drawn at once

/** right, partly or wrong: how an answer looks. */
function verdictOf(mark) {
  if (mark < RIGHT) return "wrong";
  return mark < 0.8 ? "partly" : "right";
}

class Gallery {
  constructor(sets, views, tags) {
    this.sets = sets;
    this.views = views;
    this.tags = tags;
    this.form = document.getElementById("filter");
    this.cards = document.getElementById("cards");
    this.more = document.getElementById("more");
    this.enlarged = new Enlarged(document.getElementById("enlarged"));
    fillSelect(this.form.elements.set, sets.map((set, index) => [index, set.title]));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", (event) => {
      if (event.target.name === "set") this.openSet();
      this.filter();
    });
    this.more.addEventListener("click", () => this.showMore());
    // Whoever scrolls to the button has pressed it.
    new IntersectionObserver((entries) => entries[0].isIntersecting && this.showMore(),
      { rootMargin: "600px" }).observe(this.more);
    this.openSet();
    this.filter();
  }

  /** Fill the choices with what the set has. */
  openSet() {
    const { elements } = this.form;
    this.set = this.sets[Number(elements.set.value) || 0];
    const { columns, questions } = this.set;
    const answers = questions.flatMap((question) => question.answers);
    const tasks = unique(questions.map((question) => question.task)).sort();
    const paths = unique(answers.map((answer) => answer.path));
    fillSelect(elements.column, columns.map((name, index) => [index, name]));
    elements.column.value = columns.length - 1;
    fillSelect(elements.task, [["", "all"], ...tasks.map((task) => [task, task || "(none)"])]);
    elements.task.closest("label").hidden = tasks.length < 2;
    fillSelect(elements.path, [["", "all"], ...paths.map((path) => [path, upper(path)])]);
    elements.path.closest("label").hidden = paths.length < 2;
    this.nameOutcomes(elements.outcome, columns);
    for (const question of questions) {
      const texts = question.answers.map((answer) => answer.text);
      question.words = [question.id, question.question, question.truth, ...texts].join("\n").toLowerCase();
    }
  }

  /** Say since which evaluation an answer has changed. */
  nameOutcomes(select, columns) {
    const labels = {
      changed: `changed since “${columns[0]}”`,
      mended: `wrong “${columns[0]}”, right now`,
      broken: `right “${columns[0]}”, wrong now`,
    };
    for (const option of select.options) {
      option.textContent = labels[option.value] || option.textContent;
      option.hidden = columns.length < 2 && option.value in labels;
    }
  }

  /** Choose the questions that fit, put them in order, and draw the first. */
  filter() {
    const { task, path, outcome, order, search, column } = this.form.elements;
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    this.column = Number(column.value) || 0;
    this.path = path.value;
    this.shown = this.set.questions.filter((question) =>
      (!task.value || question.task === task.value) &&
      words.every((word) => question.words.includes(word)) &&
      this.answersOf(question, this.column).length > 0 &&
      this.hasOutcome(question, outcome.value));
    if (order.value === "failures") {
      const worst = new Map(this.shown.map((question) => [question, this.lowest(question, this.column)]));
      this.shown.sort((a, b) => worst.get(a) - worst.get(b));
    }
    const wrong = this.shown.filter((question) => this.lowest(question, this.column) < RIGHT).length;
    document.getElementById("count").textContent =
      `${this.shown.length} of ${this.set.questions.length} questions; ${this.set.columns[this.column]}: ` +
      `${wrong} with a wrong answer`;
    this.cards.replaceChildren();
    this.drawn = 0;
    this.showMore();
  }

  answersOf(question, column) {
    return question.answers.filter((answer) => answer.column === column && (!this.path || answer.path === this.path));
  }

  lowest(question, column) {
    return Math.min(...this.answersOf(question, column).map((answer) => answer.mark));
  }

  hasOutcome(question, outcome) {
    if (outcome === "all") return true;
    if (outcome === "wrong") return this.lowest(question, this.column) < RIGHT;
    if (outcome === "right") return this.lowest(question, this.column) >= RIGHT;
    const turns = this.turns(question);
    return outcome === "changed" ? turns.size > 0 : turns.has(outcome);
  }

  /** Return which way answers turned since the first evaluation: of mended and broken. */
  turns(question) {
    const found = new Set();
    const before = this.answersOf(question, 0);
    for (const answer of this.answersOf(question, this.column)) {
      // Of a model that answers on one path only, that one is compared.
      const first = before.find((other) => other.path === answer.path) || before[0];
      const was = first && first.mark >= RIGHT;
      const is = answer.mark >= RIGHT;
      if (first && was !== is) found.add(is ? "mended" : "broken");
    }
    return found;
  }

  showMore() {
    const next = this.shown.slice(this.drawn, this.drawn + BATCH);
    this.cards.append(...next.map((question) => this.card(question)));
    this.drawn += next.length;
    this.more.hidden = this.drawn >= this.shown.length;
  }

  // ---- A card

  card(question) {
    const paths = unique(question.answers.map((answer) => answer.path)).filter((path) => !this.path || path === this.path);
    const cells = this.set.columns.flatMap((name, column) => paths.map((path) => {
      const answer = question.answers.find((one) => one.column === column && one.path === path);
      return answer ? this.answer(answer, name, question) : el("div", {});
    }));
    const body = el("div", {},
      el("h3", {}, question.task || question.id, el("span", { class: "truth" }, "truth ", el("b", {}, question.truth))),
      questionText(question),
      el("div", { class: "answers", style: `--columns:${paths.length}` }, cells),
      el("p", { class: "id" }, question.id));
    const state = verdictOf(this.lowest(question, this.column));
    return el("article", { class: `card ${state}` }, this.scene(question), body);
  }

  /** Images, the switch between the evaluations' points, and the room. */
  scene(question) {
    const told = el("p", { class: "told" });
    const say = (text) => (told.textContent = text);
    const pictures = el("div", { class: "pictures" });
    const views = question.views.map((number) => this.views[number]);
    const room = this.room(question, views, say);
    const show = (answer) => {
      pictures.replaceChildren(...views.map((view, index) => {
        const picture = drawPicture(question, index, view, answer, say);
        const copy = () => this.enlarged.open(drawPicture(question, index, view, answer, say), view.size || [640, 480]);
        picture.addEventListener("click", copy);
        return picture;
      }));
      if (room) room.setPoints(pointsOf(question, answer).filter((point) => point.view === room.index));
    };
    const choice = this.choice(question, show);
    const missing = question.images - views.length;
    return el("div", { class: "scene" }, choice, pictures,
      missing > 0 && el("p", { class: "told" }, `and ${missing} more images`), room && room.element, told);
  }

  room(question, views, say) {
    const index = question.frame ?? 0;
    const view = views[index];
    if (!view || !view.camera) return null;
    const room = new Room(view, say);
    room.index = index;
    return room;
  }

  /** Buttons that switch between what the evaluations' answers point at; the chosen one is shown. */
  choice(question, show) {
    const sources = this.set.columns.map((name, column) => [name, this.pointing(question, column)])
      .filter(([, answer]) => answer);
    const chosen = sources.findLast(([, answer]) => answer.column === this.column) || sources.at(-1);
    const buttons = sources.map(([name, answer]) => {
      const press = (event) => {
        for (const other of buttons) other.setAttribute("aria-pressed", other === event.currentTarget);
        show(answer);
      };
      return el("button", { type: "button", "aria-pressed": String(answer === chosen[1]), onclick: press }, name);
    });
    show(chosen ? chosen[1] : null);
    return buttons.length > 1 && el("div", { class: "switch", role: "group", "aria-label": "whose points are shown" },
      "points", buttons);
  }

  /** The answer of an evaluation that points at most; the head's points are on all paths. */
  pointing(question, column) {
    const answers = this.answersOf(question, column).filter((answer) => answer.boxes.length + answer.head.length);
    return answers.sort((a, b) => b.boxes.length - a.boxes.length)[0];
  }

  answer(answer, name) {
    const state = verdictOf(answer.mark);
    const said = answer.answer === null ? "no answer could be read" : answer.answer.trim();
    const sign = { right: "✓ right", partly: "≈ near", wrong: "✗ wrong" }[state];
    const text = splitSections(answer.text, this.tags).map(([tag, piece]) =>
      tag ? el("span", { class: `section ${tag}` }, el("u", {}, tag), piece) : piece);
    return el("div", { class: `cell ${state}` },
      el("h4", {}, `${upper(answer.path)} ${name}`, answer.truncated && el("em", {}, " cut"),
        el("span", { class: "verdict" }, sign)),
      el("p", { class: "said" }, el("b", {}, said.length > 60 ? `${said.slice(0, 60)}…` : said)),
      bars(answer.parts),
      el("pre", {}, text));
  }
}
