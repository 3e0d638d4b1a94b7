// The panel beside the graph: what is known about the selected node or group, or about the pass.

const KIND_NAMES = { input: "input, output", lookup: "lookup", matmul: "matmul", reduce: "reduction, norm", layout: "layout", pointwise: "pointwise", region: "region", other: "other" };
const row = (name, html) => (html ? `<dt>${name}</dt><dd>${html}</dd>` : "");
const nodeLink = (name, text) => `<a class="node-link" data-node="${escapeText(name)}">${escapeText(text || readable(name))}</a>`;

function nodeLinks(names, most = 12) {
  const shown = names.slice(0, most).map((name) => nodeLink(name)).join(" ");
  const rest = names.slice(most);
  return shown + (rest.length ? ` <details><summary>${rest.length} more</summary>${rest.map((name) => nodeLink(name)).join(" ")}</details>` : "");
}

function nodePanel(graph, k, stage, node) {
  const users = (stage.users.get(node.name) || []).map((user) => user.name);
  const readings = node.inputs.map((name) => stage.names.get(name)).filter(Boolean);
  const weights = readings.filter((other) => other.parameter);
  return `<h2 title="${escapeText(node.name)}">${escapeText(readable(node.name))}</h2><p class="chips"><span class="chip ${node.kind}">${node.parameter ? "parameter" : KIND_NAMES[node.kind]}</span>${made(node)}</p>` +
    `<pre class="code call">${linked(node, stage)}</pre><dl>` +
    row("value", node.value && `<code>${escapeText(node.value)}</code>`) +
    row("your line", lineHtml(node.line)) +
    row("module", node.module && `<code>${escapeText(node.module)}</code>`) +
    costRows(graph, [node]) +
    row("reads", nodeLinks([...new Set(readings.filter((other) => !other.parameter).map((other) => other.name))])) +
    row("weights", weights.map((other) => `${nodeLink(other.name)} <code>${escapeText(other.value)}</code>`).slice(0, 8).join("<br>") + (weights.length > 8 ? `<br>and ${weights.length - 8} more` : "")) +
    row("read by", nodeLinks(users)) +
    row("life", life(graph, k, node)) + "</dl>" +
    refusalsAt(graph, node.name) + kernelHtml(graph, node);
}

const made = (node) => (node.rule ? `<span class="chip rule">made by ${escapeText(node.rule)}</span>` : "");

// `model.py:41 in forward: x = self.e(x)`: the place, then the code as code.
function lineHtml(line) {
  if (!line) return "";
  const [, place, code] = line.match(/^(\S+ in \S+): ([\s\S]*)$/) || [null, line, ""];
  return `<div class="place">${escapeText(place)}</div>` + (code ? `<pre class="code">${coloured(code, ".py")}</pre>` : "");
}

// The node's call with links to what it reads.
function linked(node, stage) {
  const names = new Set(node.inputs.filter((name) => stage.names.has(name)));
  const html = node.text.split(/([A-Za-z_]\w*)/).map((part) => (names.has(part) ? nodeLink(part) : escapeText(readable(part)))).join("");
  return html.length > 20000 ? escapeText(`${node.text.slice(0, 2000)} …`) : html;
}

// From which stage to which a node of this name is there, and what took its place.
function life(graph, k, node) {
  const there = graph.stages.map((_, s) => stageOf(graph, s).names.has(node.name));
  const [first, last] = [there.indexOf(true), there.lastIndexOf(true)];
  const stage = (s) => `<a class="stage-link" data-stage="${s}">${escapeText(graph.stages[s].pass)}</a>`;
  const start = first > 0 ? `made in ${stage(first)}${from(graph, first, node.name, false)}` : "captured";
  const end = last < there.length - 1 ? `, gone in ${stage(last + 1)}${from(graph, last + 1, node.name, true)}` : ", to the end";
  return start + end;
}

function from(graph, k, name, forward) {
  const names = [...counterparts(graph, k, new Set([name]), forward)];
  if (!names.length) return "";
  const rest = names.length > 4 ? ` and ${names.length - 4} more` : "";
  return ` (${forward ? "now" : "from"} ${names.slice(0, 4).map((each) => nodeLink(each)).join(", ")}${rest})`;
}

function refusalsOf(graph) {
  const passes = graph.report ? graph.report.passes : [];
  return passes.flatMap((each) => each.rules.flatMap((rule) => rule.refused.map((refusal) => ({ ...refusal, rule: rule.name, pass: each.name }))));
}

function refusalsAt(graph, name) {
  const found = refusalsOf(graph).filter((refusal) => refusal.node === name);
  return found.map((refusal) => `<p class="refusal"><b>${escapeText(refusal.rule)}</b> did not fire: ${escapeText(refusal.why)}</p>`).join("");
}

function kernelHtml(graph, node) {
  if (!node.kernel) return "";
  const source = graph.sources[node.kernel];
  if (source === undefined) return `<h3>kernel</h3><p class="note">${escapeText(node.kernel)} is not in this dump.</p>`;
  return `<h3>kernel <a class="kernel-link" data-kernel="${escapeText(node.kernel)}">${escapeText(node.kernel)}</a></h3>` +
    `<pre class="code kernel">${coloured(source.slice(0, 6000), node.kernel)}${source.length > 6000 ? "\n…" : ""}</pre>`;
}

