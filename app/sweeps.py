"""Sweeps: what is lost as heads are removed, with bands, while it runs and afterwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from ..errors import HeadscopeError
from ..experiments import locks
from ..experiments.compare import compare_auc, what_differs
from ..experiments.results import SweepResult
from ..experiments.store import WORKERS
from ..report.columns import number
from . import begin, common, components, launch, nav, shelf, state, theme
from .effectmap import effect_grid

WORDS = {"desc": "highest first", "asc": "lowest first", "random": "random others", "each": "each alone"}
_METRICS = {
    "right": "share of items right",
    "accuracy": "share of tokens right",
    "nll": "loss, nats per token",
    "margin": "lead of the right answers",
}
_NONE = "nothing"
_COLOURS = 6


def paths() -> list[Path]:
    """The sweeps that the app knows."""
    arguments = common.parse()
    given = list(arguments.runs) or shelf.default_paths()
    made = [j.output for j in launch.started(launch.home(arguments)) if j.job["kind"] == "sweep"]
    found = shelf.find_sweeps([*given, *(p for p in made if p.is_dir())])
    return list({p.resolve(): p for p in found}.values())


def draw() -> None:
    """This part of the Experiments page."""
    found = paths()
    if not found:
        st.write("No sweep here yet. Start one under “Start a scan or sweep”, or in a terminal:")
        st.code("headscope sweep prune --rank-by retrieval --k 0,1,2,4,8 --tasks niah -o runs/needles", language="sh")
        state.show(part="sweeps")
        common.facts_footer([("Runs", theme.short_path(launch.home(common.parse())))])
        return
    names = common.labels(found)
    left, right = st.columns(2)
    with left:
        name = state.select("Sweep", "sweep", names, names[0])
    with right:
        others = [_NONE, *(n for n in names if n != name)]
        other = state.select("Compared with", "versus", others, _NONE)
    folder = found[names.index(name)]
    second = None if other == _NONE else found[names.index(other)]
    state.show(part="sweeps", sweep=name, versus=None if second is None else other, loo=state.recall("loo", None))
    if working(folder):
        _live(str(folder), None if second is None else str(second))
    else:
        _show(folder, second, False)


def working(folder: Path) -> bool:
    """Whether a process is at work on a sweep right now."""
    workers = folder / WORKERS
    return workers.is_dir() and any(locks.is_alive(workers, p.stem) for p in workers.glob("*.lock"))


@st.fragment(run_every=2.0)
def _live(folder: str, second: str | None) -> None:
    """Drawn anew while the sweep runs, then once more with the whole page."""
    busy = working(Path(folder))
    _show(Path(folder), None if second is None else Path(second), busy)
    if not busy:
        st.rerun()


def _show(folder: Path, second: Path | None, busy: bool) -> None:
    try:
        result = SweepResult(folder)
        other = None if second is None else SweepResult(second)
    except HeadscopeError as error:
        if busy:
            st.info("The sweep is about to begin: model and tasks are being loaded.")
        else:
            st.error(common.plain(str(error)))
        return
    _progress(result, busy)
    effects = result.effects()
    if len(effects):
        _leave_one_out(result, effects)
    else:
        _curves(result, other)
        _areas(result)
    if other is not None:
        _against(result, other)
    _points(result)
    _footer(result)


def _progress(result: SweepResult, busy: bool) -> None:
    model = result.info.get("model", {}) if isinstance(result.info, dict) else {}
    words = f"{result.done:,} of {result.total:,} cells · {result.seconds:,.0f} s of work"
    if result.complete:
        st.caption(f"{common.plain(str(model.get('name', '')))} · {words} · complete")
        return
    if busy:
        st.progress(result.done / max(1, result.total), text=f"Running · {words}")
        return
    left, right = st.columns([6, 1], vertical_alignment="center")
    left.info(f"Not finished: {words}. Nobody is working on it.")
    if right.button("Go on", icon=":material/resume:"):
        name = model.get("name")
        model_name = None if name in (None, "headscope-reference") else str(name)
        try:
            begin.start(begin.sweep_job(model_name, result.sweep, str(result.folder.resolve()), resume=True))
        except HeadscopeError as error:
            st.error(common.plain(str(error)))
        else:
            st.rerun()


def _curves(result: SweepResult, other: SweepResult | None) -> None:
    charts = [chart(result, other, t.label, i) for i, t in enumerate(result.sweep.tasks)]
    charts = [c for c in charts if c["lines"]]
    if not charts:
        st.caption("No curve yet: the heads are being ranked, or the first points measured.")
        return
    components.curves({"file": result.folder.name, "charts": charts}, "sweep-curves")
    st.caption(
        "Bands: for random order the median over draws and 80 % of them; else a 95 % bootstrap interval over items. "
        "Click a name to hide its curve; arrow keys read the points."
    )


def chart(result: SweepResult, other: SweepResult | None, task: str, number_: int) -> dict[str, Any]:
    """The curves of one task as the drawing reads them; those of a second sweep stand beside the first's."""
    metric = result.metric(task)
    lines = []
    for which, name in ((result, ""), (other, "" if other is None else other.folder.name)):
        frame = pd.DataFrame() if which is None else which.curves()
        frame = frame[frame["task"] == task] if len(frame) else frame
        for key, rows in frame.groupby(["ranking", "order"], sort=False) if len(frame) else ():
            lines.append(_line(key, rows, name))
    rankings = list(dict.fromkeys(x["ranking"] for x in lines))
    for x in lines:
        x["colour"] = rankings.index(x["ranking"]) % _COLOURS
    unit = metric in ("right", "accuracy")
    values = [v for x in lines for part in ("low", "high", "score") for v in x[part] if v is not None]
    low, high = (0.0, 1.0) if unit or not values else (min(0.0, *values), max(values) * 1.05)
    return {
        "title": task, "note": "1 is best" if unit else "lower is better", "file": f"curves-{number_}",
        "lines": lines, "range": [low, high], "xname": "heads removed", "unit": "heads removed",
        "yname": _METRICS.get(metric, metric),
    }  # fmt: skip


