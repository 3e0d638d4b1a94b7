// What is on the screen: the state, its address, and drawing it.

const state = { graph: 0, pass: 0, tab: "graph", side: "both", node: "", from: "after", group: "", file: "", query: "", hit: -1, changedOnly: false, scale: "", pair: null };
const by = (id) => document.getElementById(id);
const graphNow = () => GRAPHS[state.graph];
const scaleNow = () => (graphNow().scales.includes(state.scale) ? state.scale : "");  // not every graph has every cost
const panes = {};

function start() {
  by("graphs").innerHTML = GRAPHS.map((graph) => `<option value="${graph.index}">${escapeText(graphTitle(graph))}</option>`).join("");
  if (!GRAPHS.length) {
    by("view").innerHTML = `<p class="note">No graph was compiled.</p>`;
    return;
  }
  listen();
  readAddress();
}

function graphTitle(graph) {
  const nodes = plural(graph.stages[0].order.length, "node");
  const plain = graph.report && graph.report.fallback ? ", plain Inductor" : "";
  return `${graph.index}: ${graph.title || "graph"} (${nodes}, ${milliseconds(timeOf(graph))}${plain})`;
}

// --- the address: #graph=0&pass=fuse-lookups&node=mm_7; a pass also by its number

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  clearSearch();
  const number = (name, most, otherwise) => (/^\d+$/.test(given.get(name) || "") ? Math.min(Number(given.get(name)), most) : otherwise);
  state.graph = number("graph", GRAPHS.length - 1, largest());
  const graph = graphNow();
  const named = graph.stages.findIndex((stage) => stage.pass === given.get("pass"));
  state.pass = named >= 0 ? named : number("pass", graph.stages.length - 1, firstPass(graph));
  state.tab = ["diff", "kernels"].includes(given.get("view")) ? given.get("view") : "graph";
  state.side = ["before", "after"].includes(given.get("side")) ? given.get("side") : narrow() ? "after" : "both";
  state.file = given.get("file") || "";
  state.scale = given.get("colour") || "";
  state.group = "";
  state.pair = null;
  state.node = given.get("node") || "";
  state.from = stageOf(graph, state.pass).names.has(state.node) ? "after" : "before";
  render();
  if (state.node) revealNode();
}

// The graph to show first, where a model is many.
function largest() {
  const sizes = GRAPHS.map((graph) => graph.stages[0].order.length);
  return sizes.indexOf(Math.max(...sizes));
}

const narrow = () => window.innerWidth < 800;

// The pass that a reader wants to see first: the last one that changed the graph.
const firstPass = (graph) => sourceStage(graph, graph.stages.length - 1);

function writeAddress() {
  const given = new URLSearchParams({ graph: state.graph, pass: graphNow().stages[state.pass].pass });
  if (state.tab !== "graph") given.set("view", state.tab);
  if (state.side !== (narrow() ? "after" : "both")) given.set("side", state.side);
  if (state.node) given.set("node", state.node);
  if (scaleNow()) given.set("colour", scaleNow());
  if (state.file && state.tab === "kernels") given.set("file", state.file);
  history.replaceState(null, "", `#${given}`);
}

// --- drawing

function render() {
  const graph = graphNow();
  document.title = `recompile: ${graph.title || `graph ${graph.index}`}`;
  by("graphs").value = String(state.graph);
  by("cards").innerHTML = cardsHtml(graph);
  by("passes").innerHTML = passesHtml(graph, state.pass, state.changedOnly);
  by("passes").querySelector(".chosen").scrollIntoView({ block: "nearest", inline: "nearest" });
  document.body.dataset.tab = state.tab;
  for (const button of document.querySelectorAll("[data-tab]")) button.classList.toggle("on", button.dataset.tab === state.tab);
  by("colour").hidden = !graph.scales.length;
  by("colour").textContent = scaleNow() ? SCALES[scaleNow()].button : "By kind";
  renderTab(graph);
  renderPanel();
  writeAddress();
}

function renderTab(graph) {
  const view = by("view");
  if (state.tab === "graph") {
    renderGraph(graph, view);
    const changes = changesAt(graph, state.pass).size ? `<span class="spring"></span>${keysHtml(CHANGE_NAMES)}` : "";
    by("legend").innerHTML = legendHtml(graph, scaleNow()) + changes;
    return;
  }
  view.className = "text";
  view.innerHTML = "";
  for (const side of Object.keys(panes)) delete panes[side];
  if (state.tab === "diff") renderDiff(view, graph, state.pass);
  else renderKernels(view, graph);
}

function sidesShown() {
  const changed = state.pass > 0 && changedAt(graphNow(), state.pass);
  by("sides").hidden = !changed;
  if (!changed) return ["after"];
  return state.side === "both" ? ["before", "after"] : [state.side];
}

function renderGraph(graph, view) {
  const sides = sidesShown();
  for (const button of document.querySelectorAll("[data-side]")) button.classList.toggle("on", button.dataset.side === state.side);
  if (Object.keys(panes).join() !== sides.join()) makePanes(view, sides);
  const marks = changesAt(graph, state.pass);
  const fresh = sides.map((side) => {
    const k = side === "before" ? state.pass - 1 : state.pass;
    return panes[side].show(graph, k, lookOf(graph, marks, side), captionOf(graph, k, side, sides.length > 1));
  });
  if (fresh.some(Boolean)) startPanes();
  markPanes();
}

