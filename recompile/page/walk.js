// The arrow keys: from the selected box along its edges, and beside it in its row.

function walk(way) {
  const pane = panes[state.from] || panes.after || panes.before;
  const from = selectedBox(pane);
  const to = from ? nearest(from, way(pane.stage, from)) : pane.root.children[pane.root.rows[0].find((k) => k >= 0)];
  if (!to) return;
  selectBox(to, pane);
  pane.reveal(to);
}

function selectedBox(pane) {
  if (state.group) return pane.stage.boxes.find((box) => box.key === state.group);
  return state.node ? visible(pane.stage, state.node) : null;
}

const readBy = (stage, box) => outside(stage, box, (node) => (stage.users.get(node.name) || []).map((user) => user.name));
const readings = (stage, box) => outside(stage, box, (node) => node.inputs);

// The boxes that can be seen of the nodes that `links` gives for those of a box.
function outside(stage, box, links) {
  const own = new Set(box.leaves);
  const found = new Set(box.leaves.flatMap(links).map((name) => visible(stage, name)));
  return [...found].filter((other) => other && !own.has(other.leaves[0]));
}

// Its siblings at its height, to the left or to the right; of the group around it where it has none.
const beside = (side) => function siblings(stage, box) {
  if (!box.parent) return [];
  const level = (other) => other.ay < box.ay + box.h && box.ay < other.ay + other.h;
  const found = box.parent.children.filter((other) => side * (other.ax - box.ax) > 0 && level(other));
  return found.length ? found : siblings(stage, box.parent);
};

const middle = (box) => [box.ax + box.w / 2, box.ay + box.h / 2];

function nearest(from, boxes) {
  const [x, y] = middle(from);
  const far = (box) => { const [ox, oy] = middle(box); return Math.hypot(ox - x, oy - y); };
  return boxes.reduce((best, box) => (best && far(best) <= far(box) ? best : box), null);
}

const WALKS = {
  ArrowDown: ["↓", "to a box that reads the selected one", readBy],
  ArrowUp: ["↑", "to a box that it reads", readings],
  ArrowLeft: ["←", "to the box on its left", beside(-1)],
  ArrowRight: ["→", "to the box on its right", beside(1)],
};

// Whether an arrow key is for the graph; it may scroll a list or a text, or move in a menu.
const walks = (event) => event.key in WALKS && state.tab === "graph" && !event.target.closest("#passes, #panel, #found");
