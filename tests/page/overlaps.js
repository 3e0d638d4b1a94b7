// How many boxes there are, how many pairs of boxes and frames meet that should not, how many labels stick out.
// All of the drawing counts, and not only what can be seen of it.
const all = { left: -Infinity, top: -Infinity, right: Infinity, bottom: Infinity };
Object.values(panes).forEach((pane) => pane.draw(all));
const face = (box) => box.querySelector(".face:not(.behind)").getBoundingClientRect();
const boxes = [...document.querySelectorAll(".boxes > .box")];
const shapes = boxes.map(face);
const frames = [...document.querySelectorAll(".frame")].map((e) => e.getBoundingClientRect());
const near = 0.1;  // pixels
const meet = (a, b) => a.left < b.right - near && b.left < a.right - near && a.top < b.bottom - near && b.top < a.bottom - near;
const within = (a, b) => a.left >= b.left - near && a.right <= b.right + near && a.top >= b.top - near && a.bottom <= b.bottom + near;
let bad = 0;
shapes.forEach((a, i) => shapes.slice(i + 1).forEach((b) => { bad += meet(a, b); }));
shapes.forEach((a) => frames.forEach((b) => { bad += meet(a, b) && !within(a, b); }));
frames.forEach((a, i) => frames.slice(i + 1).forEach((b) => { bad += meet(a, b) && !within(a, b) && !within(b, a); }));
const sticksOut = (box) => [...box.querySelectorAll(":scope > text")].some((text) => text.getBoundingClientRect().right > face(box).right);
return [shapes.length, bad, boxes.filter(sticksOut).length];
