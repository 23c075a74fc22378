"""Head: everything about one head: what it scores, where it looks on a text, and what its weights could do."""

from __future__ import annotations

import html
import math
from typing import Any

import streamlit as st
from scipy.stats import t as student
from torch import Tensor

from ..heads import HeadId
from ..report.columns import Column, number, with_error
from ..report.findings import Finding
from . import common, components, live, nav, passage, portrait, sources, state, theme
from .live import Live
from .shelf import Entry
from .spectrum import spectra
from .views import HeadView

_POINTS = 480
_AROUND = 26


def draw() -> None:
    """The page."""
    entry = common.open_run()
    cols, found, given = common.scored(entry)
    head, row, (right,) = choose_head(entry, given, more=(11,))
    _links(right.container(horizontal=True, gap="small"), head)
    _card(entry, cols, found, row)
    model = live.open_model(entry, common.parse())
    if isinstance(model, str) and not len(entry.data.maps):
        state.show(run=state.recall("run", None), head=head, **passage.address())
        sources.offer(entry, model)
        common.footer(entry)
        return
    if not isinstance(model, str) and (warning := live.mismatch(entry, model)):
        st.warning(warning)
    theme.section("On this text")
    shown = passage.choose(entry, None if isinstance(model, str) else model)
    state.show(run=state.recall("run", None), head=head, **passage.address())  # before what may take long
    source = _text_part(entry, model, shown, head)
    if not isinstance(model, str) and live.lacking(model, *head) is None:
        _weights(entry, model, head)
        drawn = source is not None and not source.note
        said = f"{model.scope.name}, {shown.label if drawn else 'weights only'}"
    else:
        said = ""
    common.footer(entry, said, source.note if source else "")


def _text_part(entry: Entry, model: Live | str, shown: passage.Passage | None, head: HeadId) -> sources.Source | None:
    """What the head does on a text; where its queries and keys came from if that could be drawn."""
    if shown is None or len(shown) < 2:
        return None
    source = sources.find(entry, model, shown, head)
    if isinstance(source, str):
        sources.offer(entry, source)
        return None
    view = sources.view_of(source)
    _on_text(entry, sources.portrait_of(source, view), view, shown, head)
    return source


def choose_head(entry: Entry, given: list[list[str]], suffix: str = "", more: tuple[int, ...] = ()) -> tuple:
    """The head that is chosen, with its row in the table of heads, under a title; buttons step to its neighbours.

    Args:
        entry: The run.
        given: Roles of each head.
        suffix: Stands behind the head in the title.
        more: Widths of further columns beside the choice; they are returned as well.
    """
    ids = entry.data.heads["head_id"].tolist()
    names = common.head_label(entry, given)
    heading = st.container()
    left, back, forward, *rest = st.columns([8, 2, 2, *(more or (10,))], vertical_alignment="bottom")
    first = next(iter(entry.data.maps.heads), ids[0])
    at = ids.index(state.recall("head", first)) if state.recall("head", first) in ids else 0
    # The steps change the choice before its list is drawn.
    if back.button("Previous", disabled=at == 0, width="stretch"):
        state.choose("head", ids[at - 1])
    if forward.button("Next", disabled=at == len(ids) - 1, width="stretch"):
        state.choose("head", ids[at + 1])
    with left:
        chosen = state.select("Head", "head", ids, ids[at], format_func=names.get)
    row = ids.index(chosen)
    with heading:
        theme.title(chosen + suffix, [("", common.model_name(entry))], mono=True, chips=given[row])
    heads = entry.data.heads
    return HeadId(int(heads["layer"].iloc[row]), int(heads["head"].iloc[row])), row, rest


def _links(place: Any, head: HeadId) -> None:
    if place.button("Map", icon=":material/grid_on:", type="tertiary"):
        nav.go("map")
    if place.button("Text", icon=":material/notes:", type="tertiary"):
        nav.go("text")
    if place.button("Edit", icon=":material/tune:", type="tertiary"):
        state.choose("edit", str(head))
        nav.go("intervene")


