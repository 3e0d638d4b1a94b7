// What nodes cost: the amounts that boxes can be coloured by, and what the panel says of them.

// By name: the button's text, what the legend says, a node's amount, and an amount as text.
const SCALES = {
  bytes: { button: "By bytes", legend: "bytes read and written, each node by itself", of: (graph, node) => node.bytes, text: (n) => quantity(n, "B") },
  flops: { button: "By operations", legend: "floating-point operations", of: (graph, node) => node.flops, text: (n) => quantity(n, "FLOP") },
  predicted: { button: "By predicted time", legend: "predicted time: each node by itself, as fast as the machine copies and multiplies", of: predicted, text: duration },
  measured: { button: "By measured time", legend: "measured time of regions", of: measured, text: duration },
};

// Milliseconds by the machine's ceilings, which are known where a region was measured.
function predicted(graph, { bytes, flops }) {
  const reached = graph.report && graph.report.ceilings;
  return reached ? 1000 * Math.max(bytes / reached.bytes, flops / reached.flops) : 0;
}

function measured(graph, node) {
  const region = graph.regions.get(node.name);
  return region && region.measured ? region.measured.ms : 0;
}

const scalesOf = (graph) => Object.keys(SCALES).filter((name) => mostOf(graph, name) > 0);

function mostOf(graph, name) {
  graph.most[name] ??= graph.nodes.reduce((most, node) => Math.max(most, SCALES[name].of(graph, node)), 0);
  return graph.most[name];
}

const totalOf = (graph, name, nodes) => nodes.reduce((sum, node) => sum + SCALES[name].of(graph, node), 0);

// One of five classes; a class is a factor of ten.
function heatClass(graph, name, box) {
  const amount = totalOf(graph, name, box.leaves);
  return amount ? `heat-${Math.max(0, Math.min(4, 4 + Math.ceil(Math.log10(amount / mostOf(graph, name)))))}` : "heat-none";
}

function legendHtml(graph, name) {
  if (!name) return keysHtml(KIND_NAMES);
  const keys = [0, 1, 2, 3, 4].map((i) => `<i class="key heat-${i}"></i>`).join("");
  return `<span>${SCALES[name].legend}</span>${keys}<span>${SCALES[name].text(mostOf(graph, name))}</span>`;
}

// Rows of the panel for one node or several; of a region beside what it replaced.
function costRows(graph, nodes) {
  const region = nodes.length === 1 && graph.regions.get(nodes[0].name);
  const known = region && region.before && region.after;
  const total = (name) => { const n = totalOf(graph, name, nodes); return n ? SCALES[name].text(n) : ""; };
  const least = total("predicted");
  return row("moves", known ? changeHtml(region, "bytes") : total("bytes")) +
    row("computes", known ? changeHtml(region, "flops") : total("flops")) +
    row("time", [region && measuredText(region), least && `${least} predicted${nodes.length > 1 ? ", each by itself" : ""}`].filter(Boolean).join("<br>"));
}

// `9.3 MB → 5.8 MB`; with dynamic sizes the expressions, too.
function changeHtml({ before, after }, name) {
  const text = [before, after].map((cost) => SCALES[name].text(cost[`example_${name}`])).join(" → ");
  const exact = [before[name], after[name]];
  return text + (exact.every((each) => /^\d+$/.test(each)) ? "" : `<br><code>${exact.map(escapeText).join(" → ")}</code>`);
}

function measuredText({ measured: found }) {
  if (!found) return "";
  const reached = found.bound === "launch" ? "" : `, ${(100 * found.reached).toFixed(0)}% of what the machine reaches`;
  return `${duration(found.ms)} measured, bound by ${found.bound}${reached}`;
}
