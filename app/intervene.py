"""Intervene: edit heads and see what changes, side by side."""

from __future__ import annotations

import html
from typing import Any

import pandas as pd
import streamlit as st

from ..errors import HeadscopeError
from ..report.columns import Column, number
from . import atlas, common, components, jobs, live, nav, picker, scoring, state, theme
from .effects import STATS, Effect, measure
from .live import Live
from .shelf import Entry
from .techniques import TECHNIQUES, call, command_code, python_code

_PROMPT = "Anna found a red key. Ben found a blue cup. Anna found a red key. Ben found a"
_KEY = "effect"


def draw() -> None:
    """The page."""
    entry = common.open_run()
    theme.title("Intervene", [("", common.model_name(entry))])
    model = live.open_model(entry, common.parse())
    if isinstance(model, str) or model.scope.tokenizer is None:
        st.info(
            common.plain(model if isinstance(model, str) else "This model has no tokenizer, so no prompt can be read.")
        )
        common.footer(entry)
        return
    if warning := live.mismatch(entry, model):
        st.warning(warning)
    left, right = st.columns(2, gap="large")
    with left:
        heads = _heads(entry)
        name, strength = _technique()
    with right:
        prompt, length = _prompt(model)
    picker.draw(entry, heads)
    task = scoring.chosen()
    state.show(
        run=state.recall("run", None), edit=heads, technique=name,
        strength=f"{strength:g}" if TECHNIQUES[name].strength else None, prompt=prompt, tokens=length,
        task=task, statistic=state.recall("statistic", None), pickscore=state.recall("pickscore", None),
    )  # fmt: skip
    if not heads.strip() or not prompt.strip():
        st.write("Name at least one head, and write a prompt.")
        common.footer(entry)
        return
    try:
        edit = TECHNIQUES[name].build(",".join(map(str, model.scope.heads(heads))), strength)
        scoring.give_up_others(model, edit)
        effect = _effect(model, prompt, edit, length)
    except HeadscopeError as error:
        st.error(common.plain(str(error)))
        common.footer(entry)
        return
    _texts(effect)
    left, right = st.columns(2, gap="large")
    with left:
        _next_tokens(entry, model, effect)
    with right:
        copies(entry, edit, prompt, length, task)
    _statistics(entry, effect)
    place = st.container()
    common.footer(entry, f"{model.scope.name}, {call(edit)}, {len(effect.tokens):,} tokens, greedy")
    with place:  # last, for the page ends here while a task is being scored
        scoring.draw(model, edit)


def _heads(entry: Entry) -> str:
    """The heads to edit, as text; the first ones of the run's first score by default."""
    cols, _, _ = common.scored(entry)
    names = {c.name for c in cols}
    first = next((n for n in (*atlas.FIRST, *names) if n in names), "")
    default = ",".join(picker.first_heads(cols, entry, first, 4))
    note = "L5H1, 5.1, L5H0-3, L5H*, L5KV1, with commas between; or pick them in the grid below"
    return state.line("Heads", "edit", default, help=note, max_chars=5_000)


def _technique() -> tuple[str, float]:
    names = list(TECHNIQUES)
    name = state.select(
        "Technique", "technique", names, names[0], format_func=lambda n: TECHNIQUES[n].label,
        on_change=state.forget, args=("strength",),
    )  # fmt: skip
    how = TECHNIQUES[name]
    if not how.strength:
        return name, 0.0
    low, high, usual, step = map(float, (how.low, how.high, how.usual, how.step))
    return name, state.slider(how.strength.capitalize(), "strength", low, high, usual, step=step)


def _prompt(model: Live) -> tuple[str, int]:
    prompt = state.area("Prompt", "prompt", _PROMPT, height=122, max_chars=20_000)
    return prompt, state.slider("Tokens to generate", "tokens", 1, 128, 32)


def _effect(model: Live, prompt: str, edit: Any, length: int) -> Effect:
    key = ("effect", id(model), prompt, repr(edit), length)
    return jobs.wait(key, "Without the edit", lambda tell: measure(model, prompt, edit, length, tell), "effect")


