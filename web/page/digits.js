// Turn drawings and images into what the models learned from: 8 x 8 pixels, each the number of inked dots in a block
// of 4 x 4 of a bitmap of 32 x 32 dots, which the digit fills. So were the scans of scikit-learn's digits made.

export const SIDE = 8;
const BLOCK = 4;
const DOTS = SIDE * BLOCK;
const LEVELS = BLOCK * BLOCK;
const HEIGHT = DOTS; // the scans fill the height,
const WIDTH = 0.82 * DOTS; // and hardly ever the width
const PEN = 4.6;
const INKED = 128;

function bitmapOf(draw) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = DOTS;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  draw(context);
  return context.getImageData(0, 0, DOTS, DOTS).data;
}

// Count inked dots: `bitmap` is RGBA, ink is its alpha. Returns 64 values from 0 to 255.
function blocks(bitmap) {
  const counts = new Uint8Array(SIDE * SIDE);
  for (let y = 0; y < DOTS; y++) {
    for (let x = 0; x < DOTS; x++) {
      if (bitmap[4 * (y * DOTS + x) + 3] >= INKED) counts[SIDE * Math.floor(y / BLOCK) + Math.floor(x / BLOCK)]++;
    }
  }
  return Uint8Array.from(counts, (count) => Math.round((255 * count) / LEVELS));
}

// Pixels of strokes, each a list of [x, y] in any unit; null where there is no ink.
export function pixelsOfStrokes(strokes) {
  const points = strokes.flat();
  if (points.length === 0) return null;
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const left = Math.min(...xs), top = Math.min(...ys);
  const width = Math.max(...xs) - left, height = Math.max(...ys) - top;
  const scale = Math.min((WIDTH - PEN) / Math.max(width, 1e-6), (HEIGHT - PEN) / Math.max(height, 1e-6), 1e3);
  const bounded = width + height < 1e-3 ? 0 : scale; // a dot stays a dot
  const place = ([x, y]) => [DOTS / 2 + (x - left - width / 2) * bounded, DOTS / 2 + (y - top - height / 2) * bounded];
  return blocks(bitmapOf((context) => {
    context.lineWidth = PEN;
    context.lineCap = context.lineJoin = "round";
    for (const stroke of strokes) {
      context.beginPath();
      context.moveTo(...place(stroke[0]));
      for (const point of stroke.length > 1 ? stroke : [stroke[0], stroke[0]]) context.lineTo(...place(point));
      context.stroke();
    }
  }));
}

// Pixels of an image of one digit, dark on light or light on dark; throws an Error if it shows nothing.
export function pixelsOfImage(image) {
  const longest = 256;
  const shrink = Math.min(1, longest / Math.max(image.width, image.height));
  const width = Math.max(1, Math.round(image.width * shrink)), height = Math.max(1, Math.round(image.height * shrink));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(image, 0, 0, width, height);
  const shown = context.getImageData(0, 0, width, height);
  const grey = Float64Array.from({ length: width * height }, (_, i) => {
    const [r, g, b] = shown.data.subarray(4 * i, 4 * i + 3);
    return 0.299 * r + 0.587 * g + 0.114 * b;
  });
  const darkest = grey.reduce((a, b) => Math.min(a, b)), brightest = grey.reduce((a, b) => Math.max(a, b));
  if (brightest - darkest < 24) throw new Error("This image is of one shade; expected one digit on a plain background.");
  const middle = (darkest + brightest) / 2;
  const isInk = grey.reduce((n, v) => n + (v > middle), 0) > grey.length / 2 ? (v) => v < middle : (v) => v > middle;
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const ink = isInk(grey[y * width + x]);
      shown.data[4 * (y * width + x) + 3] = ink ? 255 : 0;
      if (!ink) continue;
      [left, right] = [Math.min(left, x), Math.max(right, x)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
    }
  }
  context.putImageData(shown, 0, 0);
  const [w, h] = [right - left + 1, bottom - top + 1];
  const scale = Math.min(WIDTH / w, HEIGHT / h);
  return blocks(bitmapOf((to) => {
    to.imageSmoothingQuality = "high";
    to.drawImage(canvas, left, top, w, h, (DOTS - w * scale) / 2, (DOTS - h * scale) / 2, w * scale, h * scale);
  }));
}
