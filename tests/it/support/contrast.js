// The body of a function: every text on the page whose contrast with what lies behind it is below WCAG 2.2's level AA
// (success criterion 1.4.3), as "ratio text". What is disabled is exempt there, and so here.
const channels = (colour) => {
  const [r, g, b, a = 1] = (colour.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  return { r, g, b, a: colour.startsWith("rgb") ? a : 1 };
};
const luminance = ({ r, g, b }) => {
  const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const over = (top, below) => {
  const mix = (t, b) => t * top.a + b * (1 - top.a);
  return { r: mix(top.r, below.r), g: mix(top.g, below.g), b: mix(top.b, below.b), a: 1 };
};
const behind = (element) => {
  const layers = [];
  for (let node = element; node; node = node.parentElement) {
    const colour = channels(getComputedStyle(node).backgroundColor);
    if (colour.a > 0) layers.push(colour);
    if (colour.a === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), { r: 255, g: 255, b: 255, a: 1 });
};
const bad = new Set();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const element = node.parentElement;
  if (!node.data.trim() || !element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
  if (element.closest(":disabled, noscript, script, style, option, title")) continue;
  const style = getComputedStyle(element);
  const svg = element.closest("svg");
  // In the drawings what lies behind a text is the shape of its group, if it has one.
  const shape = svg && element.parentElement.querySelector(":scope > .shape");
  const ground = shape && channels(getComputedStyle(shape).fill).a ? channels(getComputedStyle(shape).fill) : behind(svg ?? element);
  const ink = over(channels(svg ? style.fill : style.color), ground);
  const [high, low] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
  const ratio = (high + 0.05) / (low + 0.05);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  if (ratio < (large ? 3 : 4.5)) bad.add(`${ratio.toFixed(2)} ${element.className.baseVal ?? element.className}: ${node.data.trim().slice(0, 40)}`);
}
return [...bad];
