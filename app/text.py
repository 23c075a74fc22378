"""Text: the tokens of a sequence, shaded by attention, with lines from where a head looks to where it is looked at."""

from __future__ import annotations

import base64
from typing import Any

import streamlit as st

from ..heads import HeadId
from . import common, components, live, passage, sources, state, theme
from .live import Live
from .shelf import Entry
from .spans import bands
from .views import HeadView, encode

WINDOW = 320
SINK = 0.3  # a token is called a sink if it gets this much of the attention of the tokens that may see it
_ALL = "all heads"
_KEY = "text"


def draw() -> None:
    """The page."""
    entry = common.open_run()
    _, _, given = common.scored(entry)
    model = live.open_model(entry, common.parse())
    usable = None if isinstance(model, str) else model
    theme.title("Text", [("", common.model_name(entry))])
    left, middle = st.columns([4, 3], vertical_alignment="bottom")
    shown = passage.choose(entry, usable, left)
    with middle:
        names = common.head_label(entry, given) | {_ALL: "all heads, mean"}
        options = [_ALL, *(entry.data.heads["head_id"] if usable else sources.stored_heads(entry, shown))]
        chosen = _head(options, names)
    if isinstance(model, str):
        st.info(common.plain(f"{model} {_without_model(options[1:])}"))
    if shown is None or not len(shown):
        st.write("This run holds no tokens.")
        common.footer(entry)
        return
    start = _window(len(shown))
    mode, log, hide, marks = _switches(chosen != _ALL)
    state.show(
        run=state.recall("run", None), **passage.address(), head=None if chosen == _ALL else chosen,
        start=start or None, mode=mode if mode != "received" else None, log=log, hide=hide,
        token=state.recall("token", None), marks=None if marks else "0",
    )  # fmt: skip
    source = None if chosen == _ALL else sources.find(entry, model, shown, _id(entry, chosen))
    if isinstance(source, str):
        sources.offer(entry, source)
        common.footer(entry)
        return
    data = (
        _data(shown, start, mode, log, hide) | {"marks": marks} | {"file": f"{entry.label}-{chosen.replace(' ', '-')}"}
    )
    if source is not None:
        _add_head(data, entry, model, source, start)
    elif shown.frame is None:
        st.info("Choose a head: the mean over all heads is known for the run's own sequences only.")
    components.text(data, _KEY, token=_pinned)
    with st.container(horizontal=True, horizontal_alignment="right"):
        if shown.frame is not None:
            common.download("CSV of all tokens", shown.frame, f"{entry.label}-tokens", "text-csv")
    stored = "" if source is None else source.note
    common.footer(entry, f"{usable.scope.name}, {chosen}" if source is not None and not stored else "", stored)


def _without_model(stored: list[str]) -> str:
    """What can be drawn all the same."""
    if not stored:
        return "Attention received comes from the run; lines need the model, or a run made with --maps."
    return f"Attention received comes from the run, lines too for the heads it carries: {', '.join(stored)}."


def _head(options: list[str], names: dict[str, str]) -> str:
    """The head that the other pages show; a choice of its own, for "all heads" is no head to remember for them."""
    said = state.recall("head", _ALL)
    state.choose("texthead", said if said in options else _ALL)
    chosen = state.select("Head", "texthead", options, _ALL, format_func=names.get)
    if chosen == _ALL:
        state.forget("head")
    else:
        state.choose("head", chosen)
    return chosen


def _window(length: int) -> int:
    """First token of the window that is shown; a choice where the text is longer than one window."""
    if length <= WINDOW:
        return 0
    starts = list(range(0, length, WINDOW))
    return state.select(
        f"Window of {WINDOW} tokens", "start", starts, 0,
        format_func=lambda s: f"tokens {s:,}–{min(s + WINDOW, length) - 1:,}",
    )  # fmt: skip


def _switches(has_map: bool) -> tuple[str, bool, bool, bool]:
    mode, hide = "received", False
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        if has_map:
            mode = state.segmented(
                "Shade by attention", "mode", ["received", "given"], "received", label_visibility="collapsed",
                format_func=lambda m: f"attention {m}", width="content",
            )  # fmt: skip
        log = state.toggle("Log shading", "log", width="content")
        if has_map:
            hide = state.toggle("Hide sink", "hide", width="content")
        marks = state.toggle("Preplan and anchor marks", "marks", True, width="content")
    return mode, log, hide, marks


def _data(shown: passage.Passage, start: int, mode: str, log: bool, hide: bool) -> dict[str, Any]:
    stop = min(start + WINDOW, len(shown))
    cut = slice(start, stop)
    n = stop - start
    rows = None if shown.frame is None else shown.frame.iloc[cut]
    owner, names = bands(shown.tokens)
    pinned = state.recall("token", None, int)

    def column(name: str) -> list[float | None]:
        return [None] * n if rows is None else common.short(rows[name].astype(float))

    return {
        "tokens": shown.tokens[cut],
        "special": [int(s) for s in shown.special[cut]],
        "start": start,
        "labels": ["none"] * n if rows is None else [str(v) for v in rows["label"]],
        "waad": column("waad"),
        "fai": column("fai"),
        "entropy": column("entropy_next"),
        "received": column("received_mean"),
        "bands": owner[cut],
        "bandNames": names,
        "map": None,
        "before": [0.0] * n,
        "sinks": [],
        "full": False,
        "mode": mode,
        "log": log,
        "hide": hide,
        "pinned": None if pinned is None else pinned - start,
    }


def _id(entry: Entry, chosen: str) -> HeadId:
    row = entry.data.heads.set_index("head_id").loc[chosen]
    return HeadId(int(row["layer"]), int(row["head"]))


def _add_head(data: dict[str, Any], entry: Entry, model: Live | str, source: sources.Source, start: int) -> None:
    """One head's part of the picture: its map inside the window, and what lies before it."""
    if not source.note and (warning := live.mismatch(entry, model)):
        st.warning(warning)
    view = sources.view_of(source)
    facts = sources.portrait_of(source, view)
    span = range(start, min(start + WINDOW, source.tokens))
    data |= window_map(view, span)
    data["received"] = common.short(facts.received[span.start : span.stop])
    data["sinks"] = [i for i, v in enumerate(data["received"]) if v is not None and v > SINK and i + 10 < len(span)]
    if not data["sinks"] and start == 0:
        data["sinks"] = [0]
    if start:
        data["outside"] = common.short(view.exact(span, range(1))[:, 0])


def window_map(view: HeadView, span: range) -> dict[str, Any]:
    """The map of a window as the browser reads it, and the mass of each row that lies before the window."""
    before = view.exact(span, range(span.start), (len(span), 1))[:, 0] if span.start else None
    return {
        "map": base64.b64encode(encode(view.exact(span, span))).decode(),
        "before": [0.0] * len(span) if before is None else common.short(before),
        "full": not view.call.visible.is_causal,
    }


def _pinned() -> None:
    state.choose("token", st.session_state[_KEY].token)
