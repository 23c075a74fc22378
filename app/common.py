"""What every page begins and ends with: the run it shows, what is wrong with it, and where its numbers come from."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from ..report.columns import Column, columns
from ..report.findings import Finding, findings, roles
from ..rundata import conditions
from . import launch, shelf, state, theme
from .arguments import parse
from .shelf import Entry

# Beginnings of an icon or emoji, a web address (two ways), a mail address, and an arrow or the like between spaces.
_READ_LATE = re.compile(r":(?=[\w+-]+:|material/|//)|www(?=\.)|@(?=[-\w])|(?<!\S)[-<>~](?=-?[->=-](?!\S))", re.I)


def shown() -> Entry | None:
    """The run that is chosen; None if there is none to choose."""
    paths, names = runs(), run_names()
    if not paths:
        return None
    chosen = state.recall("run", names[0], state.one_of(names))
    chosen = state.keep("run", chosen if chosen in names else names[0])
    return shelf.load(paths[names.index(chosen)])


def open_run() -> Entry:
    """The run that is chosen, and what is wrong with it; the page stops here if nothing of it can be shown.

    Only for where there is a run (see `shown`).
    """
    entry = shown()
    if entry is None:
        st.stop()
    for problem in entry.problems:
        st.warning(plain(problem), icon=":material/report:")
    if entry.data is None:
        theme.title(entry.label, [])
        st.write("Nothing of this run can be shown without its table of heads.")
        st.stop()
    return entry


def runs() -> list[Path]:
    """The run directories that the app was started with, or those below the current folder, and its own scans."""
    arguments = parse()
    paths = list(arguments.runs) or shelf.default_paths()
    made = [j.output for j in launch.started(launch.home(arguments)) if j.job["kind"] == "scan" and j.state == "done"]
    found = shelf.find(paths)
    known = {p.resolve() for p in found}
    return found + [p for p in made if p.is_dir() and p.resolve() not in known]


def run_names() -> list[str]:
    """What the runs are called in lists and in the address."""
    return labels(runs())


def labels(paths: list[Path]) -> list[str]:
    """Names of runs, with as much of their path as tells apart those that have the same.

    Example:
        >>> labels([Path("/a/x/run"), Path("/b/x/run"), Path("/b/x/other")])
        ['a/x/run', 'b/x/run', 'other']
    """
    parts = [p.resolve().parts for p in paths]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, depth, strict=True)]
        longer = [i for i, n in enumerate(names) if names.count(n) > 1 and depth[i] < len(parts[i])]
        if not longer:
            return names
        for i in longer:
            depth[i] += 1


def scored(entry: Entry) -> tuple[list[Column], list[Finding], list[list[str]]]:
    """Scores, findings and roles of a run, as its report has them."""
    cols = [c for c in columns(entry.data) if c.known]
    found = findings(entry.data, cols)
    return cols, found, roles(entry.data, found)


def model_name(entry: Entry) -> str:
    """The model's name, or the run's where it names none."""
    return str(entry.data.info["model"].get("name") or entry.label)


def facts(entry: Entry) -> list[tuple[str, str]]:
    """Size of what was measured: value and unit."""
    heads, layers = entry.data.heads, entry.data.info["model"]["layers"]
    kv = sorted({int(x["kv_heads"]) for x in layers if isinstance(x.get("kv_heads"), int)})
    each = sorted({int(n) for n in heads.groupby("layer").size()})
    shown = [(f"{heads['layer'].nunique():,}", "layers"), ("–".join(map(str, each)), "heads each")]
    if kv and kv != each:
        shown.append(("–".join(map(str, kv)), "kv heads"))
    for key, word in (("n_sequences", "sequence"), ("n_tokens", "token")):
        count = int(heads[key].max())
        shown.append((f"{count:,}", word if count == 1 else f"{word}s"))
    return shown


def footer(entry: Entry, live: str = "", maps: str = "") -> None:
    """Provenance of everything on the page.

    Args:
        entry: The run.
        live: What was computed just now, and from which model; empty if the page shows the run only.
        maps: Which of the run's stored queries and keys the page is drawn from, if it is.
    """
    info = entry.data.info
    model, made = info["model"], info.get("versions")
    versions = made if isinstance(made, dict) else {}
    facts_footer(
        [
            ("Model", model.get("name")),
            ("Weights", str(model.get("hash") or "")[:12]),
            ("dtype", info.get("dtype")),
            ("Device", info.get("device")),
            ("Sequences", len(info["sequences"]) or None),
            ("Seed", info.get("seed")),
            ("Measured", info.get("created")),
            ("Versions", version_words(versions)),
            ("Not the plain model", " ".join(conditions(info))),
            ("Command", info.get("command")),
            ("Run", entry.path),
            ("Maps", maps),
            ("Live", live),
        ]
    )


def facts_footer(pairs: list[tuple[str, Any]]) -> None:
    """The footer of a page: what each fact is called, and the fact; empty ones are left out."""
    shown = [f"<span><b>{k}</b> {html.escape(str(v))}</span>" for k, v in pairs if v not in (None, "")]
    st.html(f'<footer class="hs hs-foot">{"".join(shown)}</footer>')


def version_words(versions: dict[str, Any]) -> str:
    """Versions of what numbers depend on most."""
    return ", ".join(f"{k} {versions[k]}" for k in ("headscope", "torch", "transformers") if k in versions)


def plain(text: str) -> str:
    """Text for elements that read Markdown: nothing in it is markup, and line breaks are spaces.

    Links, icons and arrows are looked for in the text that is left once escapes are gone; an invisible word joiner
    keeps those from being found.

    Example:
        >>> plain("a*b <i>")
        'a\\\\*b \\\\<i\\\\>'
        >>> plain("www.x.org") == "www\\u2060\\\\.x\\\\.org"
        True
    """
    joined = _READ_LATE.sub("\\g<0>\u2060", " ".join(text.split()))
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-.!|~$:&=" else c for c in joined)


def short(values: Iterable[float]) -> list[float | None]:
    """Numbers with five digits, None for what is no number: small, and valid JSON."""
    return [float(f"{v:.5g}") if v is not None and math.isfinite(v) else None for v in map(_float, values)]


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def download(label: str, frame: pd.DataFrame, name: str, key: str) -> None:
    """A button that hands out a table as CSV."""
    st.download_button(
        label,
        frame.to_csv(index=False).encode(),
        file_name=f"{name}.csv",
        mime="text/csv",
        key=key,
        type="tertiary",
        icon=":material/download:",
    )


def head_label(entry: Entry, given: list[list[str]]) -> dict[str, str]:
    """Head id -> how it is called in lists, with its roles."""
    ids = entry.data.heads["head_id"].tolist()
    return {h: " · ".join([h, *given[i]]) for i, h in enumerate(ids)}
