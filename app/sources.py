"""Where a head's queries and keys come from: the run itself if it carries them, else the live model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import streamlit as st
from torch import Tensor

from ..heads import HeadId
from ..kernels.call import AttentionCall
from ..storedmaps import FILE
from . import common, jobs, live, portrait, state, views
from .live import Live
from .passage import Passage
from .shelf import Entry

_BUTTONS = 24
_STORE = "headscope scan --maps HEADS lets a run carry the maps of these heads."

# A call, the number of the head in it, and the log normaliser of each row if it is known.
Part = tuple[AttentionCall, int, Tensor | None]


@dataclass(frozen=True, eq=False)
class Source:
    """One head on one sequence, and how its call is had.

    Attributes:
        key: Stands for origin, sequence and head on the job board.
        tokens: Length of the sequence.
        note: What the footer says about the origin under "Maps"; empty for the live model.
        fetch: Gets the call; this may run the model.
        ready: The call if it is at hand, else None.
    """

    key: tuple
    tokens: int
    note: str
    fetch: Callable[[jobs.Tell], Part]
    ready: Callable[[], Part | None]

    def view(self, tell: jobs.Tell, picture: bool = True) -> views.HeadView:
        """The head ready to be looked at (see `views.build`)."""
        call, head, lse = self.fetch(tell)
        return views.build(call, head, tell, picture, lse)


def find(entry: Entry, model: Live | str, shown: Passage, head: HeadId) -> Source | str:
    """Where to get a head on a sequence from; in a sentence why there is nowhere."""
    if shown.sequence is not None and entry.data.maps.holds(head, shown.sequence):
        return _stored(entry, shown.sequence, len(shown), head)
    if isinstance(model, str):
        return model
    return live.lacking(model, *head) or _live(model, shown.ids, head)


def _stored(entry: Entry, sequence: int, tokens: int, head: HeadId) -> Source:
    maps = entry.data.maps
    files = entry.data.info.get("files")
    stamp = str(files.get(FILE)) if isinstance(files, dict) else ""

    def read() -> Part:
        return maps.call(head, sequence), 0, maps.lse(head, sequence)

    note = f"queries and keys of {head} on sequence {sequence + 1}, stored in the run"
    return Source(("stored", str(maps.path), stamp, sequence, head), tokens, note, lambda tell: read(), read)


def _live(model: Live, ids: Tensor, head: HeadId) -> Source:
    def fetch(tell: jobs.Tell) -> Part:
        return live.capture(model, ids, head.layer, tell), head.head, None

    def ready() -> Part | None:
        call = model.captures.get(live.key_of(ids, head.layer))
        return None if call is None else (call, head.head, None)

    return Source(("live", id(model), *live.key_of(ids, head.layer), head), len(ids), "", fetch, ready)


def view_of(source: Source) -> views.HeadView:
    """The view of a head, without the pooled picture of the whole map unless there is one already.

    A page that asks waits with a progress bar if it takes long.
    """
    whole = jobs.board().find(("view", *source.key))
    if whole is not None and whole.result is not None:
        return whole.result
    return jobs.wait(("rows", *source.key), "Reading the head", lambda tell: source.view(tell, picture=False), "view")


def early_view(source: Source) -> tuple[views.HeadView, jobs.Job | None]:
    """The view of a head, or while it takes long a preview of it with the job that makes the exact one.

    Only the model's own forward is waited for, where one is needed.
    """
    key = ("view", *source.key)
    known = jobs.board().find(key)
    if source.tokens <= views.DIRECT or (known is not None and known.finished.is_set()):
        return jobs.wait(key, "Reading the head", source.view), None
    part = source.ready()
    if part is None:
        jobs.wait(("capture", *key), "Running the model", lambda tell: _reach(source, tell))
        jobs.board().forget(("capture", *key))
        part = source.ready()
    sketch = views.preview(*part)
    _ = sketch.overview  # computed before the exact one is begun, which would make it wait
    return sketch, jobs.board().start(key, "Whole map, pooled", source.view)


def portrait_of(source: Source, view: views.HeadView) -> portrait.Portrait:
    """The head's statistics on the sequence; waits with progress like ``view_of``."""

    def work(tell: jobs.Tell) -> portrait.Portrait:
        tell(0, 1, "Measuring the head")
        return portrait.portray(view)

    return jobs.wait(("portrait", *source.key), "Measuring the head", work)


def offer(entry: Entry, why: str) -> None:
    """Say why a map cannot be drawn, and which ones the run carries, one click away."""
    maps = entry.data.maps
    if not len(maps):
        st.info(common.plain(f"{why} {_STORE}"))
        return
    st.info(common.plain(f"{why} The run carries the maps of these heads:"))
    with st.container(horizontal=True, gap="small"):
        for head in maps.heads[:_BUTTONS]:
            first = next(s for s in maps.sequences if maps.holds(head, s))
            st.button(head, key=f"stored-{head}", on_click=_take, args=(head, first))
    left_out = len(maps) - _BUTTONS
    st.caption(f"and {left_out} more. {_STORE}" if left_out > 0 else _STORE)


def stored_heads(entry: Entry, shown: Passage | None) -> list[str]:
    """The heads whose map of this sequence the run carries."""
    if shown is None or shown.sequence is None:
        return []
    return [h for h in entry.data.maps.heads if entry.data.maps.holds(h, shown.sequence)]


def _take(head: str, sequence: int) -> None:
    state.choose("head", head)
    state.choose("text", str(sequence))


def _reach(source: Source, tell: jobs.Tell) -> None:
    """Capture without a result: a job on the board must not hold on to what may be forgotten."""
    source.fetch(tell)
