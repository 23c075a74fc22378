"""Runs as the app finds them on disk: whole, broken, half-copied, or none at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("streamlit")

from app_runs import embedded_data, write

from headscope.app import shelf
from headscope.app.arguments import Arguments
from headscope.app.live import open_model, reference
from headscope.app.shelf import Entry, find


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(embedded_data(tokens=20, sequences=1), tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    target = tmp_path / "run"
    target.mkdir()
    for file in made.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def load(path: Path) -> Entry:
    shelf._load.clear()
    return shelf.load(path)


def test_a_whole_run_has_no_problems(run: Path) -> None:
    entry = load(run)
    assert entry.problems == [] and len(entry.data.heads) == 96 and entry.label == "run"


@pytest.mark.parametrize("name", ["tokens.parquet", "arrays.safetensors", "run.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_a_broken_file_is_named_and_the_rest_is_shown(run: Path, name: str, damage: str) -> None:
    whole = (run / name).read_bytes()
    if damage == "missing":
        (run / name).unlink()
    else:
        (run / name).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\x00<b>not it</b>")
    entry = load(run)
    assert any(name in p for p in entry.problems)
    assert len(entry.data.heads) == 96
    assert (len(entry.data.tokens) == 0) == (name == "tokens.parquet")


def test_without_heads_nothing_can_be_shown_but_the_reason(run: Path) -> None:
    (run / "heads.parquet").write_bytes(b"PAR1")
    entry = load(run)
    assert entry.data is None and any("heads.parquet" in p for p in entry.problems)


@pytest.mark.parametrize("change", [{"model": 3}, {"findings": {"a": 1}}, {"refused": "no"}, {"model": {"layers": 5}}])
def test_entries_of_the_wrong_kind_are_left_out(run: Path, change: dict) -> None:
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | change))
    entry = load(run)
    assert isinstance(entry.data.info["model"], dict) and isinstance(entry.data.info["model"]["layers"], list)
    assert isinstance(entry.data.info["findings"], list) and isinstance(entry.data.info["refused"], list)


def test_a_changed_run_is_read_anew(run: Path) -> None:
    assert load(run).problems == []
    (run / "tokens.parquet").unlink()
    assert shelf.load(run).problems != []


def test_a_file_outside_of_the_run_is_not_followed(run: Path, tmp_path: Path) -> None:
    info = json.loads((run / "run.json").read_text())
    (tmp_path / "secret").write_text("x")
    info["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (run / "run.json").write_text(json.dumps(info))
    assert any("outside the run" in p for p in load(run).problems)


def test_folders_of_runs_and_half_copied_runs_are_found(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "heads.parquet").write_bytes((run / "heads.parquet").read_bytes())
    (tmp_path / "other").mkdir()
    assert find([tmp_path]) == [half, run]
    assert find([run, run]) == [run]
    entry = load(half)
    assert len(entry.data.heads) == 96 and any("run.json" in p for p in entry.problems)


def test_a_model_that_is_not_here_is_not_fetched(run: Path) -> None:
    entry = load(run)
    assert reference(entry, Arguments()) is None
    assert reference(entry, Arguments(model="x/y")) == "x/y"
    for name in ("nobody/no-such-model", "x" * 5000, "x\x00y"):  # the last two are no names of files
        said = open_model(entry, Arguments(model=name))
        assert isinstance(said, str) and "--model FOLDER" in said


def test_runs_that_are_being_written_are_not_shown(run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / ".run.partial-123")
    assert find([tmp_path]) == []
