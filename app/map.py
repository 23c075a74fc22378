"""Map: the attention map of one head, from the whole picture down to single tokens."""

from __future__ import annotations

import base64
from typing import Any

import streamlit as st

from ..errors import HeadscopeError
from . import common, components, jobs, live, passage, sources, state
from .head import choose_head
from .shelf import Entry
from .views import SAMPLE, HeadView, Tile, encode

_WORDS = 64
_KEY = "map"


def draw() -> None:
    """The page."""
    entry = common.open_run()
    _, _, given = common.scored(entry)
    head, _, (left, right) = choose_head(entry, given, " map", (9, 4))
    model = live.open_model(entry, common.parse())
    if isinstance(model, str) and not len(entry.data.maps):
        _none(entry, model, str(head))
        return
    with right:
        linear = state.toggle("Linear colours", "linear")
    shown = passage.choose(entry, None if isinstance(model, str) else model, left)
    if shown is None or not len(shown):
        st.write("There is no text to show.")
        return
    source = sources.find(entry, model, shown, head)
    if isinstance(source, str):
        _none(entry, source, str(head))
        return
    if not source.note and (warning := live.mismatch(entry, model)):
        st.warning(warning)
    try:
        view, making = sources.early_view(source)
    except HeadscopeError as error:
        st.error(common.plain(str(error)))
        return
    if making is not None:
        _making(making)
    _board(entry, str(head), shown, view, linear)
    st.caption(
        "Rows are queries, columns keys. A cell of several tokens shows the mean over its queries of the mass on its "
        "keys. Drag or use the arrow keys to move, wheel, double-click or + and − to zoom. The colour scale is fixed."
    )
    live_words = "" if source.note else f"{model.scope.name}, {head}, {shown.label}, {len(shown):,} tokens"
    common.footer(entry, live_words, source.note)


def _none(entry: Entry, why: str, head: str) -> None:
    """The page without a map."""
    state.show(run=state.recall("run", None), head=head, **passage.address())
    sources.offer(entry, why)
    common.footer(entry)


@st.fragment(run_every=1.0)
def _making(job: jobs.Job) -> None:
    """How far the exact picture is; the page is drawn anew once it is there."""
    if job.finished.is_set():
        st.rerun()
    share = job.done / job.total if job.total else 0.0
    text = f"Preview: coarse cells show {SAMPLE} of their queries. Exact picture: {100 * share:.0f} %"
    st.progress(min(share, 1.0), text=text)


@st.fragment
def _board(entry: Entry, head: str, shown: passage.Passage, view: HeadView, linear: bool) -> None:
    limits = _limits(view)
    text = state.recall("view", None)
    tile = view.look(*limits)
    components.matrix(
        {
            "id": f"{head}/{shown.label}/{len(shown)}",
            "file": f"{entry.label}-{head}",
            "rows": view.n_rows,
            "cols": view.length,
            "view": list(limits),
            "tile": _sent(tile),
            "overview": _sent(view.overview),
            "words": _words(tile, shown),
            "linear": linear,
        },
        _KEY,
        view=_moved,
    )
    state.show(
        run=state.recall("run", None), head=head, **passage.address(), view=text, linear=linear,
    )  # fmt: skip


def _limits(view: HeadView) -> tuple[int, int, int, int]:
    """Rows and columns in view, as the address says, inside the map."""
    whole = (0, view.n_rows, 0, view.length)
    text = state.recall("view", None)
    try:
        r0, r1, c0, c1 = (int(x) for x in str(text).split("-"))
    except ValueError:
        return whole
    fits = 0 <= r0 < r1 <= view.n_rows and 0 <= c0 < c1 <= view.length
    return (r0, r1, c0, c1) if fits else whole


def _moved() -> None:
    state.keep("view", "-".join(str(int(x)) for x in st.session_state[_KEY].view))


def _sent(tile: Tile) -> dict[str, Any]:
    h, w = tile.values.shape
    values = base64.b64encode(encode(tile.values)).decode()
    return {
        "r0": tile.r0,
        "r1": tile.r1,
        "c0": tile.c0,
        "c1": tile.c1,
        "cell": tile.cell,
        "sampled": tile.sampled,
        "h": h,
        "w": w,
        "values": values,
    }


def _words(tile: Tile, shown: passage.Passage) -> dict[str, Any] | None:
    if tile.cell > 1 or max(tile.r1 - tile.r0, tile.c1 - tile.c0) > _WORDS:
        return None
    words = [t.replace("\n", "⏎") for t in shown.tokens]
    return {"rows": words[tile.r0 : tile.r1], "cols": words[tile.c0 : tile.c1], "r0": tile.r0, "c0": tile.c0}
