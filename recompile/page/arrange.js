// Coordinates: how large each box is, open or closed, and where it stands inside its group.

const SPACE = { side: 16, row: 34, pad: 14, header: 30, bend: 8, gridWidth: 1100, label: 190 };

// Sizes and places of a box and all that is open inside it, relative to its own corner.
function arrange(box, isOpen) {
  box.open = box.children.length > 0 && isOpen(box);
  describe(box);
  if (!box.open) return sizeClosed(box);
  for (const child of box.children) arrange(child, isOpen);
  box.paths = [];
  box.stubs = null;
  if (box.kind === "fold") grid(box);
  else rows(box);
}

function describe(box) {
  if (box.node) {
    const member = box.parent.kind === "fold" && box.node.op !== "placeholder";  // what tells it from its siblings
    box.title = member ? readable(box.node.name) : box.node.short;
    box.sub = box.node.value;
  } else {
    const count = box.kind === "fold" ? `${box.children.length} × ` : "";
    box.title = count + (box.kind === "line" ? lineTitle(box.label) : groupTitle(box));
    box.sub = box.kind === "fold" && box.children[0].node ? box.children[0].node.value : summary(box);
  }
  box.title = fitted(box.title, "label", SPACE.label);
  box.sub = fitted(box.sub, "sub", SPACE.label);
}

// Folded inputs are named by what their names have in common.
function groupTitle(box) {
  const inputs = box.kind === "fold" && box.children[0].node && box.children[0].node.op === "placeholder";
  return inputs ? readable(`l_${box.label}`).replace(/^l_/, "") : box.label;
}

// `model.py:41 in forward: x = self.e(x)` as `x = self.e(x)`, which says more.
const lineTitle = (line) => line.replace(/^\S+ in \S+: /, "") || line;

function summary(box) {
  const names = [...new Set(box.leaves.map((node) => node.short))];
  return `${plural(box.leaves.length, "node")}: ${names.join(", ")}`;
}

function sizeClosed(box) {
  const mark = box.node ? 0 : 18;
  box.w = Math.max(72, Math.ceil(Math.max(widthOf(box.title, "label") + mark, widthOf(box.sub, "sub"))) + 26);
  box.h = box.sub ? 40 : 28;
}

// Equal siblings in lines; no edges are drawn among them.
function grid(box) {
  const w = Math.max(...box.children.map((child) => child.w));
  const wide = Math.max(1, Math.floor(SPACE.gridWidth / (w + 8)));
  const columns = Math.min(wide, Math.max(3, Math.ceil(Math.sqrt(box.children.length * 2))));
  let y = SPACE.header + 4;
  for (let k = 0; k < box.children.length; k += columns) {
    const line = box.children.slice(k, k + columns);
    line.forEach((child, i) => { child.x = SPACE.pad + i * (w + 8); child.y = y; });
    y += Math.max(...line.map((child) => child.h)) + 8;
  }
  const across = Math.min(columns, box.children.length);
  box.w = Math.max(2 * SPACE.pad + across * (w + 8) - 8, headerWidth(box));
  box.h = y + SPACE.pad - 8;
}

const headerWidth = (box) => widthOf(box.title, "label") + 90;

function rows(box) {
  const items = itemsOf(box);
  for (const row of items) pack(row);
  for (let sweep = 0; sweep < 4; sweep += 1) {
    const up = sweep % 2 === 1;
    (up ? [...items].reverse() : items).forEach((row) => straighten(row, up ? "below" : "above"));
  }
  place(box, items);
  box.paths = box.edges.map((edge) => edge.chain).filter(Boolean);
}

// Rows of items: children, and bends of edges that pass by. Items know their neighbours above and below.
function itemsOf(box) {
  const items = box.rows.map((row, r) => row.map((k) => ({ k, r, w: k < 0 ? SPACE.bend : box.children[k].w, above: [], below: [] })));
  const home = new Map();
  const bends = box.edges.map(() => []);
  items.flat().forEach((item) => (item.k < 0 ? bends[-1 - item.k].push(item) : home.set(item.k, item)));
  box.edges.forEach((edge, e) => {
    const chain = [home.get(edge.from), ...bends[e], home.get(edge.to)];
    edge.far = chain.some((item, i) => i > 0 && item.r !== chain[i - 1].r + 1);
    if (edge.far) return;
    edge.chain = { edge, items: chain };
    for (let i = 1; i < chain.length; i += 1) {
      chain[i - 1].below.push(chain[i]);
      chain[i].above.push(chain[i - 1]);
    }
  });
  return items;
}

const apart = (a, b) => (a.w + b.w) / 2 + (a.k < 0 && b.k < 0 ? 6 : SPACE.side);

// Centres from left to right, as close as allowed, around zero.
function pack(row) {
  let x = 0;
  row.forEach((item, i) => { x += i ? apart(row[i - 1], item) : 0; item.x = x; });
  row.forEach((item) => { item.x -= x / 2; });
}

// Moves each item towards its neighbours on one side. The result has the least squared distance to where the
// items want to be among all that keep the order and the space between: pool adjacent violators.
function straighten(row, side) {
  let shift = 0;
  const blocks = [];
  row.forEach((item, i) => {
    shift += i ? apart(row[i - 1], item) : 0;
    const near = item[side];
    const wish = near.length ? near.reduce((sum, other) => sum + other.x, 0) / near.length : item.x;
    let block = { sum: wish - shift, n: 1 };
    while (blocks.length && blocks[blocks.length - 1].sum / blocks[blocks.length - 1].n > block.sum / block.n) {
      const last = blocks.pop();
      block = { sum: last.sum + block.sum, n: last.n + block.n };
    }
    blocks.push(block);
    item.shift = shift;
  });
  const base = blocks.flatMap((block) => Array(block.n).fill(block.sum / block.n));
  row.forEach((item, i) => { item.x = base[i] + item.shift; });
}

// From centres to corners, and the size of the group.
function place(box, items) {
  const all = items.flat();
  const left = Math.min(...all.map((item) => item.x - item.w / 2));
  const right = Math.max(...all.map((item) => item.x + item.w / 2));
  const top = box.parent ? SPACE.header + 16 : SPACE.pad;
  box.w = Math.max(right - left + 2 * SPACE.pad, box.parent ? headerWidth(box) : 0);
  const offset = (box.w - (right - left)) / 2 - left;
  let y = top;
  let end = top;
  for (const row of items) {
    const h = Math.max(0, ...row.filter((item) => item.k >= 0).map((item) => box.children[item.k].h));
    const gap = gapBelow(row);
    row.forEach((item) => putItem(box, item, offset, y, h));
    end = y + h;
    y = end + gap;
  }
  box.h = end + (box.parent ? SPACE.pad + 8 : SPACE.pad);
}

// Room for the edges below a row: more where they have far to go sideways.
function gapBelow(row) {
  const far = Math.max(0, ...row.flatMap((item) => item.below.map((other) => Math.abs(other.x - item.x))));
  return SPACE.row + Math.min(36, far * 0.08);
}

function putItem(box, item, offset, y, h) {
  item.x += offset;
  [item.top, item.bottom, item.rowTop, item.rowBottom] = [y, y + h, y, y + h];
  if (item.k < 0) return;
  const child = box.children[item.k];
  child.x = item.x - child.w / 2;
  child.y = y + (h - child.h) / 2;
  [item.top, item.bottom] = [child.y, child.y + child.h];
}

// The place of every box on the whole drawing.
function locate(box, x, y) {
  box.ax = x + (box.x || 0);
  box.ay = y + (box.y || 0);
  if (box.open) for (const child of box.children) locate(child, box.ax, box.ay);
}
