"""The results of a sweep, finished or not, as tables; reading changes no result."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ..display import Shown
from ..errors import ResultFormatError, UserError
from . import curves
from .store import FILE, is_store
from .sweep import Sweep, make_sweep

METRICS = ("right", "accuracy", "nll")
CURVE = ["task", "ranking", "order"]
TABLES = ("table", "examples", "curves", "auc", "compare", "effects", "path")


class SweepResult(Shown):
    """What a sweep's store holds at this moment.

    Attributes:
        folder: The run folder.
        sweep: What was swept.
        identity: What the numbers depend on.
        info: Model, versions and the facts of every example.
        rankings: Label -> (head, score) of every ranked head, highest first.
        done: Cells done.
        total: Cells known (those of a sweep whose rankings are not done are not known yet).
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the store of a folder.

        Raises:
            UserError: If the folder holds no sweep.
            ResultFormatError: If the store is damaged.
        """
        self.folder = Path(folder).expanduser()
        with _reading(self.folder) as db:
            meta = {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM meta")}
            rows = db.execute("SELECT key, job, result, seconds FROM cells ORDER BY position").fetchall()
            points = db.execute(
                'SELECT task, ranking, "order", k, draw, heads, cell FROM points ORDER BY position'
            ).fetchall()
        if "identity" not in meta:
            raise ResultFormatError(f"The sweep in {folder} was never begun: it has no identity.")
        self.identity, self.info = meta["identity"], meta.get("info", {})
        self.sweep: Sweep = make_sweep(self.identity["sweep"])
        self.done, self.total = sum(r[2] is not None for r in rows), len(rows)
        self.complete = bool(meta.get("planned")) and self.done == self.total
        self.seconds = sum(r[3] or 0.0 for r in rows)
        jobs = [(json.loads(r[1]), r[2]) for r in rows]
        self.rankings: dict[str, list[tuple[str, float]]] = {
            job["label"]: [tuple(x) for x in json.loads(result)["ranked"]]
            for job, result in jobs
            if "rank" in job and result is not None
        }
        self._results = {r[0]: json.loads(r[2]) for r in rows if r[2] is not None}
        self._points = points

    def metric(self, task: str) -> str:
        """The score that stands for a task."""
        return self.sweep.task(task).metric

    def table(self) -> pd.DataFrame:
        """One row per point that is measured: where it stands on its curve, which heads were removed, and the means.

        ``score`` is the mean over examples of the task's own metric (``metric``), ``se`` its standard error, and
        ``right``, ``accuracy`` and ``nll`` (nats per token) are the means of all three.
        """
        rows = []
        for task, ranking, order, k, draw, heads, cell in self._points:
            result = self._results.get(cell)
            if result is None:
                continue
            metric = self.metric(task)
            values = np.array(result[metric])
            se = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            named = ",".join(json.loads(heads))
            means = [float(np.mean(result[m])) for m in METRICS]
            rows.append([task, ranking, order, k, draw, named, len(values), metric, values.mean(), se, *means])
        names = [*CURVE, "k", "draw", "heads", "n", "metric", "score", "se", *METRICS]
        return pd.DataFrame(rows, columns=names)

    def examples(self) -> pd.DataFrame:
        """One row per measured set of heads and example: task, heads, example, right, accuracy, nll."""
        frames = []
        seen = set()
        for task, _, _, _, _, heads, cell in self._points:
            result = self._results.get(cell)
            if result is None or cell in seen:
                continue
            seen.add(cell)
            data = {m: result[m] for m in METRICS}
            named = ",".join(sorted(json.loads(heads)))
            frames.append(pd.DataFrame({"task": task, "heads": named, "example": range(len(data["right"])), **data}))
        empty = pd.DataFrame(columns=["task", "heads", "example", *METRICS])
        return pd.concat(frames, ignore_index=True) if frames else empty

    def scores_by_point(self) -> dict[tuple[str, str, str, int, int], list[float]]:
        """(task, ranking, order, k, draw) -> the task's own metric of every example."""
        return {
            (task, ranking, order, k, draw): self._results[cell][self.metric(task)]
            for task, ranking, order, k, draw, _, cell in self._points
            if cell in self._results
        }

    @cached_property
    def grids(self) -> dict[tuple[str, str, str], curves.Grid]:
        """(task, ranking, order) -> scores by draw, number of heads and example, of the points that all draws have."""
        found: dict[tuple[str, str, str], dict[tuple[int, int], list[float]]] = {}
        for task, ranking, order, k, draw, _, cell in self._points:
            own = found.setdefault((task, ranking, order), {})
            if cell in self._results:
                own[draw, k] = self._results[cell][self.metric(task)]
        grids = {key: curves.grid(own) for key, own in found.items()}
        return {key: g for key, g in grids.items() if g is not None}

    def curves(self) -> pd.DataFrame:
        """One row per curve and k: ``score``, ``low`` and ``high``.

        For ``random`` the score is the median over draws and the band holds 80 % of them; for the others the band is a
        95 % bootstrap interval over examples.
        """
        frames = [
            pd.DataFrame({"task": key[0], "ranking": key[1], "order": key[2], **curves.band(g)})
            for key, g in self.grids.items()
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*CURVE, "k"])

    def auc(self) -> pd.DataFrame:
        """One row per curve: its mean height over k (area divided by the range of k), with a 95 % interval."""
        rows = []
        for key, g in self.grids.items():
            if len(g.k) > 1:
                rows.append([*key, *curves.auc(g), g.values.shape[0], g.values.shape[2]])
        return pd.DataFrame(rows, columns=[*CURVE, "auc", "low", "high", "draws", "n"])

    def compare(self) -> pd.DataFrame:
        """Every two curves of a task: difference of their areas, paired bootstrap interval and p-value."""
        rows = []
        items = list(self.grids.items())
        for i, (a, first) in enumerate(items):
            for b, second in items[i + 1 :]:
                if a[0] == b[0] and len(first.k) > 1 and np.array_equal(first.k, second.k):
                    names = [f"{x[1]} {x[2]}" for x in (a, b)]
                    rows.append([a[0], *names, *curves.auc_difference(first, second)])
        return pd.DataFrame(rows, columns=["task", "a", "b", "difference", "low", "high", "p"])

    def effects(self) -> pd.DataFrame:
        """Of a leave-one-out sweep, one row per task and head: score without it, paired change and its error.

        With several edits or another one than removal, ``edit`` says which.
        """
        names = ["task", "head", "score", "change", "se", "n", "edit"]
        rows = [[task, heads[-1], *found, edit] for task, edit, _, heads, found in self._changes("each") if heads]
        frame = pd.DataFrame(rows, columns=names)
        return frame if frame["edit"].any() else frame.drop(columns="edit")

    def path(self) -> pd.DataFrame:
        """Of a greedy sweep, one row per task and number of heads: the head chosen last, score, change and error.

        The change is that from the untouched model, paired over items.
        """
        names = ["task", "k", "head", "score", "change", "se", "n"]
        rows = [[t, k, heads[-1] if heads else "", *found] for t, _, k, heads, found in self._changes("greedy")]
        return pd.DataFrame(rows, columns=names)

    def _changes(self, order: str) -> Iterator[tuple[str, str, int, list[str], list[float]]]:
        """(task, ranking, k, heads, [score, change, se, n]) of every measured point of an order."""
        own = [p for p in self._points if p[2] == order]
        base = {task: self._results.get(cell) for task, _, _, k, _, _, cell in own if not k}
        for task, ranking, _, k, _, heads, cell in own:
            result = self._results.get(cell)
            if result is None or base.get(task) is None:
                continue
            values = np.array(result[self.metric(task)])
            change = values - np.array(base[task][self.metric(task)])
            se = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else float("nan")
            yield task, ranking, k, json.loads(heads), [values.mean(), change.mean(), se, len(change)]


