"""The runs the app shows: found on disk, read as far as they are whole, with a note on everything that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from ..errors import HeadscopeError
from ..experiments.store import is_store
from ..rundata import HEAD_KEYS, TOKEN_COLUMNS, TOKEN_KEYS, RunData
from ..runs import read_maps, read_run
from ..storedmaps import FILE, StoredMaps

_MOST = 10_000  # layers, and heads of a layer
_NO_GRID = f"heads.parquet holds no heads, or layers and heads that are not numbered from 0 to {_MOST - 1:,}."
_FILES = ("run.json", "heads.parquet", "tokens.parquet", "arrays.safetensors")


@dataclass(frozen=True, eq=False)
class Entry:
    """One run directory: its data as far as it could be read, and what could not."""

    path: Path
    data: RunData | None
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """How the run is called in lists."""
        return self.path.resolve().name


def find(paths: list[Path]) -> list[Path]:
    """Run directories among ``paths``: a folder that is no run itself stands for the runs directly inside it.

    A folder without ``run.json`` but with another file of a run is a half-copied run and is shown as such.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir() and not is_result(path):
            found |= dict.fromkeys(p for p in _folders(path) if _like_a_run(p))
        elif not is_store(path):
            found[path] = None
    return list(found)


def find_sweeps(paths: list[Path]) -> list[Path]:
    """Sweeps among ``paths``, and directly inside those that are folders of results."""
    found: dict[Path, None] = {}
    for path in paths:
        inside = [path] if is_result(path) else _folders(path) if path.is_dir() else []
        found |= dict.fromkeys(p for p in inside if is_store(p))
    return list(found)


def is_result(path: Path) -> bool:
    """Whether a folder is itself a run (perhaps a broken one) or a sweep."""
    return _like_a_run(path) or is_store(path)


def default_paths() -> list[Path]:
    """Runs below the current folder: ``runs/*`` and the demo's."""
    here = Path.cwd()
    runs = here / "runs"
    return [p for p in ([here / "headscope-demo"] + ([runs] if runs.is_dir() else [])) if p.is_dir()]


def load(path: Path) -> Entry:
    """The run in ``path``; never raises for a broken one. Read anew when a file changes."""
    return _load(str(path), _state(path))


# A resource, not data: sharing one object costs nothing, and nobody changes it.
@st.cache_resource(max_entries=8, show_spinner="Reading the run …")
def _load(path: str, state: tuple) -> Entry:
    folder = Path(path)
    try:
        data = read_run(folder)
        return Entry(folder, _typed(data)) if _drawable(data.heads) else Entry(folder, None, [_NO_GRID])
    except HeadscopeError as error:
        problems = [str(error)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems = [f"{folder} cannot be read: {error}."]
    return _partial(folder, problems)


def _partial(folder: Path, problems: list[str]) -> Entry:
    """What is left of a broken run: each file by itself."""
    info = _try(folder / "run.json", _json, problems, {})
    heads = _try(folder / "heads.parquet", pd.read_parquet, problems, None)
    tokens = _try(folder / "tokens.parquet", pd.read_parquet, problems, None)
    arrays = _try(folder / "arrays.safetensors", _tensors, problems, {})
    if not _usable(heads, HEAD_KEYS, ("layer", "head", "n_sequences", "n_tokens")):
        return Entry(folder, None, problems)
    if not _drawable(heads):
        return Entry(folder, None, [*problems, _NO_GRID])
    if not _usable(tokens, (*TOKEN_KEYS, *TOKEN_COLUMNS), ("sequence", "position", "token_id")):
        tokens = pd.DataFrame(columns=[*TOKEN_KEYS, *TOKEN_COLUMNS])
    data = RunData(info, heads, tokens, arrays)
    if (folder / FILE).is_file():
        data.maps = _try(folder / FILE, lambda _: read_maps(folder, data), problems, StoredMaps())
    return Entry(folder, _typed(data), problems)


def _try(path: Path, read: Callable[[Path], Any], problems: list[str], otherwise: Any) -> Any:
    try:
        return read(path)
    except Exception as error:  # the parsers of four formats raise two dozen types for a damaged file
        said = f"{path.name}: {type(error).__name__}" if path.exists() else f"{path.name} is missing"
        if not any(path.name in p for p in problems):
            problems.append(f"{said}; the rest of the run is shown.")
        return otherwise


def _usable(frame: pd.DataFrame | None, columns: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    """True if a table has these columns, and whole numbers where they are needed."""
    if frame is None or any(c not in frame for c in columns):
        return False
    return all(pd.api.types.is_integer_dtype(frame[c]) for c in whole)


def _drawable(heads: pd.DataFrame) -> bool:
    """Whether a table of heads makes a grid: some rows, and numbers of layers and heads that models have."""
    if not len(heads):
        return False
    ends = [heads[c].min() for c in ("layer", "head")] + [heads[c].max() for c in ("layer", "head")]
    return all(0 <= n < _MOST for n in ends)


def _json(path: Path) -> dict:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _tensors(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path)


def _typed(data: RunData) -> RunData:
    """The run with entries of the expected kind where other code relies on it."""
    info = dict(data.info)
    for key, kind in (("columns", dict), ("model", dict), ("findings", list), ("refused", list), ("sequences", list)):
        if not isinstance(info.get(key), kind):
            info[key] = kind()
    for key in ("findings", "refused", "sequences"):
        info[key] = [entry for entry in info[key] if isinstance(entry, dict)]
    layers = info["model"].get("layers")
    info["findings"] = [f for f in info["findings"] if _is_finding(f)]
    info["refused"] = [r if _is_layer(r.get("layer")) else {**r, "layer": None} for r in info["refused"]]
    info["model"] = {
        **info["model"],
        "layers": [x for x in layers if isinstance(x, dict)] if isinstance(layers, list) else [],
    }
    return RunData(info, data.heads, data.tokens, data.arrays, data.maps)


def _is_finding(entry: dict[str, Any]) -> bool:
    """Whether a finding names a column, and heads and numbers as such."""
    heads, numbers = entry.get("heads"), [entry.get(k) for k in ("threshold", "null", "n")]
    listed = heads is None or (isinstance(heads, list) and all(isinstance(h, str) for h in heads))
    return isinstance(entry.get("column"), str) and listed and all(_is_number(n) for n in numbers)


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) < 1e12)


def _folders(path: Path) -> list[Path]:
    """The folders in a folder; hidden ones are runs that are being written, and jobs. None where it cannot be read."""
    try:
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def _like_a_run(path: Path) -> bool:
    try:
        return any((path / name).is_file() for name in _FILES)
    except OSError:  # a folder that may not be looked into is shown as a run that cannot be read
        return True


def _state(path: Path) -> tuple:
    """Changes whenever a file of the run does."""
    found = []
    for name in (*_FILES, FILE):
        try:
            facts = (path / name).stat()
            found.append((name, facts.st_size, facts.st_mtime_ns))
        except OSError:
            found.append((name, -1, 0))
    return tuple(found)
