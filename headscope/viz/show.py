"""What results show of themselves in a notebook: a static picture and a short table, without a network.

Without matplotlib the table stands alone. Everything stays below ``figure.MAX_HTML`` bytes.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import singledispatch

import pandas as pd

from ..errors import UserError
from ..experiments.results import SweepResult
from ..maps import Maps
from ..rundata import RunData
from ..scores import HeadScores, TokenScores
from ..stats import Stats
from .figure import MAX_HTML, Figure
from .grids import heads
from .lines import curves, profile
from .maps import pattern
from .text import tokens

_ROWS = 10
_MAPS = 3


@singledispatch
def picture(found: object) -> str:
    """HTML of a result, by its type.

    Raises:
        TypeError: For what has no picture.
    """
    raise TypeError(f"Expected a result of headscope; found {type(found).__name__}.")


@picture.register(HeadScores)
def head_scores(found: HeadScores) -> str:
    """The grid of a score and its ten highest heads."""
    title = f"<b>{html.escape(found.name)}</b> (n = {found.n})"
    best = found.to_frame().sort_values(found.name, ascending=False, kind="stable").head(_ROWS)
    return _joined(title, [lambda: heads(found)] if len(best) else [], best)


@picture.register(TokenScores)
def token_scores(found: TokenScores) -> str:
    """The first text shaded by the probe's first number (as lines where the table has no words), and its first rows."""
    first = found.frame[found.frame["sequence"] == found.frame["sequence"].min()]
    numbers = [c for c in ("waad", "fai") if c in first] or [
        c for c in first.select_dtypes("number") if c not in ("sequence", "position", "token_id")
    ][:2]

    def draw() -> Figure:
        if "token" in first:
            return tokens(first, numbers[-1], sequence=int(first["sequence"].iloc[0]))
        return profile(first[["position", *numbers]], found.name)

    return _joined(f"<b>{html.escape(found.name)}</b>", [draw] if numbers and len(first) else [], first.head(_ROWS))


@picture.register(Stats)
def stats(found: Stats) -> str:
    """Mean, lowest and highest head of every statistic held, and the grid of the first."""
    rows = []
    for name in found.names:
        values = found[name]
        at = values.nan_to_num(float("-inf")).argmax().item()
        best = f"L{at // values.shape[1]}H{at % values.shape[1]}"
        known = values[~values.isnan()]
        if known.numel():
            rows.append((name, known.mean().item(), known.min().item(), known.max().item(), best))
    table = pd.DataFrame(rows, columns=["statistic", "mean", "lowest head", "highest head", "which"])
    title = f"<b>{found.n_sequences} texts, {found.n_tokens} tokens</b>"
    columns = f"<br>per token: {html.escape(', '.join(sorted(found.columns)))}" if found.columns else ""
    name = rows[0][0] if rows else ""
    return _joined(title + columns, [lambda: heads(found[name], name)] if rows else [], table.round(4))


@picture.register(Maps)
def maps(found: Maps) -> str:
    """The first maps of the first text."""
    shown = list(found)[:_MAPS]
    title = f"<b>{len(found)} maps</b>" + (f", the first {len(shown)}" if len(found) > len(shown) else "")
    pictures = [lambda h=h: pattern(found[h][:1], name=str(h)) for h in shown]
    return _joined(title, pictures, None)


@picture.register(RunData)
def run(data: RunData) -> str:
    """What a run found, and the grid of its first score."""
    model = html.escape(str(data.info.get("model", {}).get("name", "")))
    title = f"<b>{model}</b>: {len(data.heads)} heads, {len(data.tokens)} tokens"
    rows = [
        (f.get("title"), len(f.get("heads") or []), f.get("threshold"), f.get("null")) for f in data.info["findings"]
    ]
    table = pd.DataFrame(rows, columns=["finding", "heads", "threshold", "null"])
    name = next((c for c in ("mass_first", *data.scores) if c in data.heads), "")
    return _joined(title, [lambda: heads(data.heads, name)] if name else [], table)


@picture.register(SweepResult)
def sweep(result: SweepResult) -> str:
    """The curves of a sweep and their areas."""
    title = f"<b>{html.escape(str(result.folder.name))}</b>: {result.done} of {result.total} cells"
    return _joined(title, [lambda: curves(result)] if len(result.curves()) else [], result.auc().round(4))


def _joined(title: str, pictures: list[Callable[[], Figure]], table: pd.DataFrame | None) -> str:
    body = title
    text = "" if table is None or table.empty else table.to_html(index=False, escape=True)
    for draw in pictures:
        try:
            picture = f"<div>{draw()._repr_html_()}</div>"
        except UserError:  # no matplotlib, or nothing that can be drawn
            continue
        if len((body + picture + text).encode()) < MAX_HTML:
            body += picture
    return body + text
