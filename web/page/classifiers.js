// Load the exported models and run them, on one thread of ONNX Runtime for the web.

import * as ort from "./runtime/ort.wasm.bundle.min.mjs";

ort.env.wasm.wasmPaths = { wasm: new URL("./runtime/ort-wasm-simd-threaded.wasm", import.meta.url).href };
ort.env.wasm.numThreads = 1;

const CHANNELS = 3;
const ROUNDS = 7;
const ROUND_MS = 4; // clocks of browsers are coarse: each round repeats a run for at least as long

export async function fetched(path, what = (response) => response.json()) {
  let response;
  try {
    response = await fetch(path);
  } catch {
    throw new Error(`${path} could not be fetched: the connection failed, or the page was opened as a file. Serve it: make web-demo.`);
  }
  if (!response.ok) throw new Error(`${path} could not be fetched (HTTP ${response.status}). Build the page again: make web-demo.`);
  return what(response);
}

export class Classifier {
  // `facts`: one entry of models.json.
  static async load(facts) {
    const classifier = new Classifier();
    const [graph, processor, config] = await Promise.all([
      fetched(`${facts.directory}/${facts.graph}`, (response) => response.arrayBuffer()),
      fetched(`${facts.directory}/preprocessor_config.json`),
      fetched(`${facts.directory}/config.json`),
    ]);
    Object.assign(classifier, { facts, processor, labels: config.id2label });
    try {
      classifier.session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
    } catch (error) {
      throw new Error(`${facts.name}: ONNX Runtime cannot run ${facts.graph} here (${error.message}).`);
    }
    return classifier;
  }

  // Normalize as the image processor does: `pixels` are 0 to 255, row by row, one channel.
  #input(pixels) {
    const { image_mean: mean, image_std: std, rescale_factor: factor } = this.processor;
    const data = new Float32Array(CHANNELS * pixels.length);
    for (let c = 0; c < CHANNELS; c++) {
      pixels.forEach((value, i) => { data[c * pixels.length + i] = (value * factor - mean[c]) / std[c]; });
    }
    const side = Math.sqrt(pixels.length);
    return new ort.Tensor("float32", data, [1, CHANNELS, side, side]);
  }

  async #logits(input) {
    const outputs = await this.session.run({ [this.session.inputNames[0]]: input });
    return Array.from(outputs[this.session.outputNames[0]].data);
  }

  // Probability of every class, in the order of the classes.
  async classify(pixels) {
    const logits = await this.#logits(this.#input(pixels));
    const highest = Math.max(...logits);
    const exponentials = logits.map((value) => Math.exp(value - highest));
    const sum = exponentials.reduce((a, b) => a + b);
    return exponentials.map((value) => value / sum);
  }

  // Median milliseconds of one image.
  async measure(pixels) {
    const input = this.#input(pixels);
    const means = [];
    for (let round = 0; round < ROUNDS; round++) {
      const start = performance.now();
      let runs = 0, now = start;
      do {
        await this.#logits(input);
        runs++;
        now = performance.now();
      } while (now - start < ROUND_MS);
      means.push((now - start) / runs);
    }
    return means.sort((a, b) => a - b)[Math.floor(ROUNDS / 2)];
  }
}
