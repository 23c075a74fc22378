const pointedAt = new WeakMap();
const shading = new WeakMap();
const LEFT = 40;
const TOP = 34;

export default function (component) {
  const { data, setStateValue, setTriggerValue } = component;
  const { root, stage, tip, refocus } = setUp(component);
  const n = data.heads.length;
  const rowOf = new Map(data.heads.map((id, i) => [id, i]));
  const rows = data.values.map((_, i) => i).filter((i) => data.values[i] !== null);
  const size = data.magnitude ? Math.abs : (v) => v;
  rows.sort((a, b) => size(data.values[b]) - size(data.values[a]) || a - b);
  if (data.lowest) rows.reverse();
  const rank = new Map(rows.map((row, i) => [row, i + 1]));
  let top = clamp(data.top, 1, Math.max(1, n));
  let picked = new Set((data.picked || []).map((id) => rowOf.get(id)).filter((i) => i !== undefined));
  let cursor = rowOf.get(pointedAt.get(root) ?? data.selected) ?? null;

  let log = data.log ?? shading.get(root) ?? false;

  // Linear, or log as in log10(1 + 9x): small values become visible, both ends stay where they are.
  const shade = (value) => {
    if (value === null) return 'nan';
    const size_ = data.high > 0 ? clamp(Math.abs(value) / data.high, 0, 1) : 0;
    const bent = log ? Math.log10(1 + 9 * size_) : size_;
    const share = data.signed ? 0.5 + (Math.sign(value) * bent) / 2 : value < 0 ? 0 : bent;
    return (data.signed ? 'd' : 'q') + Math.round(share * (data.levels - 1));
  };
  const spoken = (i) => [
    data.heads[i],
    `${data.label} ${withError(data.values[i], data.se[i])}`,
    ...(data.null[i] === null ? [] : [`null ${number(data.null[i])}`]),
    ...(rank.has(i) ? [`rank ${whole(rank.get(i))}/${whole(rows.length)}`] : []),
    ...(data.second ? [`${data.second.label} ${number(data.second.values[i])}`] : []),
    ...data.roles[i],
  ];

  const split = make('div', 'split');
  const left = make('div');
  const right = make('div');
  split.append(left, right);
  stage.append(split);
  const said = make('div', 'hidden');
  said.setAttribute('aria-live', 'polite');
  stage.append(said);

  const { svg, cells } = drawGrid();
  const scroll = make('div', 'scroll');
  scroll.append(svg);
  left.append(scroll, legend());
  const ranking = make('ol', 'ranking');
  right.append(slider(), ranking);
  const dots = data.second ? scatter() : [];
  paint();
  refocus();

  function drawGrid() {
    const pitch = clamp(720 / data.columns, 9, 58);
    const tall = Math.min(pitch, clamp(400 / data.layers.length, 24, 58));
    const width = LEFT + data.columns * pitch;
    const height = TOP + data.layers.length * tall;
    const box = draw('svg', {
      viewBox: `0 0 ${width} ${height}`,
      width: '100%',
      style: `max-width:${width}px;min-width:${LEFT + 7 * data.columns}px`,
      tabindex: '0',
      'data-focus': 'grid',
      role: 'application',
      'aria-label': `${data.label} of every head; arrow keys move, ${data.pick ? 'Space or Enter picks' : 'Enter opens'} a head`,
    });
    const hatch = draw('pattern', { id: 'hatch', width: 5, height: 5, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(45)' });
    hatch.append(draw('path', { d: 'M0 0V5', class: 'hatch' }));
    const defs = draw('defs', {});
    defs.append(hatch);
    box.append(defs);
    const line = new Map(data.layers.map((layer, i) => [layer.n, i]));
    box.append(draw('text', { class: 'axis', x: LEFT + (data.columns * pitch) / 2, y: 10, 'text-anchor': 'middle' }, 'head'));
    box.append(draw('text', { class: 'axis', x: LEFT - 8, y: TOP - 8, 'text-anchor': 'end' }, 'layer'));
    const every = Math.max(1, Math.ceil(26 / pitch));
    for (let h = 0; h < data.columns; h += every)
      box.append(draw('text', { class: 'axis', x: LEFT + (h + 0.5) * pitch - 1, y: TOP - 8, 'text-anchor': 'middle' }, h));
    const gap = pitch < 14 ? 1 : 3;
    data.layers.forEach((layer, i) => {
      const y = TOP + i * tall;
      if (i % Math.max(1, Math.ceil(13 / tall)) === 0) {
        const text = draw('text', { class: 'axis', x: LEFT - 8, y: y + tall / 2, 'text-anchor': 'end', 'dominant-baseline': 'central' }, `L${layer.n}`);
        text.append(draw('title', {}, layer.name));
        box.append(text);
      }
      if (layer.refused !== null) {
        const bar = draw('rect', { class: 'nan', x: LEFT, y, width: data.columns * pitch - gap, height: tall - gap });
        bar.append(draw('title', {}, `L${layer.n} not measured: ${layer.refused}`));
        box.append(bar);
      }
    });
    const found = data.heads.map((id, i) => {
      const cell = draw('rect', {
        x: LEFT + data.head[i] * pitch, y: TOP + line.get(data.layer[i]) * tall,
        width: pitch - gap, height: tall - gap, rx: pitch > 20 ? 3 : 1, 'data-i': i,
      });
      box.append(cell);
      return cell;
    });
    data.layers.forEach((layer, i) => {
      if (!(layer.kv > 1 && layer.kv < layer.heads)) return;
      for (let g = 1; g < layer.kv; g += 1) {
        const x = LEFT + (g * layer.heads * pitch) / layer.kv - gap / 2;
        box.append(draw('path', { class: 'rule', d: `M${x} ${TOP + i * tall - gap / 2}v${tall}` }));
      }
    });
    if (data.signed && pitch >= 14) box.append(...signs(found));
    wire(box);
    box.addEventListener('keydown', byKey);
    box.addEventListener('blur', () => (tip.hidden = true));
    return { svg: box, cells: found };
  }

  // Which way a difference goes is not told by its hue alone.
  function signs(cells_) {
    const marked = data.values.map((v, i) => i).filter((i) => Math.abs(data.values[i] ?? 0) > data.high / 10);
    return marked.map((i) => {
      const part = (name) => Number(cells_[i].getAttribute(name));
      const where = { x: part('x') + part('width') / 2, y: part('y') + part('height') / 2 };
      const strong = Math.abs(data.values[i]) > data.high / 2 ? ' strong' : '';
      return draw('text', { class: `sign${strong}`, ...where, 'text-anchor': 'middle', 'dominant-baseline': 'central' }, data.values[i] > 0 ? '+' : '−');
    });
  }

  function wire(box) {
    const at = (event) => (event.target.dataset?.i === undefined ? null : Number(event.target.dataset.i));
    box.addEventListener('pointermove', (event) => {
      const i = at(event);
      if (i === null) tip.hidden = true;
      else showTip(tip, spoken(i), event.clientX, event.clientY);
      if (i !== cursor && i !== null) point(i);
    });
    box.addEventListener('pointerleave', () => (tip.hidden = true));
    box.addEventListener('click', (event) => {
      const i = at(event);
      if (i !== null) take(i, event.shiftKey);
    });
  }

  function take(i, several) {
    if (several || data.pick) toggle(i);
    else setTriggerValue('open', data.heads[i]);
  }

  function toggle(i) {
    if (!picked.delete(i)) picked.add(i);
    paint();
    tell();
  }

  const tell = () => setStateValue('picked', [...picked].map((i) => data.heads[i]));

  function byKey(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const from = cursor ?? rows[0] ?? 0;
    if (event.key === 'Enter') take(from, false);
    if (event.key === ' ') toggle(from);
    if (event.key === 'Escape') tip.hidden = true;
    if (step || event.key === ' ') event.preventDefault();
    if (!step) return;
    const next = cursor === null ? from : rowOf.get(`L${data.layer[from] + step[0]}H${data.head[from] + step[1]}`);
    if (next === undefined) return;
    point(next);
    const box = cells[next].getBoundingClientRect();
    showTip(tip, spoken(next), box.right, box.top);
    said.textContent = spoken(next).join(', ');
  }

  function point(i) {
    const old = cursor;
    cursor = i;
    pointedAt.set(root, data.heads[i]);
    for (const [row, on] of [[old, false], [i, true]]) {
      if (row === null) continue;
      for (const mark of [cells[row], dots[row], ranking.querySelector(`[data-row="${row}"]`)]) mark?.classList.toggle('on', on);
    }
    const above = svg.querySelector('.rule, .sign');
    svg.querySelector('.halo')?.remove();
    svg.insertBefore(cells[i], above);
    svg.insertBefore(ring(cells[i], 'ring halo'), above);
  }

  function paint() {
    const outlined = new Set(rows.slice(0, top));
    const marks = (i) => `${outlined.has(i) ? ' top' : ''}${picked.has(i) ? ' picked' : ''}${i === cursor ? ' on' : ''}`;
    cells.forEach((cell, i) => cell.setAttribute('class', `cell ${shade(data.values[i])}${marks(i)}`));
    svg.querySelectorAll('.ring').forEach((old) => old.remove());
    cells.forEach((cell, i) => marks(i) && svg.append(cell, ring(cell)));
    svg.querySelectorAll('.rule, .sign').forEach((mark) => svg.append(mark));
    dots.forEach((dot, i) => dot?.setAttribute('class', `dot${marks(i)}`));
    list();
  }

  function list() {
    const shown = rows.slice(0, clamp(top, 8, 200));
    const items = shown.map((row, i) => {
      const item = make('li', (i < top ? '' : 'below') + (row === cursor ? ' on' : ''));
      const track = make('div', 'track');
      const bar = make('i');
      bar.style.width = `${data.high ? clamp((100 * Math.abs(data.values[row])) / data.high, 0, 100) : 0}%`;
      track.append(bar);
      item.append(make('span', 'rank', i + 1), make('span', 'id', data.heads[row]), track);
      item.append(make('span', 'num', withError(data.values[row], data.se[row])));
      item.title = data.roles[row].join(', ');
      item.dataset.row = row;
      item.addEventListener('click', (event) => take(row, event.shiftKey));
      item.addEventListener('pointerenter', () => point(row));
      return item;
    });
    ranking.replaceChildren(...items);
  }

  // The slider is logarithmic: small numbers of heads are the interesting ones.
  function slider() {
    const box = make('div', 'slider');
    const label = make('label', '', `${data.magnitude ? 'Largest' : data.lowest ? 'Lowest' : 'Top'} `);
    const output = make('output', '', top);
    label.append(output);
    const input = make('input');
    Object.assign(input, { type: 'range', min: 0, max: 100, step: 1 });
    input.value = n > 1 ? (100 * Math.log(top)) / Math.log(n) : 0;
    input.setAttribute('aria-label', 'Number of heads outlined, logarithmic');
    input.addEventListener('input', () => {
      top = clamp(Math.round(Math.exp((input.value / 100) * Math.log(n))), 1, n);
      output.textContent = top;
      paint();
    });
    input.addEventListener('change', () => setStateValue('top', top));
    box.append(label, input);
    if (data.pick) {
      const act = (text, then) => {
        const button = make('button', '', text);
        button.type = 'button';
        button.dataset.focus = text;
        button.addEventListener('click', () => {
          picked = then();
          paint();
          tell();
        });
        box.append(button);
      };
      act('Take these', () => new Set(rows.slice(0, top)));
      act('None', () => new Set());
    }
    return box;
  }

  function legend() {
    const box = make('div', 'legend');
    const ramp = make('span', 'ramp');
    for (let i = 0; i < data.levels; i += 1) ramp.append(make('i', (data.signed ? 'd' : 'q') + i));
    const scaleKind = make('button', 'quiet');
    const say = () => {
      ramp.querySelectorAll('i').forEach((step, i) => {
        const at = data.signed ? -data.high + (2 * data.high * i) / (data.levels - 1) : (data.high * i) / (data.levels - 1);
        step.className = shade(at);
      });
      scaleKind.textContent = log ? 'log shading' : 'linear shading';
      scaleKind.setAttribute('aria-pressed', String(log));
    };
    scaleKind.type = 'button';
    scaleKind.dataset.focus = 'shading';
    scaleKind.title = 'Shade by log10(1 + 9x) of the share of the highest value, or linearly';
    scaleKind.addEventListener('click', () => {
      log = !log;
      shading.set(root, log);
      if (data.log !== undefined) setStateValue('log', log);
      say();
      paint();
    });
    say();
    box.append(make('span', '', number(data.signed ? -data.high : 0)), ramp, make('span', '', number(data.high)), scaleKind);
    const key = (cls, text) => {
      const item = make('span', 'muted');
      item.append(make('i', cls), ` ${text}`);
      box.append(item);
    };
    key('topbox', data.magnitude ? 'largest' : data.lowest ? 'lowest' : 'top');
    if (picked.size || data.pick) key('pickbox', 'chosen');
    if (data.layers.some((layer) => layer.kv > 1 && layer.kv < layer.heads)) key('kvline', 'kv groups');
    if (data.values.includes(null) || data.layers.some((layer) => layer.refused !== null)) key('nanbox', 'not measured');
    const table = () => [['head', data.name, 'se', 'null', 'rank', 'roles'], ...data.heads.map((id, i) =>
      [id, data.values[i], data.se[i], data.null[i], rank.get(i), data.roles[i].join('; ')])];
    box.append(exports_(`${data.file}-${data.name}`, () => svg, table));
    return box;
  }

  function scatter() {
    const second = data.second;
    const size = [348, 208];
    const pad = { left: 40, right: 8, top: 8, bottom: 34 };
    const ends = (values) => {
      const known = values.filter((v) => v !== null);
      return [Math.min(0, ...known), Math.max(1e-12, ...known)];
    };
    const [x0, x1] = ends(data.values);
    const [y0, y1] = ends(second.values);
    const toX = (v) => pad.left + ((v - x0) / (x1 - x0)) * (size[0] - pad.left - pad.right);
    const toY = (v) => size[1] - pad.bottom - ((v - y0) / (y1 - y0)) * (size[1] - pad.top - pad.bottom);
    const box = draw('svg', {
      viewBox: `0 0 ${size[0]} ${size[1]}`, width: '100%', class: 'scatter', role: 'img',
      'aria-label': `${second.label} against ${data.label}; drag to choose heads`,
    });
    box.append(draw('rect', { class: 'frame', x: pad.left, y: pad.top, width: size[0] - pad.left - pad.right, height: size[1] - pad.top - pad.bottom }));
    const base = size[1] - pad.bottom;
    const texts = [
      [{ x: pad.left, y: base + 14 }, number(x0)], [{ x: size[0] - pad.right, y: base + 14, 'text-anchor': 'end' }, number(x1)],
      [{ x: (pad.left + size[0]) / 2, y: base + 28, 'text-anchor': 'middle' }, data.label],
      [{ x: pad.left - 6, y: base, 'text-anchor': 'end' }, number(y0)], [{ x: pad.left - 6, y: pad.top + 9, 'text-anchor': 'end' }, number(y1)],
      [{ x: 10, y: (pad.top + base) / 2, 'text-anchor': 'middle', transform: `rotate(-90 10 ${(pad.top + base) / 2})` }, second.label],
    ];
    texts.forEach(([where, text]) => box.append(draw('text', { class: 'axis', ...where }, text)));
    const brush = draw('rect', { class: 'brush', visibility: 'hidden' });
    box.append(brush);
    const marks = data.heads.map((_, i) => {
      if (data.values[i] === null || second.values[i] === null) return null;
      const dot = draw('circle', { cx: toX(data.values[i]), cy: toY(second.values[i]), r: n > 300 ? 2.6 : 3.6, 'data-i': i });
      box.append(dot);
      return dot;
    });
    wire(box);
    let start = null;
    const place = (event) => {
      const area = box.getBoundingClientRect();
      return [((event.clientX - area.left) / area.width) * size[0], ((event.clientY - area.top) / area.height) * size[1]];
    };
    box.addEventListener('pointerdown', (event) => {
      if (event.target.dataset?.i !== undefined) return;
      start = place(event);
      box.setPointerCapture(event.pointerId);
    });
    box.addEventListener('pointermove', (event) => {
      if (!start) return;
      const [x, y] = place(event);
      const area = { x: Math.min(x, start[0]), y: Math.min(y, start[1]), width: Math.abs(x - start[0]), height: Math.abs(y - start[1]) };
      for (const [key, value] of Object.entries(area)) brush.setAttribute(key, value);
      brush.setAttribute('visibility', 'visible');
      const inside = (dot) => dot && +dot.getAttribute('cx') >= area.x && +dot.getAttribute('cx') <= area.x + area.width
        && +dot.getAttribute('cy') >= area.y && +dot.getAttribute('cy') <= area.y + area.height;
      picked = new Set(marks.map((dot, i) => (inside(dot) ? i : -1)).filter((i) => i >= 0));
      marks.forEach((dot, i) => dot?.classList.toggle('picked', picked.has(i)));
    });
    box.addEventListener('pointerup', (event) => {
      if (!start) return;
      const [x, y] = place(event);
      if (Math.hypot(x - start[0], y - start[1]) < 3) picked.clear();
      start = null;
      brush.setAttribute('visibility', 'hidden');
      paint();
      tell();
    });
    right.append(box);
    return marks;
  }
}
