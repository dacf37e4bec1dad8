// A canvas to draw strokes on, with mouse, finger, pen or keyboard.

const STEP = 1 / 20; // of the side, for an arrow key
const WIDTH = 1 / 13; // of the side
const ARROWS = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };

export class Pad {
  // `changed(strokes, isDone)` is called while a stroke grows and, with `isDone`, when it ends. Points are [x, y] in
  // parts of the side, 0 to 1.
  constructor(canvas, changed) {
    Object.assign(this, { canvas, changed, strokes: [], stroke: null, pen: [0.5, 0.5], isDown: false, picture: null });
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#go(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.#end());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.#paint());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#paint());
    new ResizeObserver(() => this.#resize()).observe(canvas);
  }

  clear() {
    this.#reset();
    this.#paint();
    this.changed(this.strokes, true);
  }

  undo() {
    if (this.picture) return this.clear();
    this.strokes.pop();
    this.isDown = false;
    this.#paint();
    this.changed(this.strokes, true);
  }

  // Show an image instead of strokes.
  show(picture) {
    this.#reset();
    this.picture = picture;
    this.#paint();
  }

  #reset() {
    Object.assign(this, { strokes: [], stroke: null, isDown: false, picture: null });
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const inside = (value) => Math.min(1, Math.max(0, value));
    return [inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height)];
  }

  #begin(event) {
    if (event.button !== 0 || this.stroke) return;
    if (this.picture || this.isDown) this.#reset();
    this.canvas.setPointerCapture(event.pointerId);
    this.stroke = [this.#at(event)];
    this.strokes.push(this.stroke);
    this.#paint();
    this.changed(this.strokes, false);
  }

  #go(event) {
    if (!this.stroke) return;
    for (const part of event.getCoalescedEvents?.() ?? [event]) this.stroke.push(this.#at(part));
    this.#paint();
  }

  #end() {
    if (!this.stroke) return;
    this.stroke = null;
    this.changed(this.strokes, true);
  }

  #key(event) {
    if (event.key in ARROWS) {
      const [dx, dy] = ARROWS[event.key];
      const inside = (value) => Math.min(0.95, Math.max(0.05, value));
      this.pen = [inside(this.pen[0] + dx), inside(this.pen[1] + dy)];
      if (this.isDown) this.strokes.at(-1).push([...this.pen]);
    } else if (event.key === " ") {
      if (this.picture) this.#reset();
      this.isDown = !this.isDown;
      if (this.isDown) this.strokes.push([[...this.pen]]);
    } else if (event.key === "Escape") {
      this.clear();
    } else if (event.key === "Backspace") {
      this.undo();
    } else {
      return;
    }
    event.preventDefault();
    this.#paint();
    if (this.isDown || event.key === " ") this.changed(this.strokes, true);
  }

  #resize() {
    const side = Math.round(this.canvas.clientWidth * (window.devicePixelRatio || 1));
    if (side && side !== this.canvas.width) this.canvas.width = this.canvas.height = side;
    this.#paint();
  }

  #paint() {
    const context = this.canvas.getContext("2d"), side = this.canvas.width;
    const color = (name) => getComputedStyle(this.canvas).getPropertyValue(name).trim();
    context.clearRect(0, 0, side, side);
    if (this.picture) {
      const scale = (0.9 * side) / Math.max(this.picture.width, this.picture.height);
      const [w, h] = [this.picture.width * scale, this.picture.height * scale];
      context.imageSmoothingEnabled = scale < 4; // pixels of a small scan are to be seen
      context.drawImage(this.picture, (side - w) / 2, (side - h) / 2, w, h);
    }
    context.strokeStyle = color("--ink");
    context.lineWidth = WIDTH * side;
    context.lineCap = context.lineJoin = "round";
    for (const stroke of this.strokes) {
      context.beginPath();
      context.moveTo(stroke[0][0] * side, stroke[0][1] * side);
      for (const [x, y] of stroke.length > 1 ? stroke : [stroke[0], stroke[0]]) context.lineTo(x * side, y * side);
      context.stroke();
    }
    if (document.activeElement === this.canvas && this.canvas.matches(":focus-visible")) {
      context.fillStyle = color("--accent");
      context.beginPath();
      context.arc(this.pen[0] * side, this.pen[1] * side, side / 50, 0, 7);
      context.fill();
    }
  }
}
