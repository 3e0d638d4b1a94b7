// Text on the page: escaping, measuring, source code in colours.

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escapeText = (text) => String(text).replace(/[&<>"']/g, (c) => ESCAPES[c]);
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

function milliseconds(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 10 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
}

// A short time, with three digits.
const duration = (ms) => (ms >= 0.1 ? `${Number(ms.toPrecision(3))} ms` : `${Number((1000 * ms).toPrecision(3))} µs`);

// `9.29 MB`.
function quantity(n, unit) {
  const [size, prefix] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([least]) => n >= least) || [1, ""];
  return `${Number((n / size).toPrecision(3))} ${prefix}${unit}`;
}

const FONTS = { label: "600 12px ui-sans-serif, system-ui, sans-serif", sub: "11px ui-monospace, monospace" };
const canvas = document.createElement("canvas").getContext("2d");
const widths = new Map();

function widthOf(text, font) {
  const key = font + text;
  if (!widths.has(key)) {
    canvas.font = FONTS[font];
    widths.set(key, canvas.measureText(text).width);
  }
  return widths.get(key);
}

// The text, cut with an ellipsis to at most `most` pixels.
function fitted(text, font, most) {
  if (widthOf(text, font) <= most) return text;
  let [low, high] = [0, text.length];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (widthOf(`${text.slice(0, middle)}…`, font) <= most) low = middle;
    else high = middle - 1;
  }
  return `${text.slice(0, low)}…`;
}

// A text without its middle, where it is long.
function shortened(text, most = 300) {
  return text.length <= most ? text : `${text.slice(0, most - 60)} … ${text.slice(-50)}`;
}

// Dynamo's names of what a module holds as paths: `l_self_modules_tower_modules_0_parameters_weight_` is `tower.0.weight`.
const HELD = /\b[lg]_\w*?_(?:modules|parameters|buffers)_\w*\b/g;
const readable = (text) => text.replace(HELD, (name) => name.replace(/^[lg]_\w*?_(?=(modules|parameters|buffers)_)/, "")
  .replace(/(^|_)(modules|parameters|buffers)_/g, ".").replace(/^\.|_$/g, ""));

const WORDS = {
  py: "and as assert break class continue def del elif else except False finally for from global if import in is lambda None not or pass raise return True try while with yield",
  cpp: "alignas auto bool break case char class const constexpr continue default delete do double else enum extern false float for if inline int int32_t int64_t long namespace new nullptr operator private public return short size_t sizeof static static_cast struct switch template this throw true typedef typename uint8_t unsigned using void while",
};
const COMMENTS = { py: String.raw`#[^\n]*`, cpp: String.raw`\/\/[^\n]*|\/\*[\s\S]*?\*\/|^\s*#\w+` };

// Source code as HTML: comments, strings, numbers and keywords in spans.
function coloured(code, path) {
  const kind = path.endsWith(".py") ? "py" : "cpp";
  const strings = String.raw`"""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'`;
  const parts = new RegExp(
    `(${COMMENTS[kind]})|(${strings})|\\b(\\d[\\w.]*)|\\b(${WORDS[kind].split(" ").join("|")})\\b`, "gm");
  let [html, at] = ["", 0];
  for (const found of code.matchAll(parts)) {
    const name = ["comment", "string", "number", "keyword"][found.slice(1).findIndex((part) => part !== undefined)];
    html += `${escapeText(code.slice(at, found.index))}<span class="c-${name}">${escapeText(found[0])}</span>`;
    at = found.index + found[0].length;
  }
  return html + escapeText(code.slice(at));
}
