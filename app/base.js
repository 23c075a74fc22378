const whole = (x) => x.toLocaleString('en-US');

function setUp(component) {
  const root = component.parentElement;
  const stage = root.querySelector('.stage');
  const tip = root.querySelector('.tip');
  // A new message draws everything anew; what had the keyboard gets it back.
  const focused = root.activeElement?.dataset?.focus;
  stage.replaceChildren();
  tip.hidden = true;
  const refocus = () => focused && stage.querySelector(`[data-focus="${focused}"]`)?.focus({ preventScroll: true });
  return { root, stage, tip, refocus };
}

function showTip(tip, parts, x, y, between = ' · ') {
  tip.replaceChildren(make('b', '', parts[0]), parts.length > 1 ? `${between}${parts.slice(1).join(between)}` : '');
  placeTip(tip, x, y);
}

// Called when the page turns light or dark: a colour nobody sees changes, and says so.
function onTheme(root, redraw) {
  const sentinel = root.querySelector('.sentinel');
  sentinel.ontransitionend = redraw;
}

function save(name, blob) {
  const link = make('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const INKED = ['fill', 'stroke', 'stroke-width', 'stroke-dasharray', 'opacity', 'font-size', 'font-family', 'font-weight'];

// A copy of the drawing that looks the same in a file of its own, where no style sheet reaches it.
function standalone(svg) {
  const copy = svg.cloneNode(true);
  const from = svg.querySelectorAll('*');
  copy.querySelectorAll('*').forEach((node, i) => {
    const style = getComputedStyle(from[i]);
    for (const name of INKED) if (style[name]) node.setAttribute(name, style[name]);
    node.removeAttribute('class');
  });
  const box = svg.getBoundingClientRect();
  copy.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  copy.setAttribute('width', box.width);
  copy.setAttribute('height', box.height);
  if (!copy.getAttribute('viewBox')) copy.setAttribute('viewBox', `0 0 ${box.width} ${box.height}`);
  const paper = draw('rect', { x: 0, y: 0, width: '100%', height: '100%', fill: background(svg) });
  copy.prepend(paper);
  return new XMLSerializer().serializeToString(copy);
}

const background = (node) => getComputedStyle(node).getPropertyValue('--st-background-color') || '#ffffff';

function savePng(svg, name) {
  const box = svg.getBoundingClientRect();
  const image = new Image();
  image.onload = () => {
    const canvas = make('canvas');
    canvas.width = box.width * 2;
    canvas.height = box.height * 2;
    canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(`${name}.png`, blob));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone(svg))}`;
}

const quoted = (cell) => (/[",\n]/.test(`${cell}`) ? `"${`${cell}`.replaceAll('"', '""')}"` : `${cell ?? ''}`);

function exports_(name, svg, rows) {
  const box = make('span', 'exports');
  const add = (label, act) => {
    const button = make('button', 'quiet', label);
    button.type = 'button';
    button.setAttribute('aria-label', `Download ${name} as ${label}`);
    button.addEventListener('click', act);
    box.append(button);
  };
  if (rows) {
    add('CSV', () => {
      const text = rows().map((row) => row.map(quoted).join(',')).join('\n');
      save(`${name}.csv`, new Blob([`${text}\n`], { type: 'text/csv' }));
    });
  }
  if (svg) {
    add('PNG', () => savePng(svg(), name));
    add('SVG', () => save(`${name}.svg`, new Blob([standalone(svg())], { type: 'image/svg+xml' })));
  }
  return box;
}
