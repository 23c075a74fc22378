const LEVELS = document.querySelectorAll('#ramp i').length;
const cells = [...document.querySelectorAll('#grid .cell')];
const tip = $('tip');
let cursor = null;

function shade(column, value) {
  if (value === null) return 'nan';
  const low = column.signed ? -column.high : 0;
  const share = column.high > low ? clamp((value - low) / (column.high - low), 0, 1) : 0;
  return (column.signed ? 'd' : 'q') + Math.round(share * (LEVELS - 1));
}

function spoken(row) {
  const column = ranked(byName[state.score]);
  const value = withError(column.values[row], column.se[row]);
  const rank = column.rank.get(row);
  return [value, ...(rank ? [`rank ${rank}/${column.order.length}`] : []), ...data.roles[row]];
}

// The rows that count: the highest first, or the lowest for kinds of heads that are named by a low score.
const order = (column) => (state.low ? [...ranked(column).order].reverse() : ranked(column).order);

function paint() {
  const column = byName[state.score];
  const outlined = new Set(order(column).slice(0, state.top));
  cells.forEach((cell, i) => {
    const marks = (outlined.has(i) ? ' top' : '') + (i === state.head || i === cursor ? ' on' : '');
    cell.setAttribute('class', `cell ${shade(column, column.values[i])}${marks}`);
  });
  // Outlines must not be covered by the neighbours drawn later.
  document.querySelectorAll('#grid .ring').forEach((old) => old.remove());
  cells.forEach((cell, i) => (outlined.has(i) || i === state.head || i === cursor) && cell.parentNode.append(cell, ring(cell)));
  document.querySelectorAll('#grid .rule').forEach((rule) => rule.parentNode.append(rule));
  document.querySelectorAll('#ramp i').forEach((swatch, i) => (swatch.className = (column.signed ? 'd' : 'q') + i));
  $('low').textContent = number(column.signed ? -column.high : 0);
  $('high').textContent = number(column.high);
  $('scale').textContent = column.signed ? 'scale centred at 0' : 'scale starts at 0';
  $('definition').textContent = column.definition;
  $('grid').setAttribute('aria-label', `${column.label} of every head; arrow keys move, Enter shows a head`);
  for (const chip of document.querySelectorAll('.chip')) {
    const on = chip.dataset.score === state.score && (chip.dataset.low === '1') === state.low;
    chip.setAttribute('aria-pressed', String(on));
  }
}

function listRanking() {
  const column = byName[state.score];
  const list = $('ranking');
  const shown = order(column).slice(0, clamp(state.top, 10, 200));
  list.replaceChildren(
    ...shown.map((row, i) => {
      const value = column.values[row];
      const item = make('li', (i < state.top ? '' : 'below') + (row === state.head ? ' on' : ''));
      const track = make('div', 'track');
      const bar = make('i');
      const percent = (x) => `${column.high ? clamp((100 * Math.abs(x)) / column.high, 0, 100) : 0}%`;
      bar.style.width = percent(value);
      track.append(bar);
      item.append(make('span', 'rank', i + 1), make('span', 'id', data.heads[row]), track);
      item.append(make('span', 'num', withError(value, column.se[row])));
      item.title = data.roles[row].join(', ');
      item.addEventListener('click', () => pin(row));
      item.addEventListener('pointerenter', () => point(row));
      item.addEventListener('pointerleave', () => point(null));
      return item;
    }),
  );
  $('topn').textContent = state.top;
  $('end').textContent = state.low ? 'Lowest' : 'Top';
}

function point(row) {
  cursor = row;
  paint();
}

function showTip(row, x, y) {
  tip.replaceChildren(make('b', '', data.heads[row]), ` · ${spoken(row).join(' · ')}`);
  placeTip(tip, x, y);
}

