// The dump as objects: graphs, nodes, and for each stage its order, its boxes and its differences.

const DATA = JSON.parse(document.getElementById("data").textContent);
const FIELDS = ["name", "op", "target", "text", "value", "line", "module", "rule", "kernel"];

function decodeGraph(raw, index) {
  const graph = { ...raw, index, report: DATA.report.graphs[index], open: new Map(), stageCache: [], most: {} };
  graph.nodes = raw.nodes.map((row, i) => decodeNode(row, i, { bytes: raw.bytes[i] || 0, flops: raw.flops[i] || 0 }));
  graph.names = new Set(graph.nodes.map((node) => node.name));
  graph.regions = new Map((graph.report ? graph.report.regions : []).map((region) => [region.name, region]));
  graph.scales = scalesOf(graph);
  graph.rewrites = raw.rewrites.map(([stage, rule, old, made]) => ({
    stage, rule: DATA.texts[rule], old: old.map((t) => DATA.texts[t]), new: made.map((t) => DATA.texts[t]),
  }));
  return graph;
}

function decodeNode(row, index, cost) {
  const node = { index, ...cost };
  FIELDS.forEach((field, k) => { node[field] = DATA.texts[row[k]]; });
  node.module = node.module.replace(/^(L\['\w+'\]|self)\.?/, "");
  node.parameter = row[FIELDS.length] === 1;
  node.inputs = row.slice(FIELDS.length + 1).map((t) => DATA.texts[t]);
  node.short = shortName(node);
  node.kind = kindOf(node);
  return node;
}

function shortName(node) {
  if (node.op === "placeholder") return readable(node.name).replace(/^l_(.+?)_?$/, "$1");
  if (node.op === "output") return "output";
  const parts = node.target.split(".");
  const overload = parts.length > 2 && parts[0] !== "torch";  // torch._C._set_grad_enabled has none
  return parts[parts.length - (overload ? 2 : 1)];
}

// What kind of work an operator is, by its name.
const KINDS = [
  ["lookup", /embedding|gather|index_select|^index$|take/],
  ["matmul", /^(linear|mm|bmm|matmul|addmm|baddbmm|einsum|conv\w*|scaled_dot\w*|dot|mv)$/],
  ["reduce", /softmax|norm|^(sum|mean|amax|amin|max|min|prod|cumsum|argmax|topk|sort|any|all|logsumexp)$/],
  ["layout", /^(view|reshape|permute|transpose|t|cat|stack|concat|flatten|(un)?squeeze|select|slice|expand\w*|split\w*|chunk|unbind|contiguous|clone|narrow|repeat\w*|getitem|_to_copy|to|copy_|movedim|_unsafe_view)$/],
];

function kindOf(node) {
  if (node.op === "placeholder" || node.op === "get_attr" || node.op === "output") return "input";
  if (node.target.startsWith("recompile.")) return "region";
  const found = KINDS.find(([, names]) => names.test(node.short));
  if (found) return found[0];
  return node.target.startsWith("aten.") ? "pointwise" : "other";
}

// The last stage up to `k` that has an order of its own: others changed nothing.
function sourceStage(graph, k) {
  let at = k;
  while (at > 0 && !graph.stages[at].order) at -= 1;
  return at;
}

const changedAt = (graph, k) => k === 0 || Boolean(graph.stages[k].order);
const timeOf = (graph) => graph.stages.reduce((sum, stage) => sum + stage.ms, 0);  // of capture and passes, in milliseconds

function stageOf(graph, k) {
  const at = sourceStage(graph, k);
  if (!graph.stageCache[at]) graph.stageCache[at] = decodeStage(graph, graph.stages[at]);
  return graph.stageCache[at];
}

function decodeStage(graph, raw) {
  const order = raw.order.map((i) => graph.nodes[i]);
  const stage = { order, names: new Map(order.map((node) => [node.name, node])), users: new Map(), tree: raw.tree };
  for (const node of order) {
    for (const name of node.inputs) {
      if (!stage.users.has(name)) stage.users.set(name, []);
      stage.users.get(name).push(node);
    }
  }
  return stage;
}

