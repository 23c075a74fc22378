"""Atlas: every head of the model at once, by any score."""

from __future__ import annotations

import math
from typing import Any

import streamlit as st

from ..report.columns import Column
from ..report.findings import Finding
from ..report.palette import LEVELS
from . import common, components, nav, state, theme
from .shelf import Entry

FIRST = ("repeat_induction", "induction_score", "retrieval_score", "sink_rate", "entropy")
_NONE = "none"
_KEY = "atlas"


def draw() -> None:
    """The page."""
    entry = common.open_run()
    cols, found, given = common.scored(entry)
    theme.title(common.model_name(entry), common.facts(entry))
    if not cols:
        st.write("None of this run's scores holds a number, so there is nothing to colour the heads by.")
        state.show(run=state.recall("run", None))
        common.footer(entry)
        return
    by_name = {c.name: c for c in cols}
    score, second = _choose(cols, found)
    column = by_name[score]
    counts = {f.column: f.count for f in found if f.count}
    top = int(state.recall("top", counts.get(score) or 10, state.between(1, len(entry.data.heads))))
    log = state.recall("shade", None) == "log"
    st.caption(common.plain(column.definition) or " ")
    data = grid_data(entry, column, given) | {
        "top": top,
        "lowest": state.recall("lowest", False, lambda t: t == "1"),
        "picked": picked(entry),
        "log": log,
        "second": None if second == _NONE else _second(by_name[second]),
        "selected": state.recall("head", None),
    }
    result = components.grid(data, _KEY, open=_opened, top=_topped, picked=_picked, log=_shaded)
    if result.open:
        nav.go("head")
    _chosen(entry, cols)
    state.show(
        run=state.recall("run", None),
        score=score,
        second=None if second == _NONE else second,
        top=top,
        lowest=state.recall("lowest", False),
        picked=",".join(picked(entry)),
        shade="log" if log else None,
    )
    _refused(entry)
    common.footer(entry)


def grid_data(entry: Entry, column: Column, given: list[list[str]]) -> dict[str, Any]:
    """What the grid drawing needs to know of a run and one of its scores."""
    heads = entry.data.heads
    return {
        "file": entry.label,
        "name": column.name,
        "label": column.label,
        "heads": heads["head_id"].tolist(),
        "layer": [int(v) for v in heads["layer"]],
        "head": [int(v) for v in heads["head"]],
        "columns": int(heads["head"].max()) + 1,
        "layers": layer_rows(entry),
        "values": common.short(column.values),
        "se": common.short(column.se),
        "null": common.short(column.null),
        "high": column.high,
        "signed": column.signed,
        "levels": LEVELS,
        "roles": given,
        "picked": [],
        "second": None,
        "selected": None,
        "lowest": False,
        "magnitude": False,
        "pick": False,
        "top": 10,
    }


def layer_rows(entry: Entry) -> list[dict[str, Any]]:
    """Layers in order, with their kv heads and, for those that were not measured, why."""
    info, heads = entry.data.info, entry.data.heads
    refused = {e["layer"]: str(e.get("reason", "")) for e in info["refused"] if isinstance(e.get("layer"), int)}
    measured = set(heads["layer"].tolist())
    modules = info["model"]["layers"]
    rows = []
    for n in sorted(measured | set(refused)):
        module = modules[n] if n < len(modules) else {}
        rows.append(
            {
                "n": int(n),
                "name": str(module.get("name") or ""),
                "heads": _int(module.get("heads")),
                "kv": min(_int(module.get("kv_heads")), int(heads["head"].max()) + 1),
                "refused": refused[n] if n in refused and n not in measured else None,
            }
        )
    return rows


def picked(entry: Entry) -> list[str]:
    """The heads chosen by brushing or shift-click, as far as this run has them."""
    known = set(entry.data.heads["head_id"])
    said = state.recall("picked", [], lambda text: text.split(","))
    return [h for h in said if h in known]


def _choose(cols: list[Column], found: list[Finding]) -> tuple[str, str]:
    names = [c.name for c in cols]
    labels = {c.name: c.label for c in cols} | {_NONE: "none"}
    first = next((n for n in FIRST if n in names), names[0])
    left, middle, right = st.columns([2, 2, 6])
    with left:
        score = state.select("Score", "score", names, first, format_func=labels.get, on_change=_forget_top)
    with middle:
        other = next((n for n in ("entropy", "sink_rate") if n in names and n != score), _NONE)
        second = state.select("Second score", "second", [_NONE, *names], other, format_func=labels.get)
    counted = [f for f in found if f.count]
    with right:
        lowest = state.recall("lowest", False, lambda t: t == "1")
        active = next((i for i, f in enumerate(counted) if f.column == score and f.lowest == lowest), None)
        key = f"kinds-{names.index(score)}-{lowest}"
        words = [common.plain(f"{f.role} {f.count}") for f in counted]  # labels of buttons read Markdown
        st.pills(
            "Kinds of heads", range(len(counted)), default=active, key=key, format_func=words.__getitem__,
            on_change=_kind, args=(key, counted),
        )  # fmt: skip
    return score, second


def _kind(key: str, counted: list[Finding]) -> None:
    picked = st.session_state[key]
    if picked is None:
        return
    state.choose("score", counted[picked].column)
    state.choose("top", counted[picked].count)
    state.choose("lowest", counted[picked].lowest)


def _forget_top() -> None:
    state.forget("top")
    state.choose("lowest", False)


def _second(column: Column) -> dict[str, Any]:
    return {"label": column.label, "values": common.short(column.values)}


def _opened() -> None:
    state.choose("head", st.session_state[_KEY].open)


def _topped() -> None:
    state.choose("top", int(st.session_state[_KEY].top))


def _shaded() -> None:
    state.choose("shade", "log" if st.session_state[_KEY].log else None)


def _picked() -> None:
    state.choose("picked", list(st.session_state[_KEY].picked or []))


def _chosen(entry: Entry, cols: list[Column]) -> None:
    """What can be done with heads that were brushed; without any, how to choose some."""
    names = picked(entry)
    left, right = st.columns([7, 4], vertical_alignment="center")
    buttons = right.container(horizontal=True, horizontal_alignment="right")
    if names:
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        left.markdown(f"**{len(names)} chosen** · {common.plain(', '.join(names[:12]))}{more}")
        if buttons.button("Edit these heads", icon=":material/tune:", type="tertiary"):
            state.choose("edit", ",".join(names))
            nav.go("intervene")
    else:
        left.caption("Click a head to open it. Drag in the scatter, or shift-click, to choose several.")
    with buttons:
        frame = entry.data.heads
        shown = frame[frame["head_id"].isin(names)] if names else frame
        common.download("CSV of all scores", shown, f"{entry.label}-heads", "atlas-csv")


def _refused(entry: Entry) -> None:
    refused = entry.data.info["refused"]
    if refused:
        with st.expander(f"Not measured: {len(refused)} module{'' if len(refused) == 1 else 's'}"):
            for r in refused:
                st.text(f"{r.get('name', '')}  {r.get('reason', '')}")


def _int(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else 0
