"""Scans and sweeps started from the app: processes of their own, with progress, cancel, and no memory but a folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("streamlit")

from headscope.app import launch, worker
from headscope.app.arguments import Arguments
from headscope.app.launch import Started
from headscope.errors import UserError
from headscope.experiments.locks import WorkerLock
from headscope.experiments.results import SweepResult
from headscope.runs import read_run


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of the tests is not the app's."""
    monkeypatch.setattr(launch, "parse", Arguments)


def scan_job(root: Path, name: str = "made", **fields: object) -> dict:
    given = {"text": "One two three. One two three.", "probes": [], **fields}
    return {
        "kind": "scan", "model": None, "device": "cpu", "fields": given, "output": str(root / name),
        "command": "headscope scan",
    }  # fmt: skip


def put(root: Path, job: dict, **progress: object) -> Path:
    """A job's folder as `launch.start` makes it, without a process."""
    folder = root / launch.JOBS / "20250101-000000-abcdef"
    folder.mkdir(parents=True)
    (folder / worker.JOB).write_text(json.dumps({"created": time.time()} | job))
    if progress:
        (folder / worker.PROGRESS).write_text(json.dumps(progress))
    return folder


def until_done(root: Path, seconds: float = 120) -> Started:
    for _ in range(int(seconds / 0.2)):
        (job,) = launch.started(root)
        if not job.active:
            return job
        time.sleep(0.2)
    raise AssertionError(launch.log(job))


def test_a_scan_in_its_own_process_writes_a_run(tmp_path: Path) -> None:
    launch.start(tmp_path, scan_job(tmp_path))
    (job,) = launch.started(tmp_path)
    assert job.active and job.state in ("starting", "running")
    job = until_done(tmp_path)
    assert job.state == "done", launch.log(job)
    data = read_run(tmp_path / "made")
    assert data.info["command"] == "headscope scan" and len(data.heads) == 96
    launch.forget(job)
    assert launch.started(tmp_path) == [] and (tmp_path / "made").is_dir()


def test_a_sweep_writes_its_store_and_report(tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text('["L4H9", "L4H10"]')
    fields = {
        "sweep": "prune", "rank_by": [str(tmp_path / "heads.json")], "k": [0, 2], "order": ["desc"],
        "tasks": ["repeats{n: 2, segment: 8}"],
    }  # fmt: skip
    job = scan_job(tmp_path) | {"kind": "sweep", "fields": fields, "output": str(tmp_path / "swept")}
    folder = put(tmp_path, job)
    assert worker.run(folder) == 0
    assert launch.started(tmp_path)[0].state == "done"
    assert SweepResult(tmp_path / "swept").complete and (tmp_path / "swept" / "report.html").is_file()


def test_what_fails_says_why(tmp_path: Path) -> None:
    folder = put(tmp_path, scan_job(tmp_path, text="", file="missing.txt"))
    assert worker.run(folder) == 2
    (job,) = launch.started(tmp_path)
    assert job.state == "failed" and "missing.txt" in job.error


def test_a_cancelled_job_ends_and_leaves_no_run(tmp_path: Path) -> None:
    folder = put(tmp_path, scan_job(tmp_path, text="word " * 3000))
    (folder / worker.CANCEL).touch()
    # In a process of its own: a cancelled worker ends its process, whoever called it.
    assert subprocess.run([sys.executable, "-m", "headscope.app.worker", str(folder)], timeout=120).returncode == 130
    assert launch.started(tmp_path)[0].state == "cancelled" and not (tmp_path / "made").exists()


def test_a_job_whose_process_died_is_lost_and_one_that_lives_is_not(tmp_path: Path) -> None:
    folder = put(tmp_path, scan_job(tmp_path))
    lock = WorkerLock(folder / worker.LOCKS)
    facts = {"state": "running", "done": 1, "total": 2, "what": "x", "worker": lock.id, "at": time.time()}
    (folder / worker.PROGRESS).write_text(json.dumps(facts))
    (job,) = launch.started(tmp_path)
    assert (job.state, job.done, job.total) == ("running", 1, 2)
    launch.cancel(job)
    assert launch.started(tmp_path)[0].state == "stopping"
    launch.forget(launch.started(tmp_path)[0])
    assert folder.is_dir(), "a job at work is not forgotten"
    lock.close()
    assert launch.started(tmp_path)[0].state == "lost"


def test_a_job_that_never_said_a_word_is_lost_after_a_while(tmp_path: Path) -> None:
    folder = put(tmp_path, scan_job(tmp_path))
    assert launch.started(tmp_path)[0].state == "starting"
    job = json.loads((folder / worker.JOB).read_text())
    (folder / worker.JOB).write_text(json.dumps(job | {"created": time.time() - 1000}))
    assert launch.started(tmp_path)[0].state == "lost"


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"output": 3}', '{"output": "x", "created": "soon"}', '{"output": "x", "created": 1}',
     '{"output": "a\\u0000b", "created": 1, "kind": "scan"}', '{"output": "x", "created": 1, "kind": ["scan"]}'],
)  # fmt: skip
def test_folders_that_are_no_jobs_are_left_out(content: str, tmp_path: Path) -> None:
    folder = put(tmp_path, {})
    (folder / worker.JOB).write_text(content)
    assert launch.started(tmp_path) == []


def test_strange_words_about_progress_are_not_believed(tmp_path: Path) -> None:
    put(tmp_path, scan_job(tmp_path), state="done", at="soon", done="x", total=None, what=3)
    (job,) = launch.started(tmp_path)
    assert (job.state, job.done, job.total, job.what, job.seconds) == ("done", 0, 0, "3", 0.0)


def test_a_scan_stores_the_maps_that_it_was_asked_for(tmp_path: Path) -> None:
    folder = put(tmp_path, scan_job(tmp_path, maps="L4H9,top1:entropy"))
    assert worker.run(folder) == 0, launch.log(launch.started(tmp_path)[0])
    data = read_run(tmp_path / "made")
    assert "L4H9" in data.maps.heads and len(data.maps.heads) == 2


def test_no_more_jobs_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST", 1)
    put(tmp_path, scan_job(tmp_path))
    with pytest.raises(UserError, match="running already"):
        launch.start(tmp_path, scan_job(tmp_path))


def test_names_of_new_runs_are_free_and_stay_in_the_folder(tmp_path: Path) -> None:
    assert launch.free_name(tmp_path, "../../etc/x y") == tmp_path / "etc-x-y"
    (tmp_path / "a").mkdir()
    assert launch.free_name(tmp_path, "a") == tmp_path / "a-2"
    with pytest.raises(UserError, match="no folder name"):
        launch.free_name(tmp_path, "../..")


def test_new_runs_go_where_the_shown_ones_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "heads.parquet").touch()
    assert launch.home(Arguments((run,))) == tmp_path / "runs"
    assert launch.home(Arguments((tmp_path / "runs",))) == tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    assert launch.home(Arguments()) == tmp_path / "runs"


def test_an_app_without_jobs_starts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "parse", lambda: Arguments(jobs=False))
    with pytest.raises(UserError, match="--allow-jobs"):
        launch.start(tmp_path, scan_job(tmp_path))
    assert launch.started(tmp_path) == []