// A stage with its boxes, which only the stages on the screen need.
function boxedStage(graph, k) {
  const stage = stageOf(graph, k);
  if (stage.root) return stage;
  Object.assign(stage, { boxes: [], boxOf: new Map() });
  stage.root = decodeBox(graph, stage, stage.tree, null, "");
  openSome(graph, stage.root);
  return stage;
}

// A box with its parent, its nodes, and a key that is the same for the same group of another stage.
function decodeBox(graph, stage, raw, parent, key) {
  const leaf = typeof raw === "number";
  const box = { id: stage.boxes.length, parent, key, kind: leaf ? "node" : raw.k, children: [] };
  stage.boxes.push(box);
  if (leaf) {
    box.node = graph.nodes[raw];
    box.leaves = [box.node];
    stage.boxOf.set(box.node.name, box);
    return box;
  }
  Object.assign(box, { label: raw.l, rows: raw.r, entering: raw.i, leaving: raw.o, edges: triples(raw.e || []) });
  const seen = new Map();
  box.children = raw.c.map((child) => {
    const name = typeof child === "number" ? String(child) : `${child.k}:${child.l}`;
    seen.set(name, (seen.get(name) || 0) + 1);
    return decodeBox(graph, stage, child, box, `${key}/${name}#${seen.get(name)}`);
  });
  box.leaves = box.children.flatMap((child) => child.leaves);
  return box;
}

function triples(flat) {
  const found = [];
  for (let k = 0; k < flat.length; k += 3) found.push({ from: flat[k], to: flat[k + 1], count: flat[k + 2] });
  return found;
}

// Opens groups, outer ones and small ones first, as long as the boxes are few enough to be read.
// Groups of one size are opened together: they are often twins. What was set once stays.
const READABLE = 36;

function openSome(graph, root) {
  const queue = [root];
  let shown = root.children.length;
  graph.open.set(root.key, true);
  while (queue.length) {
    const groups = queue.shift().children.filter((child) => child.children.length);
    for (const twins of bySize(groups.filter((box) => !graph.open.has(box.key)))) {
      const more = twins.length * twins[0].children.length;
      const fits = twins[0].kind !== "fold" && shown + more <= READABLE;
      for (const box of twins) graph.open.set(box.key, fits);
      if (fits) shown += more;
    }
    queue.push(...groups);
  }
}

function bySize(groups) {
  const classes = new Map();
  for (const box of groups) {
    const size = `${box.kind === "fold"} ${box.children.length}`;
    classes.set(size, [...(classes.get(size) || []), box]);
  }
  return [...classes.values()].sort((a, b) => a[0].children.length - b[0].children.length);
}

// The names that `names` have in the stage next to stage k, by the rewrites that were recorded.
// `forward`: from stage k - 1 to k; else from k to k - 1.
function counterparts(graph, k, names, forward) {
  const target = stageOf(graph, forward ? k : k - 1).names;
  const found = new Set([...names].filter((name) => target.has(name)));
  for (const rewrite of graph.rewrites) {
    if (rewrite.stage !== k) continue;
    const [from, to] = forward ? [rewrite.old, rewrite.new] : [rewrite.new, rewrite.old];
    if (from.some((name) => names.has(name))) to.filter((name) => target.has(name)).forEach((name) => found.add(name));
  }
  return found;
}

// How stage k changed each node: a map from index to "gone" (in stage k - 1), "made" or "changed".
function changesAt(graph, k) {
  const marks = new Map();
  if (k === 0 || !changedAt(graph, k)) return marks;
  const [before, after] = [stageOf(graph, k - 1), stageOf(graph, k)];
  for (const node of before.order) if (!after.names.has(node.name)) marks.set(node.index, "gone");
  for (const node of after.order) {
    const was = before.names.get(node.name);
    if (!was) marks.set(node.index, "made");
    else if (was !== node) { marks.set(node.index, "changed"); marks.set(was.index, "changed"); }
  }
  return marks;
}

const GRAPHS = DATA.graphs.map(decodeGraph);
