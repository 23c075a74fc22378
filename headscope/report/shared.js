// What the report and the dashboard share: elements, numbers as words, outlines and where a tooltip stands.
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

function make(tag, cls, text) {
  const element = document.createElement(tag);
  if (cls) element.className = cls;
  if (text !== undefined) element.textContent = text;
  return element;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const decimals = (size) => (size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
const fixed = (x, places) =>
  x.toLocaleString('en-US', { minimumFractionDigits: places, maximumFractionDigits: places });
const tiny = (x, places) => x.toExponential(places).replace('e+0', '');

function number(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return '–';
  const size = Math.abs(x);
  if (size === 0) return '0';
  return size < 0.001 ? tiny(x, 1) : fixed(x, decimals(size));
}

function withError(x, se) {
  if (x === null || se === null || se === undefined) return number(x);
  const size = Math.max(Math.abs(x), se);
  if (size > 0 && size < 0.001) return `${tiny(x, 1)} ± ${tiny(se, 0)}`;
  return `${fixed(x, decimals(size))} ± ${fixed(se, decimals(size))}`;
}

// The inner one of two tones: an outline between two lines of the page's colour is seen on a cell of any colour.
function ring(cell, cls = 'ring') {
  const part = (name) => Number(cell.getAttribute(name));
  const inset = part('width') < 12 ? 1.2 : 1.6;
  return draw('rect', {
    class: cls, x: part('x') + inset, y: part('y') + inset, rx: 1,
    width: Math.max(0, part('width') - 2 * inset), height: Math.max(0, part('height') - 2 * inset),
  });
}

// Beside the pointer, above it where there is room, and never outside of the window.
function placeTip(tip, x, y) {
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${clamp(x + 14, 4, innerWidth - box.width - 4)}px`;
  tip.style.top = `${y - box.height - 12 < 4 ? y + 20 : y - box.height - 12}px`;
}
