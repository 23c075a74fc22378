const root = document.documentElement;
root.classList.add('scripted');
const data = JSON.parse(document.getElementById('data').textContent);
const byName = Object.fromEntries(data.columns.map((c) => [c.name, c]));
const rowOf = new Map(data.heads.map((id, i) => [id, i]));
const $ = (id) => document.getElementById(id);
// Rows from the highest value to the lowest, and each row's rank; computed once per score.
function ranked(column) {
  if (!column.order) {
    const rows = column.values.map((_, i) => i).filter((i) => column.values[i] !== null);
    column.order = rows.sort((a, b) => column.values[b] - column.values[a] || a - b);
    column.rank = new Map(column.order.map((row, i) => [row, i + 1]));
  }
  return column;
}

const state = { score: $('score').value, top: null, low: false, head: null };

function readHash() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (byName[asked.get('score')]) state.score = asked.get('score');
  state.low = asked.has('low');
  if (rowOf.has(asked.get('head'))) state.head = rowOf.get(asked.get('head'));
  const top = parseInt(asked.get('top'), 10);
  if (top > 0) state.top = Math.min(top, data.heads.length);
}

function writeHash() {
  const said = new URLSearchParams({ score: state.score, top: state.top });
  if (state.low) said.set('low', '');
  if (state.head !== null) said.set('head', data.heads[state.head]);
  try {
    history.replaceState(null, '', `#${said}`);
  } catch {
    // Some viewers of single files forbid it; the page works without.
  }
}
