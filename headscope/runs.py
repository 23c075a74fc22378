"""Run directories: everything about one measurement, complete or absent, readable without headscope."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import storedmaps
from .atomic import new_folder, recover
from .errors import ResultFormatError, UserError
from .report import render
from .rundata import SCHEMA_VERSION, RunData, validate

REPORT = "report.html"
_INFO, _HEADS, _TOKENS, _ARRAYS = "run.json", "heads.parquet", "tokens.parquet", "arrays.safetensors"


def check_output(directory: str | Path, overwrite: bool = False) -> Path:
    """The resolved output folder, if a run may be written there.

    Raises:
        UserError: If it is a file or the current folder, holds something and ``overwrite`` is off, or holds anything
            but a headscope run.
    """
    target = Path(directory).expanduser().resolve()
    recover(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"The output must be a folder: {directory} is a file. Name another one with -o.")
    if target == Path.cwd():
        raise UserError("A run replaces its folder, so it cannot be the current one. Name a new folder with -o.")
    found = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if found and not overwrite:
        raise UserError(
            f"The output folder {directory} is not empty. Name another one, or replace it with --overwrite."
        )
    own = (_INFO, _HEADS, _TOKENS, _ARRAYS, storedmaps.FILE, REPORT)
    foreign = [n for n in found if n not in own and not n.startswith(f".{REPORT}.partial-")]
    if foreign or (found and _INFO not in found):
        raise UserError(
            f"{directory} is not (only) a headscope run, so it is not replaced: it holds "
            f"{', '.join((foreign or found)[:3])}. Name another folder with -o."
        )
    return target


def write_run(data: RunData, directory: str | Path, overwrite: bool = False, report: bool = True) -> Path:
    """Write a run directory; it appears complete in one rename, or not at all.

    Args:
        data: What to write.
        directory: The run directory; parents are made.
        overwrite: Replace a run that is already there (nothing else is ever replaced).
        report: Also write ``report.html``.

    Returns:
        The run directory.

    Raises:
        UserError: If the folder may not be written to (see `check_output`), or the disk refuses.
        ResultFormatError: If the data breaks the schema; nothing is written then.
    """
    target = check_output(directory, overwrite)
    validate(data)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(target) as partial:
            _write_files(data, partial, report)
    except OSError as err:
        raise UserError(f"Cannot write the run to {directory}: {err.strerror or err}.") from err
    return target


def read_run(directory: str | Path) -> RunData:
    """The run in a directory.

    Raises:
        ResultFormatError: If a file is missing, damaged, of another schema version, or named outside the folder.
    """
    folder = Path(directory).expanduser()
    info = _read_info(folder)
    for name, facts in info["files"].items():
        _check_file(folder, name, facts)
    data = RunData(
        info,
        _read_table(folder / _HEADS),
        _read_table(folder / _TOKENS),
        _read_arrays(folder / _ARRAYS),
    )
    if storedmaps.FILE in info["files"]:
        data.maps = read_maps(folder, data)
    validate(data, str(folder))
    return data


def read_maps(folder: Path, data: RunData) -> storedmaps.StoredMaps:
    """The heads whose maps a run carries; their queries and keys stay on disk until something is drawn.

    Raises:
        ResultFormatError: If the file is damaged, or does not fit the tables of the run.
    """
    n_heads = {int(x): int(h) + 1 for x, h in data.heads.groupby("layer")["head"].max().items()}
    lengths = {int(s): int(n) for s, n in data.tokens.groupby("sequence").size().items()}
    return storedmaps.read(folder / storedmaps.FILE, n_heads, lengths)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinity become null, tensors lists, everything unknown a string."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _write_files(data: RunData, folder: Path, report: bool) -> None:
    tokens = data.tokens.copy()
    # A lone surrogate cannot be written as UTF-8; it stays readable as an escape.
    tokens["token"] = [str(t).encode("utf-8", "backslashreplace").decode() for t in tokens["token"]]
    data.heads.to_parquet(folder / _HEADS, engine="pyarrow", index=False)
    tokens.to_parquet(folder / _TOKENS, engine="pyarrow", index=False)
    arrays = {k: v.detach().cpu().contiguous().clone() for k, v in data.arrays.items()}
    save_file(arrays, folder / _ARRAYS)
    names = [_HEADS, _TOKENS, _ARRAYS]
    if len(data.maps):
        data.maps.save(folder / storedmaps.FILE)
        names.append(storedmaps.FILE)
    for name in names[2:]:
        shutil.copymode(folder / _HEADS, folder / name)  # safetensors lets only the owner read
    files = {n: _facts(folder / n) for n in names}
    info = plain({**data.info, "schema_version": SCHEMA_VERSION, "files": files})
    (folder / _INFO).write_text(
        json.dumps(info, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    if report:
        (folder / REPORT).write_text(render(RunData(info, data.heads, tokens, arrays)), encoding="utf-8")


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / _INFO
    if not path.is_file():
        raise ResultFormatError(f"{folder} is not a headscope run: it has no {_INFO}.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as err:
        raise ResultFormatError(f"{path} cannot be read as JSON: {err}.") from err
    version = info.get("schema_version") if isinstance(info, dict) else None
    if version != SCHEMA_VERSION:
        raise ResultFormatError(f"{path} has schema version {version!r}; this headscope reads {SCHEMA_VERSION}.")
    files = info.get("files")
    if not isinstance(files, dict) or not {_HEADS, _TOKENS, _ARRAYS} <= set(files):
        raise ResultFormatError(f"{path} does not list the files of the run.")
    return info


def _check_file(folder: Path, name: str, facts: Any) -> None:
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise ResultFormatError(f"{folder / _INFO} names {name!r}, which lies outside the run; it is not read.")
    if not path.is_file():
        raise ResultFormatError(f"{path} is missing: the run is not complete.")
    if not isinstance(facts, dict) or _facts(path) != facts:
        raise ResultFormatError(f"{path} is not the file that was written: its size or SHA-256 is another.")


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, engine="pyarrow")
    except (OSError, ValueError) as err:
        raise ResultFormatError(f"{path} cannot be read as Parquet: {err}.") from err


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as err:
        raise ResultFormatError(f"{path} cannot be read as safetensors: {err}.") from err