def _line(key: tuple[str, str], rows: pd.DataFrame, sweep: str) -> dict[str, Any]:
    ranking, order = key
    name = f"{ranking}, {WORDS.get(order, order)}"
    values = {part: common.short(rows[part]) for part in ("score", "low", "high")}
    return {
        "ranking": f"{sweep}: {ranking}" if sweep else ranking, "order": order,
        "name": f"{sweep}: {name}" if sweep else name, "k": [int(k) for k in rows["k"]], **values,
    }  # fmt: skip


def _areas(result: SweepResult) -> None:
    areas, differences = result.auc(), result.compare()
    left, right = st.columns(2, gap="large")
    with left:
        if len(areas):
            theme.section("Area under each curve", "Mean height over the numbers of heads, with its 95 % interval.")
            rows = [[f"{r.ranking}, {WORDS.get(r.order, r.order)}", _task(result, r.task), number(r.auc),
                     span(r.low, r.high), r.draws, r.n] for r in areas.itertuples()]  # fmt: skip
            theme.table(["curve", "task", "area", "95 %", "draws", "items"], rows, left=2)
    with right:
        if len(differences):
            theme.section("Differences of areas", "Paired over the same items by bootstrap.")
            rows = [[f"{r.a} − {r.b}", _task(result, r.task), number(r.difference), span(r.low, r.high), number(r.p)]
                    for r in differences.itertuples()]  # fmt: skip
            theme.table(["curves", "task", "difference", "95 %", "p"], rows, left=2)


def span(low: float, high: float) -> str:
    """An interval in words.

    Example:
        >>> span(0.25, 1.0)
        '0.250 … 1.00'
    """
    return f"{number(low)} … {number(high)}"


def _task(result: SweepResult, label: str) -> str:
    """A task's name, with its parameters only where two tasks share it."""
    names = [t.name for t in result.sweep.tasks]
    name = label.split("{")[0]
    return label if names.count(name) > 1 else name


def _leave_one_out(result: SweepResult, effects: pd.DataFrame) -> None:
    tasks = list(dict.fromkeys(effects["task"]))
    task = tasks[0] if len(tasks) == 1 else state.select("Task", "loo", tasks, tasks[0])
    metric = result.metric(task)
    what = _METRICS.get(metric, metric)
    st.caption(common.plain(f"{task}: change of {what} when a head alone is removed; 0 is in the middle."))
    rows = effects[effects["task"] == task]
    drawn = components.grid(effect_grid(rows, result.folder.name, metric), "sweep-effects", open=_opened)
    if drawn.open:
        nav.go("head")


def _opened() -> None:
    state.choose("head", st.session_state["sweep-effects"].open)


def _against(result: SweepResult, other: SweepResult) -> None:
    one, two = result.folder.name, other.folder.name
    areas, differs = compare_auc(result, other), what_differs(result, other)
    theme.section(f"{two} minus {one}", "Areas of the curves that both have over the same items and numbers of heads.")
    if len(areas):
        rows = [[f"{r.ranking}, {WORDS.get(r.order, r.order)}", r.task, number(r.change), span(r.low, r.high),
                 number(r.p)] for r in areas.itertuples()]  # fmt: skip
        theme.table(["curve", "task", "difference", "95 %", "p"], rows, left=2)
    else:
        st.caption("They share no curve with the same items and numbers of heads.")
    st.caption(common.plain(f"Different: {'; '.join(differs) or 'nothing'}."))


def _points(result: SweepResult) -> None:
    table = result.table()
    if not len(table):
        return
    with st.expander(f"All {len(table):,} points, and which heads were removed"):
        rows = [[r.task, r.ranking, WORDS.get(r.order, r.order), r.k, r.draw, number(r.score), _error(r.se), r.heads]
                for r in table.head(200).itertuples()]  # fmt: skip
        theme.table(["task", "ranking", "order", "heads", "draw", "score", "se", "which"], rows, left=3)
        if len(table) > 200:
            st.caption(f"The first 200 of {len(table):,}; the file has all.")
        common.download("CSV of all points", table, f"{result.folder.name}-points", "sweep-csv")


def _error(se: float) -> str:
    return number(se) if math.isfinite(se) else "–"


def _footer(result: SweepResult) -> None:
    info = result.info if isinstance(result.info, dict) else {}
    model = info.get("model") if isinstance(info.get("model"), dict) else {}
    versions = info.get("versions") if isinstance(info.get("versions"), dict) else {}
    common.facts_footer(
        [
            ("Model", model.get("name")),
            ("Weights", str(model.get("hash") or "")[:12]),
            ("Kind", result.sweep.kind),
            ("Tasks", ", ".join(t.label for t in result.sweep.tasks)),
            ("Seed", result.sweep.seed),
            ("Versions", common.version_words(versions)),
            ("Sweep", result.folder),
        ]
    )
