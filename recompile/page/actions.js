// What readers do: select, open, walk, search; by mouse, by touch, by keyboard.

function selectBox(box, pane) {
  state.pair = null;
  state.from = pane.side;
  state.node = box && box.node ? box.node.name : "";
  state.group = box && !box.node ? box.key : "";
  renderPanel();
  follow();
  writeAddress();
}

function selectNode(name) {
  state.pair = null;
  state.group = "";
  state.node = name;
  const graph = graphNow();
  if (!shownStage().names.has(name)) state.from = stageOf(graph, state.pass).names.has(name) ? "after" : "before";
  if (!shownStage().names.has(name)) state.pass = nearestStage(graph, name);
  render();
  revealNode();
}

// The stage closest to the chosen one that has a node of this name.
function nearestStage(graph, name) {
  const having = graph.stages.map((_, k) => k).filter((k) => stageOf(graph, k).names.has(name));
  state.from = "after";
  return having.sort((a, b) => Math.abs(a - state.pass) - Math.abs(b - state.pass))[0] ?? state.pass;
}

// Opens the groups around the selected node and brings it into view; a weight's reader for a weight.
function revealNode() {
  const pane = panes[state.from] || panes.after || panes.before;
  if (!pane) return;
  const reader = pane.stage.boxOf.has(state.node) ? state.node : ((pane.stage.users.get(state.node) || [])[0] || {}).name;
  const box = pane.stage.boxOf.get(reader);
  if (!box) return;
  for (let up = box.parent; up; up = up.parent) graphNow().open.set(up.key, true);
  renderGraph(graphNow(), by("view"));
  pane.reveal(box, true);
  for (const other of Object.values(panes)) other.zoom(pane.scale / other.scale, ...other.centre());
  follow();
}

// Opens or closes a group on both sides; it stays where it is on the screen.
function toggleBox(box) {
  const graph = graphNow();
  const corners = Object.values(panes).map((pane) => [pane, pane.corner(box.key)]);
  graph.open.set(box.key, !graph.open.get(box.key));
  renderGraph(graph, by("view"));
  for (const [pane, was] of corners) if (was) pane.hold(was, pane.corner(box.key));
  renderPanel();
}

// Opens or closes groups of all stages on the screen.
function setOpen(which, open) {
  if (state.tab !== "graph") return;
  const graph = graphNow();
  for (const pane of Object.values(panes)) {
    for (const box of pane.stage.boxes) if (box.parent && box.children.length && which(box)) graph.open.set(box.key, open);
  }
  renderGraph(graph, by("view"));
  startPanes();
}

const isFold = (box) => box.kind === "fold";
const foldsOpen = () => Object.values(panes).some((pane) => pane.stage.boxes.some((box) => isFold(box) && graphNow().open.get(box.key)));

const ACTS = {
  unfold: () => setOpen(isFold, !foldsOpen()),
  expand: () => setOpen((box) => !isFold(box), true),
  collapse: () => setOpen(() => true, false),
  fit: () => Object.values(panes).forEach((pane) => pane.fit()),
  drop: () => change({ node: "", group: "", pair: null }),
  colour: () => change({ scale: cycle(["", ...graphNow().scales], scaleNow()) }),
};

function change(values) {
  Object.assign(state, values);
  render();
}

function step(by_, changedOnly) {
  const graph = graphNow();
  let k = state.pass + by_;
  while (changedOnly && graph.stages[k] && !changedAt(graph, k)) k += by_;
  if (graph.stages[k]) showPass(k);
}

// Another pass: from the top, or around the selected node.
function showPass(k) {
  change({ pass: k, pair: null });
  startPanes();
  if (state.node) revealNode();
}

function showGraph(k) {
  change({ graph: k, pass: firstPass(GRAPHS[k]), node: "", group: "", pair: null, from: "after", file: "" });
}

function find(query) {
  Object.assign(state, { query, hit: -1 });
  by("found").hidden = !query;
  by("found").innerHTML = query ? foundHtml(searched(shownStage(), query)) : "";
  by("count").textContent = "";
  markPanes();
}

function nextFound(by_) {
  const nodes = searched(shownStage(), state.query).slice(0, MOST_FOUND);
  if (!nodes.length) return;
  state.hit = (state.hit + by_ + nodes.length) % nodes.length;
  selectNode(nodes[state.hit].name);
  by("found").hidden = true;
  by("count").textContent = `${state.hit + 1} of ${nodes.length}`;
}

function clearSearch() {
  by("search").value = "";
  find("");
}

function leave() {
  if (state.query || document.activeElement === by("search")) {
    clearSearch();
    by("search").blur();
  } else ACTS.drop();
}

function theme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

const toggleSelected = () => { const box = selectedGroup(); if (state.group && box) toggleBox(box); };
const zoomAll = (factor) => Object.values(panes).forEach((pane) => pane.zoom(factor, ...pane.centre()));
const cycle = (values, now) => values[(values.indexOf(now) + 1) % values.length];