def _card(entry: Entry, cols: list[Column], found: list[Finding], row: int) -> None:
    """The findings' scores with interval, null baseline, threshold and rank; then all scores."""
    by_name = {c.name: c for c in cols}
    roles = [f for f in found if f.column in by_name]
    said = {f.get("column"): f for f in entry.data.info["findings"]}
    names = list(dict.fromkeys(f.column for f in roles))
    body = "".join(_score_row(by_name[n], row, said.get(n, {}), _n(entry, said.get(n, {})), True) for n in names)
    titles = ("Score", "", "value", "95 % interval", "null", "threshold", "rank")
    header = f"<tr>{''.join(f'<th>{t}</th>' for t in titles)}</tr>"
    st.html(f'<div class="hs"><table>{header}{body}</table></div>')
    rest = [c for c in cols if c.name not in names]
    with st.expander(f"All {len(cols)} scores"):
        body = "".join(_score_row(c, row, {}, _n(entry, {}), False) for c in rest)
        st.html(f'<div class="hs"><table>{header}{body}</table></div>')
        common.download(
            "CSV", entry.data.heads.iloc[[row]], f"{entry.label}-{entry.data.heads['head_id'].iloc[row]}", "card"
        )
    st.caption(
        "Interval: Student's t around the mean over sequences or trials, with n − 1 degrees of freedom. "
        "Bars start at 0 and end at the highest head; the tick is the null baseline, the line the standard error."
    )


def _n(entry: Entry, finding: dict[str, Any]) -> int:
    n = finding.get("n")
    return n if isinstance(n, int) else int(entry.data.heads["n_sequences"].max())


def _score_row(column: Column, row: int, finding: dict[str, Any], n: int, bar: bool) -> str:
    value, se = column.values[row], column.se[row]
    null = column.null[row] if math.isfinite(column.null[row]) else finding.get("null")
    null = null if isinstance(null, int | float) else math.nan
    threshold = finding.get("threshold")
    rank = column.ranks[row]
    cells = [
        html.escape(column.label),
        _track(column, value, se, null),
        with_error(value, se),
        interval(value, se, n),
        number(null),
        number(threshold) if isinstance(threshold, int | float) else "–",
        f"{rank:,}/{len(column.known):,}" if rank else "–",
    ]
    title = html.escape(column.definition)
    first = f'<td title="{title}">{cells[0]}</td><td class="wide">{cells[1]}</td>'
    return f"<tr>{first}{''.join(f'<td>{c}</td>' for c in cells[2:])}</tr>"


def interval(value: float, se: float, n: int) -> str:
    """The 95 % interval of a mean of n values with this standard error.

    Example:
        >>> interval(0.5, 0.1, 4)
        '0.182 … 0.818'
    """
    if not (math.isfinite(value) and math.isfinite(se)) or n < 2:
        return "–"
    half = student.ppf(0.975, n - 1) * se
    return f"{number(value - half)} … {number(value + half)}"


def _track(column: Column, value: float, se: float, null: float) -> str:
    low, high = column.low, column.high or 1.0

    def share(x: float) -> float:
        return 100 * min(max((x - low) / (high - low), 0.0), 1.0)

    if not math.isfinite(value):
        return ""
    start, end = sorted((share(0.0), share(value)))
    marks = f'<i style="left:{start:.2f}%;width:{end - start:.2f}%"></i>'
    if math.isfinite(se):
        marks += f'<s style="left:{share(value - se):.2f}%;width:{share(value + se) - share(value - se):.2f}%"></s>'
    if math.isfinite(null):
        marks += f'<u style="left:{share(null):.2f}%"></u>'
    return f'<div class="track">{marks}</div>'


def _on_text(entry: Entry, facts: portrait.Portrait, view: HeadView, shown: passage.Passage, head: HeadId) -> None:
    high, above = received_scale(facts.received)
    received, step = thinned(facts.received)
    sink, sink_step = thinned(facts.sink)
    spots, _ = thinned(facts.queries.float())
    some = "" if len(facts.queries) == view.n_rows else f" of {len(facts.queries):,} evenly spaced queries"
    panels = [
        {"title": "How far it looks", "note": f"share of its attention{some}", "kind": "bars", "x": facts.bins,
         "y": common.short(facts.histogram), "xlabel": "distance in tokens, from", "high": 1},
        {"title": "Mass on the first token", "note": f"by query{_pooled(sink_step)}", "kind": "line",
         "x": [f"{p:,.0f}" for p in spots], "y": sink, "xlabel": "query position", "high": 1},
        {"title": "Attention received", "note": f"mean over queries that see it{_pooled(step)}{above}",
         "kind": "line", "x": _positions(len(received), step), "y": received, "xlabel": "key position", "high": high},
    ]  # fmt: skip
    components.plot({"file": f"{entry.label}-{head}", "panels": panels}, "head-plots")
    left, right = st.columns(2, gap="large")
    with left:
        rows = portrait.by_token(facts.received[1:], shown.tokens[1:])
        _words("Tokens it looks at most", "mean attention received; the first token is left out", rows)
    with right:
        late = facts.queries > 1
        asked = [shown.tokens[i] for i in facts.queries[late].tolist()]
        rows = portrait.by_token(facts.strongest[late], asked)
        _words("Tokens that look hardest", "mean of the largest weight on any token but the first", rows)
    theme.section(
        "Examples",
        "Queries (framed) by how strongly the head links them to any token but the first: the strongest, some from the "
        "middle and the weakest. Shading is the weight on each token, log scale from 0 to 1.",
    )
    columns = st.columns(3, gap="large")
    for column, (name, rows) in zip(columns, portrait.examples(facts.strongest, facts.queries).items(), strict=True):
        with column:
            st.html(f'<div class="hs"><h3>{name.capitalize()}</h3></div>')
            for i in rows:
                _example(i, view, shown, facts)


