// Drive the demo in headless Chromium as a visitor would, and print what it showed, as JSON.
//
//     node web/drive.mjs URL [--screenshots DIR] < steps.json
//
// `steps.json` is a list of steps, done one after the other; each gets an entry in the list that is printed:
//   { "draw": [[[x, y], ...], ...] }   strokes with the mouse, in parts of the pad's side
//   { "keys": ["Space", ...] }         pressed on the focused pad
//   { "open": "file" }                 a file for the file chooser
//   { "drop": "file" }                 a file dropped on the pad
//   { "click": "selector" }            a click on an element of the page
// $CHROMIUM names the browser; otherwise it is looked for in the usual places.

import { existsSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { argv, env, exit } from "node:process";
import puppeteer from "puppeteer-core";

const PLACES = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome", "/usr/bin/google-chrome-stable"];
const SIZES = { desktop: { width: 1200, height: 800 }, narrow: { width: 390, height: 844 } };
const PATIENCE = { timeout: 120_000 };

const executablePath = [env.CHROMIUM, ...PLACES].find((path) => path && existsSync(path));
if (!executablePath) {
  console.error("drive: error: no Chromium found; install it or name it with $CHROMIUM.");
  exit(1);
}
const [url, flag, directory] = argv.slice(2);
const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"], ...PATIENCE });
const page = await browser.newPage();
page.setDefaultTimeout(PATIENCE.timeout);
await page.setViewport(SIZES.desktop);
const requests = [], complaints = [];
page.on("request", (request) => requests.push(request.url()));
page.on("pageerror", (error) => complaints.push(String(error)));
page.on("console", (message) => { if (message.type() === "error") complaints.push(message.text()); });

const shown = () => page.evaluate(() => {
  const text = (id) => document.getElementById(id).textContent;
  const value = (data) => (data ? JSON.parse(data) : null);
  return {
    status: text("status"),
    error: document.getElementById("error").hidden ? null : text("error"),
    pixels: value(document.getElementById("seen").dataset.pixels),
    width: document.documentElement.scrollWidth,
    answers: [...document.querySelectorAll(".card")].map((card) => ({
      bits: card.dataset.bits,
      digit: card.querySelector(".digit").firstChild.textContent,
      probabilities: value(card.dataset.probabilities),
      facts: Object.fromEntries([...card.querySelectorAll("dt")].map((dt) => [dt.textContent, dt.nextSibling.textContent])),
    })),
  };
});

const asked = () => page.evaluate(() => Number(document.body.dataset.asked));

// Until the page has answered all that it was asked, and more than `before`.
const settled = (before) => page.waitForFunction((before) => {
  const { asked, answered } = document.body.dataset;
  return Number(asked) > before && asked === answered;
}, {}, before);

async function draw(strokes) {
  const box = await (await page.$("#pad")).boundingBox();
  const at = ([x, y]) => [box.x + x * box.width, box.y + y * box.height];
  for (const [first, ...others] of strokes) {
    await page.mouse.move(...at(first));
    await page.mouse.down();
    for (const point of others) await page.mouse.move(...at(point), { steps: 4 });
    await page.mouse.up();
  }
}

async function drop(file) {
  const bytes = readFileSync(file).toString("base64");
  await page.evaluate(async (name, encoded) => {
    const transfer = new DataTransfer();
    const data = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
    transfer.items.add(new File([data], name));
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
  }, basename(file), bytes);
}

async function take(step) {
  const before = await asked();
  if (step.draw) await draw(step.draw);
  if (step.keys) {
    await page.focus("#pad");
    for (const key of step.keys) await page.keyboard.press(key);
  }
  if (step.open) await (await page.$("#file")).uploadFile(step.open);
  if (step.drop) await drop(step.drop);
  if (step.click) await page.click(step.click);
  await settled(before);
  return shown();
}

async function photograph(into) {
  for (const [size, viewport] of Object.entries(SIZES)) {
    await page.setViewport(viewport);
    for (const scheme of ["light", "dark"]) {
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await new Promise((resolve) => setTimeout(resolve, 400)); // bars grow for a moment
      await page.screenshot({ path: join(into, `${size}-${scheme}.png`), fullPage: true });
    }
  }
  const { width } = await shown();
  return { width, viewport: SIZES.narrow.width };
}

try {
  await page.goto(url, PATIENCE);
  await page.waitForFunction(() => document.body.dataset.ready === "true" || !document.getElementById("error").hidden);
  const steps = [await shown()];
  if (!steps[0].error) for (const step of JSON.parse(readFileSync(0, "utf8"))) steps.push(await take(step));
  const narrow = flag === "--screenshots" ? await photograph(directory) : null;
  console.log(JSON.stringify({ steps, requests, complaints, narrow }));
} finally {
  await browser.close();
}