function showCard() {
  const card = $('card');
  card.hidden = state.head === null;
  if (state.head === null) return;
  const row = state.head;
  const title = make('header');
  const close = make('button', 'quiet', 'Close');
  close.addEventListener('click', () => pin(null));
  title.append(make('h3', '', data.heads[row]), make('span', 'muted', data.roles[row].join(' · ')), close);
  const list = make('dl');
  for (const column of data.columns) {
    const rank = ranked(column).rank.get(row);
    const line = make('div');
    const value = make('dd', '', withError(column.values[row], column.se[row]));
    if (rank) value.append(make('small', '', `#${rank}`));
    line.append(make('dt', '', column.label), value);
    list.append(line);
  }
  card.replaceChildren(title, list);
}

function pin(row) {
  state.head = row === state.head ? null : row;
  cursor = null;
  paint();
  listRanking();
  showCard();
  writeHash();
  if (state.head !== null) $('said').textContent = `${data.heads[row]}: ${spoken(row).join(', ')}`;
}

function choose(score, top, low) {
  state.score = score;
  state.low = low;
  state.top = clamp(top ?? state.top, 1, heads);
  $('top').value = toSlider(state.top);
  $('score').value = score;
  paint();
  listRanking();
  writeHash();
}

// The slider is logarithmic: small numbers of heads are the interesting ones.
const heads = data.heads.length;
const fromSlider = (x) => clamp(Math.round(Math.exp((x / 100) * Math.log(heads))), 1, heads);
const toSlider = (n) => (heads > 1 ? (100 * Math.log(n)) / Math.log(heads) : 0);

// As many heads as a finding names for the score, else ten.
const named = (score) => Number(document.querySelector(`.chip[data-score="${score}"][data-low="0"]`)?.dataset.count ?? 10);

function moveByKey(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const from = cursor ?? state.head ?? order(byName[state.score])[0] ?? 0;
  if (event.key === 'Enter' || event.key === ' ') {
    event.preventDefault();
    return pin(from);
  }
  if (event.key === 'Escape') tip.hidden = true;
  if (!step) return;
  event.preventDefault();
  const next = cursor === null ? from : rowOf.get(`L${data.layer[from] + step[0]}H${data.head[from] + step[1]}`);
  if (next === undefined) return;
  point(next);
  const box = cells[next].getBoundingClientRect();
  showTip(next, box.right, box.top);
  $('said').textContent = `${data.heads[next]}: ${spoken(next).join(', ')}`;
}

function startGrid() {
  const grid = $('grid');
  const index = new Map(cells.map((cell, i) => [cell, i]));
  cells.forEach((cell) => cell.replaceChildren()); // the native tooltips, which ours replaces
  grid.setAttribute('tabindex', '0');
  grid.setAttribute('role', 'application');
  grid.addEventListener('pointermove', (event) => {
    const row = index.get(event.target);
    if (row === undefined) tip.hidden = true;
    else showTip(row, event.clientX, event.clientY);
  });
  grid.addEventListener('pointerleave', () => (tip.hidden = true));
  grid.addEventListener('click', (event) => {
    const row = index.get(event.target);
    if (row !== undefined) pin(row);
  });
  grid.addEventListener('keydown', moveByKey);
  grid.addEventListener('focus', () => {
    if (grid.matches(':focus-visible')) point(cursor ?? state.head ?? order(byName[state.score])[0] ?? 0);
  });
  grid.addEventListener('blur', () => {
    tip.hidden = true;
    point(null);
  });
  $('score').addEventListener('change', (event) => choose(event.target.value, named(event.target.value), false));
  $('top').addEventListener('input', (event) => {
    state.top = fromSlider(Number(event.target.value));
    paint();
    listRanking();
    writeHash();
  });
  for (const chip of document.querySelectorAll('.chip')) {
    chip.addEventListener('click', () => {
      choose(chip.dataset.score, Number(chip.dataset.count), chip.dataset.low === '1');
    });
  }
  for (const name of document.querySelectorAll('[data-head]')) {
    name.addEventListener('click', () => {
      state.head = null;
      pin(rowOf.get(name.dataset.head));
      $('heads').scrollIntoView();
    });
  }
  choose(state.score, state.top ?? named(state.score), state.low);
  showCard();
}
