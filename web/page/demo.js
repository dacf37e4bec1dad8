// The page: a pad to draw on, and a card for each model with its answer.

import { Classifier, fetched } from "./classifiers.js";
import { pixelsOfImage, pixelsOfStrokes, SIDE } from "./digits.js";
import { Pad } from "./pad.js";

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const kib = (bytes) => `${(bytes / 1024).toLocaleString("en", { maximumFractionDigits: 0 })} KiB`;

const cards = []; // { classifier, element }
let asked = 0; // the newest question; answers to older ones are dropped

// Count a question; the page says in `data-asked` and `data-answered` of its body which was the last.
const newQuestion = () => { document.body.dataset.asked = ++asked; return asked; };
const isAnswered = (question) => { document.body.dataset.answered = question; };

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = text === "";
}

function paint(canvas, pixels) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(SIDE, SIDE);
  for (let i = 0; i < SIDE * SIDE; i++) image.data.set([...Array(3).fill(pixels ? pixels[i] : 0), 255], 4 * i);
  context.putImageData(image, 0, 0);
}

function cardOf(classifier) {
  const { name, bits, description, graph_bytes, packed_bytes, top1 } = classifier.facts;
  const rows = Object.values(classifier.labels).map((label) =>
    element("tr", {},
      element("th", { scope: "row", textContent: label }),
      element("td", {}, element("div", { className: "track" }, element("div", { className: "fill" }))),
      element("td", { className: "share", textContent: "–" })));
  const fact = (term, text, className = "") => [
    element("dt", { textContent: term }), element("dd", { textContent: text, className })];
  const card = element("article", { className: "card" },
    element("h3", {}, name, element("span", { textContent: description })),
    element("div", { className: "digit" }, "–"),
    element("table", { className: "bars" }, element("tbody", {}, ...rows)),
    element("dl", { className: "facts" },
      ...fact("One image", "–", "ms"),
      ...fact("ONNX file", kib(graph_bytes)),
      ...fact("Weights, stored", kib(packed_bytes)),
      ...fact("Held-out", percent(top1))));
  card.dataset.bits = bits;
  card.setAttribute("aria-label", `${name}, ${description}`);
  card.querySelector("table").setAttribute("aria-label", `${name}: probability of each digit`);
  return { classifier, element: card };
}

function showAnswer(card, probabilities) {
  const best = probabilities ? probabilities.indexOf(Math.max(...probabilities)) : -1;
  const digit = card.querySelector(".digit");
  digit.textContent = probabilities ? best : "–";
  if (probabilities) digit.append(element("small", { textContent: percent(probabilities[best]) }));
  card.querySelectorAll(".bars tr").forEach((row, i) => {
    row.className = i === best ? "top" : "";
    row.querySelector(".fill").style.width = probabilities ? percent(probabilities[i]).replace(" ", "") : "0";
    row.querySelector(".share").textContent = probabilities ? percent(probabilities[i]) : "–";
  });
  card.dataset.probabilities = probabilities ? JSON.stringify(probabilities) : "";
  if (!probabilities) card.querySelector(".ms").textContent = "–";
}

// Ask every model; `pixels` are 64 values from 0 to 255, or null where there is nothing to see.
async function ask(pixels) {
  const question = newQuestion();
  $("seen").dataset.pixels = pixels ? JSON.stringify([...pixels]) : "";
  paint($("seen"), pixels);
  if (!pixels) {
    cards.forEach((card) => showAnswer(card.element, null));
    $("status").textContent = "Draw a digit.";
    isAnswered(question);
    return;
  }
  try {
    const answers = [];
    for (const { classifier, element: card } of cards) {
      const probabilities = await classifier.classify(pixels);
      if (question !== asked) return;
      showAnswer(card, probabilities);
      answers.push(`${classifier.facts.name} says ${probabilities.indexOf(Math.max(...probabilities))}`);
    }
    $("status").textContent = `${answers.join(", ")}.`;
    for (const { classifier, element: card } of cards) {
      await new Promise((resolve) => setTimeout(resolve, 0)); // let the page be painted
      if (question !== asked) return;
      const milliseconds = await classifier.measure(pixels);
      if (question !== asked) return;
      card.querySelector(".ms").textContent = `${milliseconds.toFixed(2)} ms`;
    }
  } catch (error) {
    showError(`The models could not be run: ${error.message}`);
  }
  isAnswered(question);
}

const pad = new Pad($("pad"), (strokes, isDone) => {
  $("hint").hidden = strokes.length > 0;
  if (isDone) {
    showError("");
    ask(pixelsOfStrokes(strokes));
  }
});

async function takeImage(file) {
  const question = newQuestion();
  showError("");
  let image, pixels;
  try {
    image = await createImageBitmap(file);
    pixels = pixelsOfImage(image);
  } catch (error) {
    showError(image ? `${file.name}: ${error.message}`
      : `${file.name} cannot be read as an image. Choose a PNG, JPEG or WebP file that shows one digit.`);
    isAnswered(question);
    return;
  }
  if (question !== asked) return;
  pad.show(image);
  $("hint").hidden = true;
  await ask(pixels);
}

function listen() {
  $("clear").addEventListener("click", () => pad.clear());
  $("undo").addEventListener("click", () => pad.undo());
  $("file").addEventListener("change", ({ target }) => {
    if (target.files.length) takeImage(target.files[0]);
    target.value = ""; // the same file may be chosen again
  });
  const drop = $("drop");
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) takeImage(file);
    else showError("What was dropped is no file. Drop an image file of one digit.");
  });
}

function showSamples(samples) {
  for (const { label, pixels } of samples) {
    const canvas = element("canvas", { width: SIDE, height: SIDE });
    paint(canvas, pixels);
    const button = element("button", { type: "button" }, canvas);
    button.setAttribute("aria-label", `A held-out scan of a ${label}`);
    button.addEventListener("click", () => {
      pad.show(canvas);
      $("hint").hidden = true;
      showError("");
      ask(pixels);
    });
    $("samples").append(button);
  }
}

async function start() {
  listen();
  paint($("seen"), null);
  const { models, samples } = await fetched("models.json");
  for (const facts of models) {
    $("status").textContent = `Loading ${facts.name} …`;
    cards.push(cardOf(await Classifier.load(facts)));
    $("cards").append(cards.at(-1).element);
  }
  showSamples(samples);
  document.body.dataset.ready = "true";
  await ask(pixelsOfStrokes(pad.strokes));
}

start().catch((error) => {
  $("status").textContent = "The page is not complete.";
  showError(error.message);
});
