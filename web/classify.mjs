// Classify images with an exported directory in transformers.js, under node.
//
//     node web/classify.mjs exported image.png another.jpg
//     node web/classify.mjs exported --raw 8x8 < pixels       (RGB bytes, one image after the other)
//
// Prints one line of JSON for each image: every label with its score, the highest first. Nothing is fetched: the
// directory has config.json, preprocessor_config.json and onnx/model_quantized.onnx, as `export_onnx` writes them.

import { existsSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { exit } from "node:process";
import { env, pipeline, RawImage } from "@huggingface/transformers";

const FILES = ["config.json", "preprocessor_config.json", "onnx/model_quantized.onnx"];
const CHANNELS = 3;

function fail(text) {
  console.error(`classify: error: ${text}`);
  exit(1);
}

async function read(files) {
  if (files[0] !== "--raw") return Promise.all(files.map((file) => RawImage.read(file)));
  const [width, height] = (files[1] ?? "").split("x").map(Number);
  if (!(width > 0 && height > 0)) fail(`--raw ${files[1]}: expected width x height in pixels, such as 8x8.`);
  const bytes = readFileSync(0);
  const size = width * height * CHANNELS;
  if (bytes.length === 0 || bytes.length % size) {
    fail(`found ${bytes.length} bytes of pixels; expected a multiple of ${size} (${width} x ${height}, RGB).`);
  }
  return Array.from({ length: bytes.length / size }, (_, i) => {
    return new RawImage(new Uint8ClampedArray(bytes.subarray(i * size, (i + 1) * size)), width, height, CHANNELS);
  });
}

const [directory, ...files] = process.argv.slice(2);
if (directory === undefined || files.length === 0) fail("expected a directory and images to classify.");
const missing = FILES.filter((file) => !existsSync(join(directory, file)));
if (missing.length) {
  fail(`${directory} has no ${missing.join(", ")}; export the model with its image processor: hf-saq export.`);
}
env.allowRemoteModels = false;
env.localModelPath = resolve(directory, "..");
const classify = await pipeline("image-classification", resolve(directory).split("/").at(-1), { dtype: "q8", device: "cpu" });
for (const image of await read(files)) console.log(JSON.stringify(await classify(image, { top_k: null })));