// Both sides at one scale, so that they can be compared.
function startPanes() {
  const scale = Math.min(...Object.values(panes).map((pane) => pane.readableScale()));
  for (const pane of Object.values(panes)) pane.start(scale);
}

function makePanes(view, sides) {
  for (const side of Object.keys(panes)) delete panes[side];
  view.className = `panes n${sides.length}`;
  view.innerHTML = sides.map((side) => `<div class="pane" data-pane="${side}"></div>`).join("");
  for (const side of sides) panes[side] = new Pane(view.querySelector(`[data-pane=${side}]`), side, { select: selectBox, toggle: toggleBox });
}

function captionOf(graph, k, side, both) {
  const nodes = plural(stageOf(graph, k).order.length, "node");
  const name = escapeText(graph.stages[state.pass].pass);
  if (!both && side === "after") return `${state.pass ? "after " : ""}<b>${name}</b> · ${nodes}`;
  return `${side} <b>${name}</b> · ${nodes}`;
}

// Colours and marks of boxes. A closed group whose nodes all changed is marked as one.
function lookOf(graph, marks, side) {
  const hidden = side === "before" ? "made" : "gone";
  const scale = scaleNow();
  const markOf = (node) => (marks.get(node.index) === hidden ? undefined : marks.get(node.index));
  return {
    colour: (box) => (scale ? heatClass(graph, scale, box) : box.leaves.every((node) => node.kind === box.leaves[0].kind) ? box.leaves[0].kind : "mixed"),
    mark: (box) => (!box.open && box.leaves.every((node) => markOf(node) === markOf(box.leaves[0])) && markOf(box.leaves[0])) || "",
    touched: (box) => box.leaves.filter((node) => markOf(node)).length,
  };
}

// Selected names on a side: what was selected there, or what corresponds to it on the other side.
function selectedOn(side) {
  if (state.pair) return new Set(side === "before" ? state.pair.old : state.pair.new);
  const names = groupNames() || (state.node ? new Set([state.node]) : new Set());
  if (side === state.from || !names.size || !panes.before || !panes.after) return names;
  return counterparts(graphNow(), state.pass, names, side === "after");
}

function groupNames() {
  const box = state.group && selectedGroup();
  return box ? new Set(box.leaves.map((node) => node.name)) : null;
}

function selectedGroup() {
  const pane = panes[state.from] || panes.after || panes.before;
  return pane && pane.stage.boxes.find((box) => box.key === state.group);
}

function markPanes() {
  const hits = state.query ? searched(shownStage(), state.query).map((node) => node.name) : [];
  const found = {};
  for (const [side, pane] of Object.entries(panes)) {
    const own = side === state.from && !state.pair;
    found[side] = pane.mark(selectedOn(side), own || Boolean(state.pair), hits, own);
  }
  return found;
}

// The other pane follows the selection.
function follow() {
  const found = markPanes();
  for (const [side, boxes] of Object.entries(found)) {
    if (boxes.length && (side !== state.from || state.pair)) panes[side].reveal(boxes[0]);
  }
}

// The stage on the screen that holds the selected node: the one after the pass, or the one before it.
function stageNumber() {
  return state.from === "before" && state.pass > 0 ? state.pass - 1 : state.pass;
}

const shownStage = () => stageOf(graphNow(), stageNumber());

function renderPanel() {
  const graph = graphNow();
  const node = state.node && shownStage().names.get(state.node);
  const box = state.group && selectedGroup();
  if (node) by("panel").innerHTML = nodePanel(graph, stageNumber(), shownStage(), node);
  else if (box) by("panel").innerHTML = groupPanel(graph, box);
  else by("panel").innerHTML = missing() + passPanel(graph, state.pass);
  if (node || box) by("panel").insertAdjacentHTML("afterbegin", `<button class="close" data-act="drop" aria-label="drop the selection">×</button>`);
  document.body.classList.toggle("picked", Boolean(node || box));
  by("panel").scrollTop = 0;
}

const missing = () => (state.node ? `<p class="note">${escapeText(state.node)} is not in this stage.</p>` : "");

function renderKernels(view, graph) {
  const ours = new Set(graph.nodes.map((node) => node.kernel));
  const paths = Object.keys(graph.sources).sort((a, b) => ours.has(b) - ours.has(a));  // regions before Inductor's program
  if (!paths.length) {
    view.innerHTML = `<p class="note">No generated source was kept for this graph.</p>`;
    return;
  }
  if (!paths.includes(state.file)) state.file = paths[0];
  view.innerHTML = `<div class="files">${paths.map((path) => `<button data-file="${escapeText(path)}" class="${path === state.file ? "on" : ""}">${escapeText(path.replace("kernels/", ""))}</button>`).join("")}</div>` +
    `<pre class="code whole">${coloured(graph.sources[state.file], state.file)}</pre>`;
}
