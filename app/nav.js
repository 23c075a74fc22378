const DOTS = [0.25, 0.5, 0.25, 0.25, 1, 0.5, 0.5, 0.25, 0.25];

export default function (component) {
  const { data, setTriggerValue } = component;
  const { stage } = setUp(component);
  const bar = make('nav');
  bar.setAttribute('aria-label', 'Pages');
  const link = (name, cls) => {
    const a = make('a', cls);
    a.href = `?page=${name}`;
    a.addEventListener('click', (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      if (name !== data.current) setTriggerValue('go', name);
      document.querySelector('[data-testid="stMain"]')?.scrollTo(0, 0);
    });
    return a;
  };
  const mark = link(data.pages[0].name, 'mark');
  const svg = draw('svg', { width: 18, height: 18, viewBox: '0 0 18 18', 'aria-hidden': 'true' });
  DOTS.forEach((opacity, i) => svg.append(draw('rect', { x: (i % 3) * 6.5, y: Math.floor(i / 3) * 6.5, width: 5, height: 5, rx: 1, opacity })));
  mark.append(svg, make('b', '', 'headscope'));
  mark.setAttribute('aria-label', 'headscope: all heads');
  bar.append(mark);
  for (const page of data.pages) {
    const a = link(page.name, 'page');
    a.textContent = page.title;
    if (page.name === data.current) a.setAttribute('aria-current', 'page');
    bar.append(a);
  }
  if (data.runs.length > 1) {
    const label = make('label', 'run', 'Run ');
    const choice = make('select');
    for (const name of data.runs) {
      const option = make('option', '', name);
      option.value = name;
      option.selected = name === data.run;
      choice.append(option);
    }
    choice.addEventListener('change', () => setTriggerValue('run', choice.value));
    label.append(choice);
    bar.append(label);
  }
  stage.append(bar);
  // Back and Forward reopen the view of that address. Streamlit alone would run the page with what was chosen since.
  const went = (event) => {
    event.stopImmediatePropagation();
    setTriggerValue('went', location.search || '?');
  };
  window.addEventListener('popstate', went, true);
  return () => window.removeEventListener('popstate', went, true);
}
