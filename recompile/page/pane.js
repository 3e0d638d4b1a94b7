// One stage on the screen: draws what can be seen of it, pans and zooms it, and says what was clicked.

const MARGIN = 12;  // pixels around the drawing
const SPECKS = 0.25;  // the scale below which no label can be read

class Pane {
  constructor(element, side, actions) {
    Object.assign(this, { element, side, actions, scale: 1, x: 0, y: 0, pointers: new Map() });
    element.innerHTML = `<div class="caption"></div><svg role="img" tabindex="0" aria-label="graph ${side} the pass; arrow keys walk along its edges">${MARKERS}<g class="camera"></g></svg>`;
    this.svg = element.querySelector("svg");
    this.camera = element.querySelector(".camera");
    this.listen();
    new ResizeObserver(() => { if (this.root) this.move(); }).observe(this.svg);
  }

  // Shows stage k; `look` gives colours and marks. Says whether another graph was on the screen before.
  show(graph, k, look, caption) {
    const fresh = this.graph !== graph;
    Object.assign(this, { graph, k, look, stage: boxedStage(graph, k) });
    this.root = this.stage.root;
    this.element.querySelector(".caption").innerHTML = caption;
    arrange(this.root, (box) => graph.open.get(box.key));
    locate(this.root, 0, 0);
    this.drawn = this.marks = null;
    this.move();
    return fresh;
  }

  // Draws `area`, by default what can be seen and half as much to each side, unless that is drawn already.
  draw(area) {
    const specks = this.scale < SPECKS;
    const { left, top, right, bottom } = this.seen();
    const drawn = this.drawn;
    if (!area && drawn && drawn.specks === specks && drawn.left <= left && drawn.top <= top && drawn.right >= right && drawn.bottom >= bottom) return;
    const [dx, dy] = [(right - left) / 2, (bottom - top) / 2];
    this.drawn = { ...(area || { left: left - dx, top: top - dy, right: right + dx, bottom: bottom + dy }), specks };
    this.camera.innerHTML = drawing(this.root, this.look, this.drawn);
    if (this.marks) this.mark(...this.marks);
  }

  // The part of the drawing that can be seen.
  seen() {
    const { width, height } = this.svg.getBoundingClientRect();
    const [left, top] = [-this.x / this.scale, -this.y / this.scale];
    return { left, top, right: left + width / this.scale, bottom: top + height / this.scale };
  }

  // Only the marks change: cheaper than drawing anew.
  // `reach`: with the edges of what is selected.
  mark(names, primary, hits, reach) {
    this.marks = [names, primary, hits, reach];
    const seen = new Map();
    for (const name of hits) seen.set(visible(this.stage, name), "hit");
    const boxes = new Set([...names].map((name) => visible(this.stage, name)).filter(Boolean));
    for (const element of this.camera.querySelectorAll(".boxes > [data-id]")) {
      const box = this.stage.boxes[element.dataset.id];
      element.classList.toggle("selected", boxes.has(box));
      element.classList.toggle("echo", boxes.has(box) && !primary);
      element.classList.toggle("hit", seen.has(box));
    }
    this.camera.querySelector(".overlay").innerHTML = reach ? overlay([...boxes].slice(0, 40), this.stage) : "";
    return [...boxes];
  }

  // Width and height that can be seen; on a phone the panel may cover the lower part.
  size() {
    const { width, bottom, top } = this.svg.getBoundingClientRect();
    const panel = document.getElementById("panel");
    const covered = getComputedStyle(panel).position === "fixed" ? panel.getBoundingClientRect().top : Infinity;
    return [width || 600, Math.max(120, Math.min(bottom, covered) - top)];
  }

  centre() { return this.size().map((side) => side / 2); }

  // The scale at which to look first: all of it if that can be read, else its width.
  readableScale() {
    const [w, h] = this.size();
    const wide = (w - 2 * MARGIN) / this.root.w;
    return Math.min(1, Math.max(Math.min(wide, (h - 2 * MARGIN) / this.root.h), Math.min(0.85, Math.max(0.42, wide))));
  }

  // The first look, from the top.
  start(scale) {
    this.scale = scale;
    this.x = (this.size()[0] - this.root.w * scale) / 2;
    this.y = 0;
    this.move();
  }

