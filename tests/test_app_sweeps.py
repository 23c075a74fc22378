"""The Experiments page and the task score: what they draw is what the sweep and the task say."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("streamlit")

from app_opening import open_page
from app_runs import TASK, embedded_data, small_sweep, write
from streamlit.testing.v1 import AppTest
from typer.testing import CliRunner

from headscope.app import scoring, shelf, sweeps
from headscope.app.begin import sweep_job
from headscope.app.effectmap import effect_grid
from headscope.app.live import Live
from headscope.app.picker import named
from headscope.app.techniques import command_code
from headscope.cli import app as cli
from headscope.experiments import PruneSweep
from headscope.experiments.results import SweepResult
from headscope.interventions.ablate import Ablate
from headscope.interventions.base import from_yaml
from headscope.interventions.scale import Scale
from headscope.loading import load
from headscope.tasks import make_task, score


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    write(embedded_data(tokens=40), root / "first")
    write(embedded_data(tokens=40, seed=1), root / "second")
    small_sweep(root / "swept")
    small_sweep(root / "again", order=("desc",))
    return root


def show(folder: Path, monkeypatch: pytest.MonkeyPatch, **query: str) -> AppTest:
    return open_page(monkeypatch, folder, **{"page": "experiments", **query})


def html_of(test: AppTest) -> str:
    return "\n".join(node.proto.body for node in test.get("html"))


def test_sweeps_are_found_and_are_no_runs(folder: Path) -> None:
    assert [p.name for p in shelf.find_sweeps([folder])] == ["again", "swept"]
    assert [p.name for p in shelf.find([folder])] == ["first", "second"]
    assert shelf.find([folder / "swept"]) == [] and shelf.find_sweeps([folder / "swept"]) == [folder / "swept"]
    assert shelf.is_result(folder / "swept") and not shelf.is_result(folder)


def test_a_chart_holds_the_curves_of_the_sweep(folder: Path) -> None:
    result = SweepResult(folder / "swept")
    chart = sweeps.chart(result, None, TASK, 0)
    curves = result.curves()
    assert [x["order"] for x in chart["lines"]] == ["desc", "random"] and chart["range"] == [0.0, 1.0]
    for line in chart["lines"]:
        rows = curves[curves["order"] == line["order"]]
        assert line["k"] == [0, 1, 2]
        for part in ("score", "low", "high"):
            np.testing.assert_allclose(line[part], rows[part], atol=1e-5)


def test_two_sweeps_share_a_chart_and_keep_their_names(folder: Path) -> None:
    results = [SweepResult(folder / n) for n in ("swept", "again")]
    lines = sweeps.chart(*results, TASK, 0)["lines"]
    assert [x["name"].split(":")[0] for x in lines][-1] == "again" and len({x["colour"] for x in lines}) == 2


def test_every_part_of_the_page_opens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for query in (
        {"sweep": "swept"}, {"sweep": "swept", "versus": "again"}, {"part": "compare", "other": "second"},
        {"part": "new", "kind": "scan"}, {"part": "new", "kind": "prune"}, {"part": "new", "kind": "leave-one-out"},
    ):  # fmt: skip
        test = show(folder, monkeypatch, **query)
        assert not test.exception and not test.error, (query, test.exception, test.error)
        assert "hs-foot" in html_of(test)
    said = html_of(show(folder, monkeypatch, sweep="swept", versus="again"))
    assert "Area under each curve" in said and "again minus swept" in said


def test_a_damaged_sweep_is_named_and_the_page_stays(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "sweep.db").write_bytes(b"no database at all" * 100)
    test = show(tmp_path, monkeypatch, sweep="bad")
    assert not test.exception and "bad" in test.error[0].value


def test_the_command_of_a_new_sweep_says_what_differs_from_the_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    job = sweep_job(None, PruneSweep(k=(0, 4), seeds=3, tasks=("ppl",)), "my sweep")
    assert job["command"] == "headscope sweep prune --tasks ppl --k 0,4 --seeds 3 -o 'my sweep'"
    assert job["fields"]["k"] == [0, 4] and job["fields"]["sweep"] == "prune"


def test_the_command_of_a_new_scan_names_the_maps_to_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = show(folder, monkeypatch, part="new", kind="scan", maps="L4H9,top2:entropy", newrun="kept maps")
    assert test.code[0].value.endswith("--maps L4H9,top2:entropy -o kept-maps")
    test = show(folder, monkeypatch, part="new", kind="scan", maps="topmost")
    assert not test.exception and "top8:retrieval_score" in test.error[0].value.replace("\\", "")


def test_an_edit_as_a_command_does_what_the_page_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = Scale("L0H1,L2H3", 2.5)
    said = command_code("models/x y", edit, "ppl").splitlines()
    assert said[-1] == "headscope eval 'models/x y' --intervene edit.yaml --compare --tasks ppl"
    (back,) = from_yaml("\n".join(said[1:-2]))
    assert back == edit
    monkeypatch.chdir(tmp_path)
    script = command_code(None, Ablate("L4H9,L4H10,L2H3,L4H11"), TASK)
    Path("edit.yaml").write_text("\n".join(script.splitlines()[1:-2]))
    found = CliRunner().invoke(cli, [*shlex.split(script.splitlines()[-1])[1:], "--device", "cpu", "--json"])
    assert found.exit_code == 0, found.output
    assert "repeats" in found.stdout


def test_a_task_score_is_the_tasks_own_before_and_after() -> None:
    scope = load(device="cpu")
    edit, told = Ablate("L4H9,L4H10,L2H3,L4H11"), []
    effect = scoring.measure(Live(scope, None), edit, "repeats{n: 9, segment: 8}", lambda *said: told.append(said))
    items = make_task("repeats{n: 9, segment: 8}").examples(scope.tokenizer)
    np.testing.assert_allclose(effect.before, score(scope, items, 8).accuracy)
    with scope.intervene(edit):
        np.testing.assert_allclose(effect.after, score(scope, items, 8).accuracy)
    change = effect.difference()
    assert change.value == pytest.approx(float((effect.after - effect.before).mean())) and change.value < -0.3
    assert [done for done, _, _ in told] == [0, 8, 9, 17] and all(total == 18 for _, total, _ in told)


def test_heads_named_in_a_text_are_those_of_the_run(folder: Path) -> None:
    entry = shelf.load(folder / "first")
    assert named(entry, "L0H1-2, 5.1") == ["L0H1", "L0H2", "L5H1"]
    assert named(entry, "L99H1") == [] and named(entry, "nonsense <b>") == []


def test_effects_of_single_heads_stand_on_a_scale_centred_at_zero() -> None:
    import pandas as pd

    rows = pd.DataFrame({"head": ["L0H1", "L7H11"], "change": [0.1, -0.4], "se": [0.01, float("nan")]})
    grid = effect_grid(rows, "x", "right")
    assert (grid["high"], grid["signed"], grid["columns"], grid["se"][1]) == (0.4, True, 12, None)
    assert [row["n"] for row in grid["layers"]] == [0, 7]
