// Texts whose contrast with what is behind them is below 4.5 to 1 (WCAG 2.2, 1.4.3).
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const over = (top, under) => [0, 1, 2].map((i) => (top[i] * top[3] + under[i] * (255 - top[3])) / 255);
function ground(element) {
  if (!element) return [255, 255, 255];
  const own = rgba(getComputedStyle(element).backgroundColor);
  return own[3] === 255 ? own : over(own, ground(element.parentElement));
}
function contrast(a, b) {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
}
const selector = ".pass span, .card *, #panel dt, #panel dd, #panel a, .chip, .refusal, #tools button, #legend span, .caption";
const low = [...document.querySelectorAll(selector)]
  .filter((e) => e.offsetParent && contrast(rgba(getComputedStyle(e).color), ground(e)) < 4.5)
  .map((e) => `${e.className} ${e.textContent.slice(0, 30)}`);
for (const box of document.querySelectorAll(".box")) {
  const face = rgba(getComputedStyle(box.querySelector(".face:not(.behind)")).fill);
  for (const text of box.querySelectorAll(":scope > .label, :scope > .sub")) {
    if (contrast(rgba(getComputedStyle(text).fill), face) < 4.5) low.push(text.textContent);
  }
}
return low;
