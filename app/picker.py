"""Choosing heads for an edit: the highest of any score, or one by one in the grid."""

from __future__ import annotations

import streamlit as st

from ..errors import HeadscopeError
from ..heads import parse_heads
from ..report.columns import Column
from . import atlas, common, components, state
from .shelf import Entry

_KEY = "pick"


def draw(entry: Entry, heads: str) -> None:
    """The grid of a score, in which clicks choose heads; what is chosen becomes the text of the edit."""
    cols, _, given = common.scored(entry)
    if not cols:
        return
    by_name = {c.name: c for c in cols}
    first = next((n for n in atlas.FIRST if n in by_name), cols[0].name)
    with st.expander("Pick heads: by a score, or by clicking", icon=":material/grid_view:"):
        column = by_name[state.select("Score", "pickscore", list(by_name), first, format_func=_words)]
        data = atlas.grid_data(entry, column, given) | {"pick": True, "picked": named(entry, heads), "top": 4}
        components.grid(data, _KEY, picked=_picked)
        st.caption("Click heads, or choose how many of the highest and take these. Arrow keys and Space do the same.")


def named(entry: Entry, heads: str) -> list[str]:
    """The heads that a text names, as far as the run has them and the text can be read."""
    table = entry.data.heads
    sizes = table.groupby("layer")["head"].max()
    per_layer = [int(sizes.get(n, -1)) + 1 for n in range(int(table["layer"].max()) + 1)]
    try:
        found = {str(h) for h in parse_heads(heads, per_layer)}
    except HeadscopeError:
        return []
    return [h for h in table["head_id"] if h in found]


def first_heads(cols: list[Column], entry: Entry, score: str, count: int) -> list[str]:
    """The first heads of a ranking; of the table if there is no score with this name."""
    ids = entry.data.heads["head_id"].tolist()
    order = next((c.order for c in cols if c.name == score), range(len(ids)))
    return [ids[i] for i in order[:count]]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _picked() -> None:
    state.choose("edit", ",".join(st.session_state[_KEY].picked or []))