function groupPanel(graph, box) {
  const counts = new Map();
  for (const node of box.leaves) {
    const name = node.op === "placeholder" ? "input" : node.short;
    counts.set(name, (counts.get(name) || 0) + 1);
  }
  const listed = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 12).map(([name, n]) => `<li><b>${n}</b> ${escapeText(name)}</li>`).join("");
  const lines = [...new Set(box.leaves.map((node) => node.line).filter(Boolean))];
  const kind = { fold: "equal siblings", module: "module", line: "source line", part: "part of a long group" }[box.kind];
  const title = { fold: `${box.children.length} × ${groupTitle(box)}`, line: box.label.split(": ")[0] }[box.kind] || box.label;
  return `<h2>${escapeText(title)}</h2><p class="chips"><span class="chip">${kind}</span><span class="chip">${plural(box.leaves.length, "node")}</span></p>` +
    `<p><button class="wide" data-toggle-key="${escapeText(box.key)}">${box.open ? "Close" : "Open"}</button></p><ul class="counts">${listed}</ul><dl>${costRows(graph, box.leaves)}</dl>` +
    (lines.length ? `<h3>your lines</h3>${lines.slice(0, 5).map(lineHtml).join("")}${lines.length > 5 ? `<p class="note">and ${lines.length - 5} more</p>` : ""}` : "") +
    `<h3>nodes</h3><p>${nodeLinks(box.leaves.map((node) => node.name), 40)}</p>`;
}

function passPanel(graph, k) {
  const stage = graph.stages[k];
  const report = passReport(graph, k);
  const head = `<h2>${escapeText(stage.pass)}</h2>` + (report ? `<p class="chips"><span class="chip">numerics: ${escapeText(report.numerics)}</span><span class="chip">${milliseconds(stage.ms)}</span></p>` : "");
  if (!report) return head + regionsHtml(graph);
  const failed = report.error ? `<p class="refusal"><b>undone</b>: ${escapeText(report.error)}</p>` : "";
  const skipped = report.skipped ? `<p class="note">did not run: ${escapeText(report.skipped)}</p>` : "";
  return head + failed + skipped + rulesHtml(graph, report.rules) + rewritesHtml(graph, k) + regionsHtml(graph);
}

const passReport = (graph, k) => graph.report && graph.report.passes.find((each) => each.name === graph.stages[k].pass);

function rulesHtml(graph, rules) {
  const told = rules.filter((rule) => rule.fired || rule.refused.length);
  const idle = rules.filter((rule) => !rule.fired && !rule.refused.length);
  const rowsHtml = told.map((rule) => `<tr><td>${escapeText(rule.name)}</td><td class="plus">${rule.fired}</td><td>${rule.tried}</td><td class="${rule.refused.length ? "minus" : ""}">${rule.refused.length}</td></tr>`).join("");
  return (told.length ? `<table><tr><th>rule</th><th>fired</th><th>tried</th><th>refused</th></tr>${rowsHtml}</table>` : `<p class="note">No rule fired or refused.</p>`) +
    told.map((rule) => refusalList(graph, rule)).join("") +
    (idle.length ? `<h3>fired 0 times</h3><p class="note">${idle.map((rule) => escapeText(rule.name) + (rule.tried ? ` (tried ${rule.tried})` : "")).join(", ")}</p>` : "");
}

// The refusals of a rule, sentences that differ only in the node they name once.
function refusalList(graph, rule) {
  const sentences = new Map();
  for (const refusal of rule.refused) {
    const key = refusal.why.replace(/\w+/g, (word) => (graph.names.has(word) ? "*" : word));
    sentences.set(key, [...(sentences.get(key) || []), refusal]);
  }
  return [...sentences.values()].map((list) => {
    const nodes = list.map((refusal) => refusal.node).filter(Boolean);
    return `<div class="refusal"><b>${escapeText(rule.name)}</b> did not fire${list.length > 1 ? ` ${list.length} times` : ""}: ${escapeText(list[0].why)} ${nodeLinks(nodes, 5)}${lineHtml(list[0].line)}</div>`;
  }).join("");
}

function rewritesHtml(graph, k) {
  const found = graph.rewrites.filter((rewrite) => rewrite.stage === k);
  if (!found.length) return "";
  const rule = (rewrite) => (rewrite.rule === graph.stages[k].pass ? "" : `${escapeText(rewrite.rule)}: `);
  const line = (rewrite) => `<li>${rule(rewrite)}<a class="rewrite-link" data-rewrite="${graph.rewrites.indexOf(rewrite)}">${namesBrief(rewrite.old)} → ${namesBrief(rewrite.new)}</a></li>`;
  return `<h3>${plural(found.length, "rewrite")}</h3><ul class="rewrites">${found.slice(0, 60).map(line).join("")}</ul>${found.length > 60 ? `<p class="note">and ${found.length - 60} more</p>` : ""}`;
}

function namesBrief(names) {
  if (!names.length) return "nothing";
  return escapeText(names.slice(0, 2).map((name) => (name.length > 30 ? `${name.slice(0, 29)}…` : name)).join(", ") + (names.length > 2 ? ` and ${names.length - 2} more` : ""));
}

function regionsHtml(graph) {
  const regions = graph.report ? graph.report.regions : [];
  if (!regions.length) return "";
  return `<h3>${plural(regions.length, "region")} in the final graph</h3>` + regions.map((region) =>
    `<div class="fused">${nodeLink(region.name)} <span>${escapeText(region.summary)}</span>${costsBrief(region)}${[...new Set(region.lines)].slice(0, 3).map(lineHtml).join("")}</div>`).join("");
}

const costsBrief = (region) => (region.before && region.after ? `<div class="place">${changeHtml(region, "bytes")} moved${region.measured ? `, ${duration(region.measured.ms)}` : ""}</div>` : "");