  fit() {
    const [w, h] = this.size();
    this.scale = Math.min(1.2, (w - 2 * MARGIN) / this.root.w, (h - 2 * MARGIN) / this.root.h);
    this.x = (w - this.root.w * this.scale) / 2;
    this.y = (h - this.root.h * this.scale) / 2;
    this.move();
  }

  move() {
    this.camera.setAttribute("transform", `translate(${this.x} ${this.y}) scale(${this.scale})`);
    this.svg.classList.toggle("tiny", this.scale < 0.35);
    this.draw();
  }

  zoom(factor, cx, cy) {
    const scale = Math.min(3, Math.max(0.02, this.scale * factor));
    this.x = cx - (cx - this.x) * (scale / this.scale);
    this.y = cy - (cy - this.y) * (scale / this.scale);
    this.scale = scale;
    this.move();
  }

  // Brings a box into view; one that is there already moves only if it `must` come to the middle.
  reveal(box, must) {
    const [w, h] = this.size();
    const [x, y] = [box.ax * this.scale + this.x, box.ay * this.scale + this.y];
    const inside = x >= MARGIN && y >= MARGIN && x + box.w * this.scale <= w - MARGIN && y + box.h * this.scale <= h - MARGIN;
    if (inside && this.scale >= 0.4 && !must) return;
    this.scale = Math.max(this.scale, 0.6);
    this.x = w / 2 - (box.ax + box.w / 2) * this.scale;
    this.y = h / 2 - (box.ay + Math.min(box.h, h / this.scale) / 2) * this.scale;
    this.move();
  }

  // Where a group's corner is on the drawing, if this stage has the group.
  corner(key) {
    const box = this.stage.boxes.find((each) => each.key === key);
    return box && [box.ax, box.ay];
  }

  // Undoes what the drawing around a group did to its place on the screen.
  hold([x, y], [nowX, nowY]) {
    this.x += (x - nowX) * this.scale;
    this.y += (y - nowY) * this.scale;
    this.move();
  }

  boxAt(event, kind) {
    const element = event.target.closest(`[data-${kind}]`);
    return element && this.stage.boxes[element.dataset[kind]];
  }

  listen() {
    this.svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      const { left, top } = this.svg.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.clientX - left, event.clientY - top);
    }, { passive: false });
    this.svg.addEventListener("pointerdown", (event) => this.press(event));
    this.svg.addEventListener("pointermove", (event) => this.drag(event));
    for (const end of ["pointerup", "pointercancel"]) this.svg.addEventListener(end, (event) => this.release(event));
    this.svg.addEventListener("click", (event) => this.click(event));
    this.svg.addEventListener("dblclick", (event) => {
      const box = this.boxAt(event, "id");
      if (box && !box.node && !event.target.dataset.toggle) this.actions.toggle(box);
    });
  }

  press(event) {
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    this.dragged = this.pointers.size > 1;
  }

  drag(event) {
    const last = this.pointers.get(event.pointerId);
    if (!last) return;
    const [dx, dy] = [event.clientX - last[0], event.clientY - last[1]];
    if (!this.dragged && Math.hypot(dx, dy) < 4) return;  // a click with an unsteady hand
    if (!this.dragged) this.svg.setPointerCapture(event.pointerId);
    this.dragged = true;
    const other = [...this.pointers].find(([id]) => id !== event.pointerId);
    if (other) this.pinch(last, [event.clientX, event.clientY], other[1]);
    else { this.x += dx; this.y += dy; this.move(); }
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
  }

  pinch(last, now, other) {
    const { left, top } = this.svg.getBoundingClientRect();
    const apart = (a, b) => Math.max(1, Math.hypot(a[0] - b[0], a[1] - b[1]));
    this.x += (now[0] - last[0]) / 2;
    this.y += (now[1] - last[1]) / 2;
    this.zoom(apart(now, other) / apart(last, other), (now[0] + other[0]) / 2 - left, (now[1] + other[1]) / 2 - top);
  }

  release(event) { this.pointers.delete(event.pointerId); }

  click(event) {
    if (this.dragged) return;
    const toggled = this.boxAt(event, "toggle");
    if (toggled) { this.actions.toggle(toggled); return; }
    this.actions.select(this.boxAt(event, "id"), this);
  }
}

const MARKERS = ["arrow", "hot"].map((id) => `<defs><marker id="${id}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" markerUnits="userSpaceOnUse" orient="auto"><path class="${id}" d="M0 0.8L8 4L0 7.2z"/></marker></defs>`).join("");
