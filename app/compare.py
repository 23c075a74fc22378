"""Two runs side by side, head by head."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from ..report.columns import Column, with_error
from . import atlas, common, components, nav, shelf, state, theme
from .shelf import Entry

_KEY = "compare"
_FACTS = ("command", "dtype", "device", "seed", "created")


def draw() -> None:
    """This part of the Experiments page."""
    if common.shown() is None:
        st.write("Comparing needs two runs, and there is none yet. Make one under “Start a scan or sweep”.")
        state.show(part="compare")
        return
    entry = common.open_run()
    paths, names = common.runs(), common.run_names()
    others = [n for n in names if n != state.recall("run", None)]
    if not others:
        st.write("Comparing needs two runs. Open the app with both, or with the folder that holds them:")
        st.code("headscope app runs/before runs/after", language="sh")
        _end(entry)
        return
    left, middle, right = st.columns(3)
    left.text_input("Run", entry.label, disabled=True, help="Chosen at the top of the page.")
    with middle:
        second = state.select("Compared with", "other", others, others[0])
    other = shelf.load(paths[names.index(second)])
    for problem in other.problems:
        st.warning(common.plain(problem))
    mine = {c.name: c for c in common.scored(entry)[0]}
    shared = [] if other.data is None else [c.name for c in common.scored(other)[0] if c.name in mine]
    if not shared:
        st.write("The two runs share no score.")
        _end(entry, second)
        return
    first = _most_changed(mine, {c.name: c for c in common.scored(other)[0]}, shared)
    with right:
        score = state.select("Score", "score", shared, first, format_func=lambda n: n.replace("_", " "))
    _compare(entry, other, mine[score], second)
    _end(entry, second, score)


def _most_changed(one: dict[str, Column], two: dict[str, Column], shared: list[str]) -> str:
    """The first well-known score that is not the same in both runs."""
    for name in (*(n for n in atlas.FIRST if n in shared), *shared):
        if one[name].values != two[name].values:
            return name
    return shared[0]


def _end(entry: Entry, second: str | None = None, score: str | None = None) -> None:
    state.show(part="compare", run=state.recall("run", None), other=second, score=score)
    common.footer(entry)


def _compare(entry: Entry, other: Entry, before: Column, second: str) -> None:
    after = next(c for c in common.scored(other)[0] if c.name == before.name)
    table = merged(entry, other, before, after)
    if table.empty or not table["difference"].notna().any():
        st.write("The two runs share no head with this score.")
        return
    if not table["difference"].any():
        st.write("This score is the same in both runs, head by head.")
        return
    data = difference_grid(entry, before, table)
    one, two = common.plain(entry.label), common.plain(second)
    st.caption(
        f"{common.plain(before.label)}: {two} minus {one}. Red is higher in {two}, blue lower; 0 is in the middle."
    )
    result = components.grid(data, _KEY, open=_opened)
    if result.open:
        nav.go("head")
    _changes(entry, other, table, before)


def merged(entry: Entry, other: Entry, before: Column, after: Column) -> pd.DataFrame:
    """Heads of both runs: value and error in each, and the difference with its error (runs taken as independent)."""
    one = pd.DataFrame({"head": entry.data.heads["head_id"], "before": before.values, "before_se": before.se})
    two = pd.DataFrame({"head": other.data.heads["head_id"], "after": after.values, "after_se": after.se})
    both = one.merge(two, on="head")
    both["difference"] = both["after"] - both["before"]
    both["difference_se"] = (both["before_se"] ** 2 + both["after_se"] ** 2) ** 0.5
    return both


def difference_grid(entry: Entry, before: Column, table: pd.DataFrame) -> dict[str, Any]:
    """The grid of differences; the scatter shows the first run's score."""
    by_head = table.set_index("head")
    ids = entry.data.heads["head_id"].tolist()
    lack = [float("nan")] * len(ids)

    def column(name: str) -> list[float]:
        return by_head[name].reindex(ids).tolist()

    change = Column(f"{before.name} difference", before.definition, column("difference"), column("difference_se"), lack)
    data = atlas.grid_data(entry, change, [[] for _ in ids])
    return data | {
        "signed": True,
        "magnitude": True,
        "second": {"label": f"{before.label}, first run", "values": common.short(column("before"))},
    }


def _changes(entry: Entry, other: Entry, table: pd.DataFrame, before: Column) -> None:
    left, right = st.columns(2, gap="large")
    with left:
        theme.section("Largest changes", "Value ± standard error in each run, errors taken as independent.")
        order = table["difference"].abs().sort_values(ascending=False, kind="stable").index
        rows = [
            [r.head, with_error(r.before, r.before_se), with_error(r.after, r.after_se),
             with_error(r.difference, r.difference_se)]
            for r in table.loc[order].head(12).itertuples()
        ]  # fmt: skip
        theme.table(["head", entry.label, other.label, "difference"], rows)
        common.download("CSV of all heads", table, f"{entry.label}-{other.label}-{before.name}", "compare-csv")
    with right:
        theme.section("What else differs", "Between the two runs, as far as they tell.")
        rows = differences(entry, other)
        if rows:
            theme.table(["", entry.label, other.label], rows, left=3)
        else:
            st.caption("Nothing: same model, text, seed and versions.")


def differences(entry: Entry, other: Entry) -> list[list[str]]:
    """Provenance of both runs where it is not the same: what, in the first, in the second."""
    one, two = entry.data.info, other.data.info
    pairs = [(k, one.get(k), two.get(k)) for k in _FACTS]
    pairs += [(f"model {k}", one["model"].get(k), two["model"].get(k)) for k in ("name", "hash")]
    versions = [i.get("versions") if isinstance(i.get("versions"), dict) else {} for i in (one, two)]
    pairs += [(k, versions[0].get(k), versions[1].get(k)) for k in sorted(set(versions[0]) | set(versions[1]))]
    texts = [" · ".join(str(s.get("source", "")) for s in i["sequences"][:6]) for i in (one, two)]
    pairs.append(("text", *texts))
    return [[k, str(a), str(b)] for k, a, b in pairs if a != b]


def _opened() -> None:
    state.choose("head", st.session_state[_KEY].open)