def read_results(folder: str | Path) -> dict[str, tuple[str, float]]:
    """Key -> (result as JSON, seconds) of every cell that is done."""
    with _reading(Path(folder).expanduser()) as db:
        rows = db.execute("SELECT key, result, seconds FROM cells WHERE state = 'done'").fetchall()
    return {key: (result, seconds) for key, result, seconds in rows}


@contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """The store, opened for reading; from a copy where the folder cannot be written to (WAL files live beside it)."""
    if not is_store(folder):
        raise UserError(f"{folder} holds no sweep: there is no {FILE} in it.")
    with tempfile.TemporaryDirectory() as copy:
        try:
            db = _open(folder / FILE)
        except sqlite3.OperationalError:
            for path in folder.glob(f"{FILE}*"):
                if not path.name.endswith("-shm"):
                    shutil.copy(path, copy)
            db = _open(Path(copy) / FILE)
        except sqlite3.DatabaseError as error:
            raise ResultFormatError(f"{folder / FILE} is not a sweep of headscope, or is damaged: {error}.") from error
        try:
            db.execute("BEGIN")  # one snapshot, whatever workers write meanwhile
            yield db
        except sqlite3.DatabaseError as error:
            raise ResultFormatError(f"{folder / FILE} is not a sweep of headscope, or is damaged: {error}.") from error
        finally:
            db.close()


def _open(path: Path) -> sqlite3.Connection:
    # Not as mode=ro: the last connection to close puts the WAL file away, and a read-only one cannot.
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=60.0)
    try:
        db.execute("PRAGMA query_only = ON")
        db.execute("SELECT 1 FROM meta LIMIT 1").fetchone()
    except BaseException:
        db.close()
        raise
    return db
