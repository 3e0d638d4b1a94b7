// The cards above and the list of passes at the side.

function cardsHtml(graph) {
  if (!graph) return "";
  const [first, last] = [stageOf(graph, 0), stageOf(graph, graph.stages.length - 1)];
  const passes = graph.stages.slice(1).reduce((sum, stage) => sum + stage.ms, 0);
  const rules = (graph.report ? graph.report.passes : []).flatMap((each) => each.rules);
  const fired = rules.reduce((sum, rule) => sum + rule.fired, 0);
  const refused = rules.reduce((sum, rule) => sum + rule.refused.length, 0);
  const less = first.order.length - last.order.length;
  return card(`${first.order.length.toLocaleString("en")} → ${last.order.length.toLocaleString("en")}`, "nodes", less ? `${Math.abs(less)} ${less > 0 ? "fewer" : "more"}` : "") +
    card(milliseconds(graph.stages[0].ms), "capture", "") +
    card(milliseconds(passes), "passes", slowest(graph)) +
    card(fired.toLocaleString("en"), "rewrites", "") +
    card(refused.toLocaleString("en"), "refusals", "") +
    card((graph.report ? graph.report.regions.length : 0).toLocaleString("en"), "fused regions", "") + fallback(graph);
}

const card = (value, name, more) => `<div class="card"><b>${value}</b><span>${name}</span><small>${escapeText(more)}</small></div>`;

function slowest(graph) {
  const found = graph.stages.slice(1).reduce((most, stage) => (stage.ms > most.ms ? stage : most), { ms: -1, pass: "" });
  return found.pass && `${found.pass} ${milliseconds(found.ms)}`;
}

function fallback(graph) {
  const refusal = graph.report && graph.report.fallback;
  if (!refusal) return "";
  return `<div class="banner"><b>Compiled by plain Inductor</b>: ${escapeText(refusal.why)} ${escapeText(refusal.line)}</div>`;
}

function passesHtml(graph, chosen, changedOnly) {
  const most = Math.max(...graph.stages.map((stage) => stage.ms), 1e-9);
  const shown = graph.stages.map((stage, k) => [stage, k]).filter(([, k]) => !changedOnly || changedAt(graph, k) || k === chosen);
  return `<div class="side-head"><h2>Passes</h2><label><input type="checkbox" id="changed"${changedOnly ? " checked" : ""}> changed only</label></div><ol>` +
    shown.map(([stage, k]) => passHtml(graph, stage, k, k === chosen, stage.ms / most)).join("") + "</ol>";
}

function passHtml(graph, stage, k, chosen, share) {
  const report = passReport(graph, k);
  const quiet = changedAt(graph, k) ? "" : " quiet";
  return `<li><button class="pass${chosen ? " chosen" : ""}${quiet}" data-stage="${k}"${chosen ? ' aria-current="true"' : ""}>` +
    `<span class="name">${escapeText(stage.pass)}</span><span class="ms">${milliseconds(stage.ms)}</span>` +
    `<span class="what">${what(graph, k, report)}</span><span class="bar"><i style="width:${(100 * share).toFixed(1)}%"></i></span></button></li>`;
}

function what(graph, k, report) {
  const after = stageOf(graph, k).order.length;
  if (k === 0) return plural(after, "node");
  if (report && report.error) return `<span class="minus">undone</span>`;
  if (report && report.skipped) return "did not run";
  const refused = report ? report.rules.reduce((sum, rule) => sum + rule.refused.length, 0) : 0;
  const refusals = refused ? ` · <span class="amber">${refused} refused</span>` : "";
  if (!changedAt(graph, k)) return `unchanged${refusals}`;
  return countsHtml(graph, k) + refusals;
}

// How many nodes stage k took away, made, and gave other arguments.
function countsHtml(graph, k) {
  const marks = [...changesAt(graph, k).values()];
  const count = (kind) => marks.filter((mark) => mark === kind).length;
  const [gone, made, changed] = [count("gone"), count("made"), count("changed") / 2];
  return [gone && `<span class="minus">−${gone}</span>`, made && `<span class="plus">+${made}</span>`, changed && `<span class="amber">~${changed}</span>`].filter(Boolean).join(" ") || "reordered";
}

const CHANGE_NAMES = { gone: "removed", made: "added", changed: "changed" };
const keysHtml = (names) => Object.entries(names).map(([kind, name]) => `<span><i class="key ${kind}"></i>${name}</span>`).join("");