const KEYS = [
  ["j", "next pass", () => step(1, state.changedOnly)],
  ["k", "previous pass", () => step(-1, state.changedOnly)],
  ["J", "next pass that changed the graph", () => step(1, true)],
  ["K", "previous pass that changed the graph", () => step(-1, true)],
  ["g", "next graph", () => showGraph((state.graph + 1) % GRAPHS.length)],
  ["d", "graph or diff", () => change({ tab: state.tab === "diff" ? "graph" : "diff" })],
  ["s", "before, both, after", () => change({ side: cycle(["before", "both", "after"], state.side) })],
  ["/", "search; Enter and Shift+Enter walk the results", () => by("search").focus()],
  ["f", "open or close the folds of equal siblings", ACTS.unfold],
  ["e", "open all groups", ACTS.expand],
  ["c", "close all groups", ACTS.collapse],
  ["o", "open or close the selected group", toggleSelected],
  ["0", "show all", ACTS.fit],
  ["+", "zoom in", () => zoomAll(1.25)],
  ["-", "zoom out", () => zoomAll(0.8)],
  ["b", "colours: by kind, by each cost that is known", ACTS.colour],
  ["t", "light or dark", theme],
  ["?", "this help", () => by("help").showModal()],
  ["Escape", "leave the search, drop the selection", leave],
];

function press(event) {
  const typing = event.target === by("search");
  if (event.ctrlKey || event.metaKey || event.altKey || by("help").open) return;
  if (typing && event.key === "Enter") { nextFound(event.shiftKey ? -1 : 1); return; }
  if (typing && event.key !== "Escape") return;
  if (event.target.tagName === "SELECT") return;
  if (walks(event)) {
    event.preventDefault();
    walk(WALKS[event.key][2]);
    return;
  }
  const found = KEYS.find(([key]) => key === event.key);
  if (!found) return;
  event.preventDefault();
  found[2]();
}

const helpHtml = () => `<h2>Keyboard</h2><table>${[...KEYS, ...Object.values(WALKS)].map(([key, what_]) => `<tr><td><kbd>${escapeText(key)}</kbd></td><td>${escapeText(what_)}</td></tr>`).join("")}</table>` +
  `<h2>Mouse and touch</h2><p>Drag to move, wheel or pinch to zoom. Click a box for its details; click ▸ or double-click to open a group in place.</p>` +
  `<p>Weights have no box of their own: the panel of the operator that reads them lists them.</p><p>The address of this page keeps what is selected: copy it to share a view.</p><form method="dialog"><button>Close</button></form>`;

// What a click on an element with one of these attributes does.
const CLICKS = {
  tab: (value) => change({ tab: value }),
  side: (value) => change({ side: value }),
  act: (value) => ACTS[value](),
  stage: (value) => showPass(Number(value)),
  node: (value) => selectNode(value),
  name: (value, element) => pickLine(value, element),
  file: (value) => change({ file: value }),
  kernel: (value) => change({ tab: "kernels", file: value }),
  rewrite: (value) => showRewrite(graphNow().rewrites[Number(value)]),
  toggleKey: () => toggleSelected(),
};

function showRewrite(rewrite) {
  change({ tab: "graph", pass: rewrite.stage, pair: rewrite, node: "", group: "", side: narrow() ? state.side : "both" });
  follow();
}

// A line of the diff: its node in the panel.
function pickLine(name, element) {
  const before = state.pass > 0 && element.matches(".row > :first-child") && changedAt(graphNow(), state.pass);
  Object.assign(state, { node: name, from: before ? "before" : "after", group: "", pair: null });
  for (const cell of document.querySelectorAll(".cell.picked")) cell.classList.remove("picked");
  element.classList.add("picked");
  renderPanel();
  writeAddress();
}

function listen() {
  document.addEventListener("keydown", press);
  document.addEventListener("click", (event) => {
    if (event.target.closest("svg")) return;
    for (const [name, act] of Object.entries(CLICKS)) {
      const element = event.target.closest(`[data-${name.replace(/[A-Z]/, (c) => `-${c.toLowerCase()}`)}]`);
      if (element && element !== document.body) { act(element.dataset[name], element); return; }
    }
    if (!event.target.closest("#finder")) by("found").hidden = true;
  });
  by("graphs").addEventListener("change", (event) => showGraph(Number(event.target.value)));
  by("search").addEventListener("input", (event) => find(event.target.value));
  by("search").addEventListener("focus", () => { by("found").hidden = !state.query; });
  by("passes").addEventListener("change", (event) => change({ changedOnly: event.target.checked }));
  by("theme").addEventListener("click", theme);
  by("helper").addEventListener("click", () => by("help").showModal());
  by("help").innerHTML = helpHtml();
  window.addEventListener("hashchange", readAddress);
}

start();
