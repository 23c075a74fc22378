"""A scan or a sweep in a process of its own: ``python -m headscope.app.worker FOLDER`` does what its job.json says.

The folder is all that the app and the process share: the job, how far it is, a lock that is held while it works, and
a file ``cancel`` that asks it to stop. So a page can be reloaded, and the server stopped, while the work goes on.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..errors import HeadscopeError
from ..experiments.locks import WorkerLock

JOB, PROGRESS, CANCEL, LOCKS, LOG = "job.json", "progress.json", "cancel", "locks", "log"
_EVERY = 0.3  # seconds between words about progress
_GRACE = 20.0  # seconds that a cancelled process has to leave by itself


class Diary:
    """Progress of this process, written down for the app."""

    def __init__(self, folder: Path, worker: str) -> None:
        self._folder, self._worker, self._last = folder, worker, 0.0
        self._facts = {"state": "running", "done": 0, "total": 0, "what": "Starting"}

    def tell(self, done: int, total: int | None, what: str) -> None:
        """How far the work is; written at most a few times a second."""
        changed = what != self._facts["what"]
        self._facts |= {"done": done, "total": total or 0, "what": what}
        if changed or time.monotonic() - self._last > _EVERY:
            self.write()

    def end(self, state: str, error: str = "") -> None:
        """The last word: ``done``, ``failed`` or ``cancelled``."""
        self._facts |= {"state": state, "error": error}
        self.write()

    def write(self) -> None:
        """Put it into the file."""
        self._last = time.monotonic()
        write_text(self._folder / PROGRESS, json.dumps(self._facts | {"worker": self._worker, "at": time.time()}))


def run(folder: Path, cancellable: bool = False) -> int:
    """Do the job of a folder.

    Args:
        folder: The job's folder.
        cancellable: End this process, and all else that it does, once the file ``cancel`` is there.

    Returns:
        The exit code.
    """
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    lock = WorkerLock(folder / LOCKS)
    diary = Diary(folder, lock.id)
    diary.write()
    try:
        if cancellable:
            # What a shell starts in the background ignores Ctrl-C, and hands that on; cancelling works by it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Thread(target=_watch, args=(folder / CANCEL,), daemon=True).start()
        (_scan if job["kind"] == "scan" else _sweep)(job, folder, diary)
    except KeyboardInterrupt:
        diary.end("cancelled")
        return 130
    except (HeadscopeError, OSError, MemoryError) as error:
        diary.end("failed", str(error) or type(error).__name__)
        return 2
    except Exception as error:
        diary.end("failed", f"{type(error).__name__}: {error}. The log has the details.")
        raise
    finally:
        lock.close()
    diary.end("done")
    return 0


def _scan(job: dict[str, Any], folder: Path, diary: Diary) -> None:
    from ..corpus import SEQ_LEN, read_sequences
    from ..runs import write_run
    from ..scan import ScanConfig, scan

    scope = _load(job, diary)
    given = job["fields"]
    diary.tell(0, 0, "Reading the text")
    most = getattr(scope.model.config, "max_position_embeddings", None) or SEQ_LEN
    path = str(folder / given["file"]) if given.get("file") else None
    sequences = read_sequences(
        scope.tokenizer,
        text=[given["text"]] if given.get("text") else [],
        path=path,
        demo=bool(given.get("demo")),
        seq_len=given.get("seq_len") or min(SEQ_LEN, most),
        limit=given.get("limit"),
    )
    config = ScanConfig(
        probes=tuple(given.get("probes", ("default",))), seed=given.get("seed", 0), maps=given.get("maps", "")
    )
    data = scan(scope, sequences, config, progress=diary.tell)
    data.info["command"] = job["command"]
    diary.tell(0, 0, "Writing the run")
    write_run(data, job["output"])


def _sweep(job: dict[str, Any], folder: Path, diary: Diary) -> None:
    from ..experiments.engine import run_sweep
    from ..experiments.report import write_report
    from ..experiments.results import SweepResult
    from ..experiments.sweep import make_sweep

    sweep = make_sweep(job["fields"])
    scope = _load(job, diary)

    def progress(status: Any) -> None:
        diary.tell(status.done, status.total, " · ".join([status.now, *([status.best] if status.best else [])]))

    run_sweep(sweep, scope, job["output"], resume=bool(job.get("resume")), progress=progress)
    diary.tell(0, 0, "Writing the report")
    write_report(SweepResult(job["output"]))


def _load(job: dict[str, Any], diary: Diary) -> Any:
    from ..loading import load

    diary.tell(0, 0, "Loading the model")
    return load(job.get("model"), device=job.get("device") or "auto")


def _watch(cancel: Path) -> None:
    """Interrupt the work once the app asks for it; end the process if it does not listen."""
    while not cancel.exists():
        time.sleep(_EVERY)
    _thread.interrupt_main()
    time.sleep(_GRACE)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), cancellable=True))