def _texts(effect: Effect) -> None:
    before, after = effect.before, effect.after
    left, right = st.columns(2, gap="large")
    prompt = f'<span class="prompt">…{html.escape("".join(effect.tokens[-24:]))}</span>'
    with left:
        theme.section("Without the edit", f"loss on the prompt {number(before.loss)} nats per token")
        said = html.escape("".join(before.text))
        st.html(f'<div class="hs"><div class="generated">{prompt}{said}</div></div>')
    with right:
        change = after.loss - before.loss
        theme.section("With the edit", f"loss on the prompt {number(after.loss)} nats per token ({change:+.3f})")
        st.html(f'<div class="hs"><div class="generated">{prompt}{marked(before.text, after.text)}</div></div>')


def marked(before: list[str], after: list[str]) -> str:
    """The second text as HTML, everything from the first difference on marked."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    rest = html.escape("".join(after[same:]))
    return html.escape("".join(after[:same])) + (f"<mark>{rest}</mark>" if rest else "")


def _next_tokens(entry: Entry, model: Live, effect: Effect) -> None:
    theme.section("Next token", f"Kullback–Leibler divergence {number(effect.divergence())} nats.")
    rows = effect.next_tokens()
    words = {i: model.scope.tokenizer.decode([i]) for i, _, _ in rows}
    body = "".join(
        f"<tr><td><code>{html.escape(repr(words[i]))}</code></td><td class='wide'>{_bar(p)}{_bar(q, True)}</td>"
        f"<td>{number(p)}</td><td>{number(q)}</td><td>{q - p:+.3f}</td></tr>"
        for i, p, q in rows
    )
    names = "<th><i class='swatch'></i>without</th><th><i class='swatch edited'></i>with</th>"
    head = f"<tr><th>Token</th><th></th>{names}<th>change</th></tr>"
    st.html(f'<div class="hs"><table>{head}{body}</table></div>')
    frame = pd.DataFrame([(i, words[i], p, q) for i, p, q in rows], columns=["id", "token", "without", "with"])
    common.download("CSV of these tokens", frame, f"{entry.label}-next-tokens", "next-csv")


def _bar(share: float, edited: bool = False) -> str:
    colour = ";background:var(--warm)" if edited else ""
    bar = f'<i style="left:0;width:{100 * share:.1f}%{colour}"></i>'
    return f'<div class="track" style="height:5px;margin:1px 0">{bar}</div>'


def copies(entry: Entry, edit: Any, prompt: str, length: int, task: str) -> None:
    """The same edit as Python, YAML and a command."""
    theme.section("The same edit elsewhere")
    as_python, as_yaml, as_command = st.tabs(["Python", "YAML", "Command line"])
    model = live.reference(entry, common.parse())
    as_python.code(python_code(model, edit, prompt, length), language="python", wrap_lines=True)
    as_yaml.code(edit.to_yaml(), language="yaml")
    as_command.code(command_code(model, edit, task), language="sh", wrap_lines=True)


def _statistics(entry: Entry, effect: Effect) -> None:
    """Every head's statistic, after minus before; of the run's heads only, so that the grid is the run's."""
    theme.section(
        "What other heads do now",
        "Difference of a statistic of every head on the prompt, with minus without the edit. Statistics are those of "
        "the map that a head's queries and keys give; what is done to the edited head's own map is not in them.",
    )
    name = state.select("Statistic", "statistic", list(STATS), "entropy", format_func=lambda n: n.replace("_", " "))
    before, after = effect.before.stats[name], effect.after.stats[name]
    heads = entry.data.heads
    values = []
    for layer, head in zip(heads["layer"], heads["head"], strict=True):
        inside = layer < before.shape[0] and head < before.shape[1]
        values.append((after[layer, head] - before[layer, head]).item() if inside else float("nan"))
    lack = [float("nan")] * len(values)
    column = Column(f"{name} difference", "", [0.0 if abs(v) < 1e-6 else v for v in values], lack, lack)
    ids = heads["head_id"].tolist()
    data = atlas.grid_data(entry, column, [[] for _ in ids]) | {"signed": True, "top": 5, "magnitude": True}
    result = components.grid(data, _KEY, open=_opened)
    if result.open:
        nav.go("head")


def _opened() -> None:
    state.choose("head", st.session_state[_KEY].open)