def received_scale(received: Tensor) -> tuple[float | None, str]:
    """Upper end of the scale, None for the highest value, and a word on the first token if it lies far above."""
    first, rest = received[0].item(), received[1:]
    most = rest.max().item() if len(rest) else 0.0
    if first <= 3 * most or most <= 0:
        return None, ""
    return most, f"; first token {number(first)}, off scale"


def thinned(values: Tensor) -> tuple[list[float | None], int]:
    """At most ``_POINTS`` means of neighbours, and of how many each is."""
    step = -(-len(values) // _POINTS)
    return common.short([part.mean().item() for part in values.split(step)]), step


def _pooled(step: int) -> str:
    return f", means of {step:,} neighbours" if step > 1 else ""


def _positions(count: int, step: int) -> list[str]:
    return [f"{i * step:,}" for i in range(count)]


def _words(title: str, note: str, rows: list[tuple[str, float, int]]) -> None:
    high = max((v for _, v, _ in rows), default=0.0) or 1.0
    body = "".join(
        f"<tr><td><code>{html.escape(repr(w))}</code></td><td class='wide'><div class='track'>"
        f"<i style='left:0;width:{100 * v / high:.1f}%'></i></div></td><td>{number(v)}</td><td>{n:,}×</td></tr>"
        for w, v, n in rows
    )
    st.html(f'<div class="hs"><h2>{html.escape(title)}</h2><p>{html.escape(note)}</p><table>{body}</table></div>')


def _example(i: int, view: HeadView, shown: passage.Passage, facts: portrait.Portrait) -> None:
    row = int(facts.queries[i])
    weights = view.exact(range(row, row + 1), range(view.length))[0]
    key = int(facts.strongest_key[i])
    start = max(0, row - _AROUND)
    pieces = []
    if key < start:
        pieces += [_strip(weights, shown, row, range(max(0, key - 4), min(start, key + 5))), "<small> … </small>"]
    pieces.append(_strip(weights, shown, row, range(start, row + 1)))
    said = (
        f"{row:,} {shown.tokens[row]!r} → {key:,} {shown.tokens[key]!r} "
        f"{number(facts.strongest[i].item())} · first token {number(facts.sink[i].item())}"
    )
    st.html(f'<div class="hs"><p>{html.escape(said)}</p><div class="strip">{"".join(pieces)}</div></div>')


def _strip(weights: Tensor, shown: passage.Passage, row: int, span: range) -> str:
    parts = []
    for j in span:
        shade = 78 * math.log10(1 + 9 * min(weights[j].item(), 1.0))
        colour = f"background:color-mix(in srgb, var(--warm) {shade:.0f}%, transparent)"
        mark = "k q" if j == row else "k"
        word = html.escape(shown.tokens[j].replace("\n", "⏎"))
        parts.append(f'<span class="{mark}" style="{colour}" title="{j:,}: {number(weights[j].item())}">{word}</span>')
    return "".join(parts)


def _weights(entry: Entry, model: Live, head: HeadId) -> None:
    found = spectra(model.scope, head)
    theme.section("Weights", "Singular values of what the head could do to any input, largest first.")
    if found is None:
        st.caption("This architecture does not keep its projections as q_proj, k_proj, v_proj and o_proj.")
        return
    notes = ("W_Qᵀ W_K, without rotary embedding", "W_O W_V")
    panels = [
        {"title": title, "note": note, "kind": "bars", "x": [str(i + 1) for i in range(len(values))],
         "y": common.short(values), "xlabel": "singular value"}
        for title, note, values in zip(("Query–key", "Value–output"), notes, found, strict=True)
    ]  # fmt: skip
    components.plot({"file": f"{entry.label}-{head}-weights", "panels": panels}, "head-weights")
