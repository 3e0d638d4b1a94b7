// The drawing of a part of one stage as SVG text: frames of open groups, then edges, then boxes on top of them.

const AROUND = 16;  // how far badges and ends of edges stick out of a box

// `shown` has the area to draw, and whether all is too small to be read: then boxes are faces, and edges have no arrows.
function drawing(root, look, shown) {
  const parts = { frames: [], edges: [], boxes: [] };
  drawBox(root, look, shown, parts);
  return `<g class="frames">${parts.frames.join("")}</g><g class="edges">${parts.edges.join("")}</g>` +
    `<g class="overlay"></g><g class="boxes">${parts.boxes.join("")}</g>`;
}

function drawBox(box, look, shown, parts) {
  if (!meets(shown, box.ax - AROUND, box.ay - AROUND, box.ax + box.w + AROUND, box.ay + box.h + AROUND)) return;
  if (!box.open) {
    parts.boxes.push(shown.specks ? speck(box, look) : closedBox(box, look));
    return;
  }
  if (box.parent) {
    parts.frames.push(frame(box));
    parts.boxes.push(header(box, look));
  }
  parts.edges.push(groupEdges(box, shown));
  for (const child of box.children) drawBox(child, look, shown, parts);
}

const meets = (area, left, top, right, bottom) => left < area.right && area.left < right && top < area.bottom && area.top < bottom;

const at = (box) => `transform="translate(${box.ax.toFixed(1)} ${box.ay.toFixed(1)})"`;

function frame(box) {
  return `<rect class="frame ${box.kind}" data-frame="${box.id}" ${at(box)} width="${box.w}" height="${box.h}" rx="8"/>`;
}

function header(box, look) {
  return `<g class="header ${look.mark(box)}" data-id="${box.id}" ${at(box)}>` +
    `<rect class="grip" width="${box.w}" height="${SPACE.header - 4}" rx="8"/>` +
    `<text class="toggle" data-toggle="${box.id}" x="12" y="18">▾</text>` +
    `<text class="label" x="28" y="18">${escapeText(box.title)}</text>${badge(box, look)}<title>${escapeText(tip(box))}</title></g>`;
}

function speck(box, look) {
  return `<g class="box ${look.colour(box)} ${look.mark(box)}" data-id="${box.id}" ${at(box)}><rect class="face" width="${box.w}" height="${box.h}"/></g>`;
}

function closedBox(box, look) {
  const group = box.node ? "" : " group";
  const left = box.node ? 13 : 29;
  const middle = box.sub ? 17 : 18;
  return `<g class="box ${look.colour(box)} ${look.mark(box)}${group} ${box.kind}" data-id="${box.id}" ${at(box)}>` +
    (box.kind === "fold" ? stack(box) : "") +
    `<rect class="face" width="${box.w}" height="${box.h}" rx="6"/><rect class="stripe" x="1" y="1" width="4" height="${box.h - 2}" rx="2"/>` +
    (box.node ? "" : `<rect class="hand" data-toggle="${box.id}" width="30" height="${box.h}"/><text class="toggle" data-toggle="${box.id}" x="13" y="${middle}">▸</text>`) +
    `<text class="label" x="${left}" y="${middle}">${escapeText(box.title)}</text>` +
    (box.sub ? `<text class="sub" x="13" y="32">${escapeText(box.sub)}</text>` : "") +
    `${badge(box, look)}<title>${escapeText(tip(box))}</title></g>`;
}

function stack(box) {
  return [6, 3].map((d) => `<rect class="face behind" x="${d}" y="${d}" width="${box.w}" height="${box.h}" rx="6"/>`).join("");
}

// How many nodes inside a group the pass touched.
function badge(box, look) {
  const n = box.node ? 0 : look.touched(box);
  if (!n) return "";
  const text = String(n);
  const w = 10 + widthOf(text, "sub");
  return `<g class="badge" transform="translate(${box.w - w / 2 - (box.open ? 8 + w / 2 : 0)} ${box.open ? 5 : -7})">` +
    `<rect width="${w}" height="15" rx="7.5"/><text x="${w / 2}" y="11">${text}</text></g>`;
}

function tip(box) {
  if (!box.node) return box.label;
  return [box.node.name, box.node.text, box.node.line].filter(Boolean).map((text) => shortened(text)).join("\n");
}

function groupEdges(box, shown) {
  if (box.kind === "fold") return "";
  const paths = box.paths.filter((path) => meets(shown, ...reach(box, path)));
  if (shown.specks) return `<path d="${paths.map((path) => route(box, path)).join("")}"/>`;
  const stubs = stubsOf(box).filter(({ x, y }) => meets(shown, x + box.ax - AROUND, y + box.ay - AROUND, x + box.ax + AROUND, y + box.ay + AROUND));
  return [...paths.map((path) => edgePath(box, path)), ...stubs.map((stub) => stubPath(box, stub))].join("");
}

// The area that an edge stays in.
function reach(box, { items }) {
  const left = Math.min(...items.map((item) => item.x - item.w / 2));
  const right = Math.max(...items.map((item) => item.x + item.w / 2));
  return [box.ax + left, box.ay + items[0].bottom, box.ax + right, box.ay + items[items.length - 1].top];
}

