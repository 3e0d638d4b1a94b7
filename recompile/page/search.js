// Search over names, operators, modules, values and source lines of the stage on the screen.

const MOST_FOUND = 60;

function searched(stage, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  return stage.order.filter((node) => {
    node.haystack = node.haystack || [node.name, node.target, node.module, node.line, node.value, node.rule].join("\n").toLowerCase();
    return words.every((word) => node.haystack.includes(word));
  });
}

function foundHtml(nodes) {
  if (!nodes.length) return `<p class="note">Nothing found in this stage.</p>`;
  const line = (node) => `<a class="found-row" data-node="${escapeText(node.name)}">` +
    `<i class="key ${node.kind}"></i><b>${escapeText(readable(node.name))}</b> <code>${escapeText(node.value)}</code>` +
    `<small>${escapeText([node.module, node.line].filter(Boolean).join(" · "))}</small></a>`;
  return `<p class="note">${plural(nodes.length, "node")}</p>${nodes.slice(0, MOST_FOUND).map(line).join("")}`;
}
