"""Scans and sweeps started from the app: as processes of their own that the app only watches (see `worker`)."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import headscope

from ..errors import UserError
from ..experiments import locks
from . import shelf
from .arguments import Arguments, parse
from .worker import CANCEL, JOB, LOCKS, LOG, PROGRESS

JOBS = ".headscope-jobs"
MOST = 2  # that many run at a time
_STARTING = 90.0  # seconds until a process that has said nothing counts as lost
KINDS = ("scan", "sweep")
ACTIVE = ("starting", "running", "stopping")


@dataclass(frozen=True)
class Started:
    """A job as its folder tells of it.

    Attributes:
        folder: The job's folder.
        job: What is done: kind, model, device, output, fields, command, created.
        state: starting, running, stopping, done, failed, cancelled or lost.
        done, total: How far it is; total is 0 where nobody knows.
        what: What it is doing.
        error: Why it failed.
        seconds: How long it has been (or was) at work.
    """

    folder: Path
    job: dict[str, Any]
    state: str
    done: int
    total: int
    what: str
    error: str
    seconds: float

    @property
    def active(self) -> bool:
        """Whether it may still do something."""
        return self.state in ACTIVE

    @property
    def output(self) -> Path:
        """The run directory, or sweep, that it writes."""
        return Path(self.job["output"])


def home(arguments: Arguments) -> Path:
    """Where new runs go: the folder of runs that the app shows, else beside the runs it shows, else ./runs."""
    for path in arguments.runs:
        if path.is_dir():
            return path.parent if shelf.is_result(path) else path
    return Path.cwd() / "runs"


def free_name(root: Path, wanted: str) -> Path:
    """A folder that does not exist yet, named as wanted as far as a file name can be.

    Raises:
        UserError: If nothing of the name is left.
    """
    name = re.sub(r"[^\w.-]+", "-", wanted).strip(".-")[:80]
    if not name:
        raise UserError(f"{wanted!r} makes no folder name. Use letters, digits, dots and dashes.")
    for number in range(1, 1000):
        path = root / (name if number == 1 else f"{name}-{number}")
        if not path.exists():
            return path
    raise UserError(f"There are too many runs called {name}.")


def start(root: Path, job: dict[str, Any], files: dict[str, bytes] | None = None) -> Path:
    """Start a job; its folder.

    Args:
        root: Where runs are (see `home`).
        job: kind (``scan`` or ``sweep``), model, device, output, fields, command and, for sweeps, resume.
        files: Put into the job's folder before it starts.

    Raises:
        UserError: If enough jobs run already, or the folder cannot be written to.
    """
    if not parse().jobs:
        raise UserError("This app is open to the network, so nobody can start jobs in it. Add --allow-jobs to do so.")
    if sum(s.active for s in started(root)) >= MOST:
        raise UserError(f"{MOST} jobs are running already. Cancel one, or wait for it.")
    folder = root / JOBS / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
        for name, content in (files or {}).items():
            (folder / Path(name).name).write_bytes(content)
        (folder / JOB).write_text(json.dumps(job | {"created": time.time()}, indent=2), encoding="utf-8")
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "headscope.app.worker", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(f"Cannot write to {root}: {error.strerror or error}.") from error
    threading.Thread(target=process.wait, daemon=True).start()  # so that no zombie stays
    return folder


def started(root: Path) -> list[Started]:
    """The jobs of a folder of runs, newest first; what cannot be read is left out."""
    jobs = root / JOBS
    try:
        folders = sorted((p for p in jobs.iterdir() if p.is_dir()), reverse=True)
    except OSError:
        return []
    return [s for s in map(_read, folders) if s is not None]


def cancel(job: Started) -> None:
    """Ask a job to stop; what a sweep has done so far is kept."""
    (job.folder / CANCEL).touch()


def forget(job: Started) -> None:
    """Take a finished job off the list; the run that it wrote stays."""
    if not job.active:
        shutil.rmtree(job.folder, ignore_errors=True)


def log(job: Started, most: int = 4000) -> str:
    """The end of what the process printed."""
    try:
        return (job.folder / LOG).read_bytes()[-most:].decode(errors="replace")
    except OSError:
        return ""


def _read(folder: Path) -> Started | None:
    job, said = _object(folder / JOB), _object(folder / PROGRESS) or {}
    if job is None or not isinstance(job.get("output"), str) or not isinstance(job.get("created"), int | float):
        return None
    if job.get("kind") not in KINDS or "\0" in job["output"]:
        return None
    state = said.get("state")
    if state not in ("done", "failed", "cancelled"):
        state = _alive(folder, said.get("worker"), job["created"])
    numbers = [n if isinstance(n := said.get(key), int) else 0 for key in ("done", "total")]
    at = said.get("at")
    end = time.time() if state in ACTIVE else at if isinstance(at, int | float) else job["created"]
    words = [str(said.get(key, "")) for key in ("what", "error")]
    return Started(folder, job, state, *numbers, *words, max(0.0, end - job["created"]))


def _alive(folder: Path, worker: Any, created: float) -> str:
    if isinstance(worker, str) and locks.is_alive(folder / LOCKS, worker):
        return "stopping" if (folder / CANCEL).exists() else "running"
    return "starting" if worker is None and time.time() - created < _STARTING else "lost"


def _object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _environment() -> dict[str, str]:
    """The process finds the headscope that this one is, also from a source checkout."""
    root = str(Path(headscope.__file__).resolve().parents[1])
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": root + (os.pathsep + path if path else "")}