// The ends that are drawn as dots. Spreads all ends, once for each arrangement.
function stubsOf(box) {
  box.stubs = box.stubs || endsOf(box).stubs;
  return box.stubs;
}

// Where edges touch each box: spread over its width, in the order of where they come from or go to.
function endsOf(box) {
  const ends = { in: new Map(), out: new Map(), stubs: [] };
  const add = (side, child, item) => ends[side].set(child, [...(ends[side].get(child) || []), item]);
  for (const { edge, items } of box.paths) {
    add("out", edge.from, { edge, x: items[1].x });
    add("in", edge.to, { edge, x: items[items.length - 2].x });
  }
  const far = box.edges.filter((edge) => edge.far);
  const inside = box.parent !== null;
  new Set([...far.map((edge) => edge.to), ...(inside ? box.entering : [])]).forEach((child) => add("in", child, {}));
  new Set([...far.map((edge) => edge.from), ...(inside ? box.leaving : [])]).forEach((child) => add("out", child, {}));
  for (const side of ["in", "out"]) ends[side].forEach((list, child) => spread(box.children[child], list, side, ends.stubs));
  return ends;
}

function spread(child, list, side, stubs) {
  const edges = list.filter((end) => end.edge).sort((a, b) => a.x - b.x);
  const room = Math.min(child.w * 0.7, 26 * (edges.length - 1));
  const middle = child.x + child.w / 2;
  edges.forEach(({ edge }, i) => { edge[side] = middle + (edges.length > 1 ? (i / (edges.length - 1) - 0.5) * room : 0); });
  if (edges.length === list.length) return;
  const aside = edges.length ? (room / 2 + 14) * (side === "in" ? -1 : 1) : 0;
  stubs.push({ x: middle + aside, y: side === "in" ? child.y : child.y + child.h, side });
}

function edgePath(box, path) {
  const width = (1.1 + Math.min(2.4, Math.log2(path.edge.count) * 0.35)).toFixed(1);
  return `<path d="${route(box, path)}" stroke-width="${width}" marker-end="url(#arrow)"/>`;
}

function route(box, { edge, items }) {
  stubsOf(box);
  const points = items.flatMap((item, i) => {
    if (i === 0) return [[edge.out, item.bottom], [edge.out, item.rowBottom]];
    if (i === items.length - 1) return [[edge.in, item.rowTop], [edge.in, item.top - 1]];
    return [[item.x, item.top], [item.x, item.bottom]];
  }).map(([x, y]) => [x + box.ax, y + box.ay]);
  return curve(points);
}

// Vertical at every point, so that an edge leaves and meets boxes straight.
function curve(points) {
  let d = `M${points[0].map((v) => v.toFixed(1)).join(" ")}`;
  for (let i = 1; i < points.length; i += 1) {
    const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
    const bend = Math.min(60, Math.max(8, Math.abs(y1 - y0) / 2));
    d += Math.abs(x0 - x1) < 0.5 ? `L${x1.toFixed(1)} ${y1.toFixed(1)}`
      : `C${x0.toFixed(1)} ${(y0 + bend).toFixed(1)} ${x1.toFixed(1)} ${(y1 - bend).toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`;
  }
  return d;
}

// An end of an edge that crosses the group's border, or is too long to follow.
function stubPath(box, { x, y, side }) {
  const [cx, cy] = [x + box.ax, y + box.ay + (side === "in" ? -13 : 9)];
  const line = side === "in" ? `M${cx} ${cy}v12` : `M${cx} ${cy}v-9`;
  return `<path class="stub" d="${line}"${side === "in" ? ' marker-end="url(#arrow)"' : ""}/><circle class="stub" cx="${cx}" cy="${cy}" r="2.2"/>`;
}

// The edges of the selected boxes: as drawn where they stay inside a group, else straight through its border.
function overlay(boxes, stage) {
  const pairs = new Map();
  for (const box of boxes) {
    for (const node of box.leaves.slice(0, 400)) {
      for (const name of node.inputs) link(pairs, visible(stage, name), box);
      for (const user of stage.users.get(node.name) || []) link(pairs, box, visible(stage, user.name));
    }
  }
  return [...pairs.values()].map(([from, to]) => `<path d="${routed(from, to) || direct(from, to)}" marker-end="url(#hot)"/>`).join("");
}

function routed(from, to) {
  if (from.parent !== to.parent || from.parent.kind === "fold") return "";
  const [a, b] = [from, to].map((box) => from.parent.children.indexOf(box));
  const path = from.parent.paths.find(({ edge }) => edge.from === a && edge.to === b);
  return path ? route(from.parent, path) : "";
}

const direct = (from, to) => curve([[from.ax + from.w / 2, from.ay + from.h], [to.ax + to.w / 2, to.ay - 1]]);

function link(pairs, from, to) {
  if (from && to && from !== to && !from.open && !to.open) pairs.set(`${from.id} ${to.id}`, [from, to]);
}

// The innermost box that can be seen of a node: itself, or the closed group around it.
function visible(stage, name) {
  let box = stage.boxOf.get(name);
  if (!box) return null;
  for (let up = box.parent; up; up = up.parent) if (!up.open) box = up;
  return box;
}
