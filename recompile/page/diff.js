// The text of a stage beside the one before: two columns, long unchanged stretches closed.

const CONTEXT = 3;
const MOST_ROWS = 1500;

// The rows of a diff: [left node or null, right node or null, same].
function diffRows(before, after, blocks) {
  const found = [];
  let [a, b] = [0, 0];
  const equal = (until) => { for (; a < until; a += 1, b += 1) found.push([before[a], after[b], true]); };
  for (const [a0, a1, b0, b1] of blocks) {
    equal(a0);
    found.push(...paired(before.slice(a0, a1), after.slice(b0, b1)));
    [a, b] = [a1, b1];
  }
  equal(before.length);
  return found;
}

// Nodes of the same name side by side, the others in between.
function paired(left, right) {
  const place = new Map(right.map((node, j) => [node.name, j]));
  const found = [];
  let [i, j] = [0, 0];
  const fill = (untilI, untilJ) => {
    for (; i < untilI || j < untilJ; i += i < untilI, j += j < untilJ) {
      found.push([i < untilI ? left[i] : null, j < untilJ ? right[j] : null, false]);
    }
  };
  left.forEach((node, k) => {
    const match = place.get(node.name);
    if (match === undefined || match < j) return;
    fill(k, match);
    fill(k + 1, match + 1);
  });
  fill(left.length, right.length);
  return found;
}

// Rows in runs: those near a change are shown, long stretches without one are closed.
function runsOf(rows) {
  const near = new Uint8Array(rows.length);
  rows.forEach(([, , same], i) => {
    if (!same) near.fill(1, Math.max(0, i - CONTEXT), i + CONTEXT + 1);
  });
  const runs = [];
  for (let i = 0; i < rows.length; i += 1) {
    const last = runs[runs.length - 1];
    if (last && last.near === near[i]) last.rows.push(rows[i]);
    else runs.push({ near: near[i], rows: [rows[i]] });
  }
  return runs;
}

function renderDiff(element, graph, k) {
  const stage = stageOf(graph, k);
  if (k === 0 || !changedAt(graph, k)) {
    const why = k === 0 ? "The captured graph" : `${graph.stages[k].pass} changed nothing; the graph`;
    element.innerHTML = `<p class="note">${escapeText(why)}, ${plural(stage.order.length, "node")}.</p><div class="diff single"></div>`;
    fillRuns(element.querySelector(".diff"), [{ near: 1, rows: stage.order.map((node) => [node, null, true]) }], true);
    return;
  }
  const rows = diffRows(stageOf(graph, k - 1).order, stage.order, graph.stages[k].diff);
  element.innerHTML = `<p class="note">${countsHtml(graph, k)} of ${plural(stage.order.length, "node")}</p><div class="diff"></div>`;
  fillRuns(element.querySelector(".diff"), runsOf(rows), false);
}

function fillRuns(table, runs, single) {
  let shown = 0;
  for (const run of runs) {
    const hidden = !run.near && run.rows.length > 2;
    if (hidden) { table.append(closedRun(run.rows, single)); continue; }
    const room = Math.max(0, MOST_ROWS - shown);
    table.append(openRun(run.rows.slice(0, room), single));
    if (run.rows.length > room) table.append(closedRun(run.rows.slice(room), single));
    shown += run.rows.length;
  }
}

function openRun(rows, single) {
  const part = document.createElement("div");
  part.className = "run";
  part.innerHTML = rows.map((row) => diffRow(row, single)).join("");
  return part;
}

function closedRun(rows, single) {
  const button = document.createElement("button");
  button.className = "closed-run";
  button.textContent = `⋯ ${plural(rows.length, single ? "more line" : "line")}${rows[0][2] && !single ? " unchanged" : ""}`;
  button.addEventListener("click", () => button.replaceWith(...chunks(rows).map((part) => openRun(part, single))));
  return button;
}

// Pieces that the browser can leave out while they are off the screen.
function chunks(rows) {
  const found = [];
  for (let k = 0; k < rows.length; k += 200) found.push(rows.slice(k, k + 200));
  return found;
}

function diffRow([left, right, same], single) {
  const both = left && right && !same && left.name === right.name;
  const cell = (node, other, side) => {
    const kind = node ? (same ? "same" : both ? "changed" : side) : "none";
    return `<div class="cell ${kind}"${node ? ` data-name="${escapeText(node.name)}"` : ""}>${node ? codeLine(node, both ? other : null) : ""}</div>`;
  };
  return `<div class="row">${cell(left, right, "gone")}${single ? "" : cell(right, left, "made")}</div>`;
}

const typed = (node) => `${readable(node.name)}${node.value ? `: ${node.value}` : ""} = `;

function lineText(node) {
  if (node.op === "placeholder") return node.parameter ? "weight" : "input";
  return readable(node.text);
}

function codeLine(node, other) {
  const text = lineText(node);
  const line = node.line ? `<span class="where">${escapeText(node.line.split(" ")[0])}</span>` : "";
  const body = other ? emphasized(text, lineText(other)) : escapeText(shortened(text, 400));
  return `${line}<span class="left">${escapeText(typed(node))}</span>${body}`;
}

// What differs between two lines, marked: all but their common beginning and end.
function emphasized(text, other) {
  let [head, tail] = [0, 0];
  const most = Math.min(text.length, other.length);
  while (head < most && text[head] === other[head]) head += 1;
  while (tail < most - head && text[text.length - 1 - tail] === other[other.length - 1 - tail]) tail += 1;
  const end = text.length - tail;
  return `${escapeText(shortened(text.slice(0, head), 200))}<mark>${escapeText(shortened(text.slice(head, end)))}</mark>${escapeText(shortened(text.slice(end), 200))}`;
}
