"""What a run holds may be anything: no page takes it for markup, loads what it names, or ends in a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("streamlit")

from app_opening import open_page
from app_runs import embedded_data, hostile, small_sweep, write
from streamlit.testing.v1 import AppTest

from headscope.app import shelf
from headscope.app.common import labels
from headscope.rundata import RunData

IMAGE = "![x](http://evil.example/a.png)"
MARKS = ":smile: :material/home: :streamlit: :red[x] $x^2$ http://evil.example/b www.evil.example a@evil.org -> &lt;"
ATTACK = f"{IMAGE}{MARKS}<script>alert(1)</script><img src=x onerror=alert(2)>`q`\"'\u202eRTL\n# new"
FOLDER = "![x](http:evil.example)<b>`q`\"'\u202eRTL :streamlit: :red[x] $x^2$ www.evil.example a@evil.example"
# What Streamlit looks for in the text that is left once escapes are gone, and what an escape does stop.
LATE = re.compile(r":[\w+-]+:|:material/|https?://|www\.|\w@\w|(^|\s)->(\s|$)|\n", re.I)
EARLY = re.compile(r"(?<!\\)(\$x|:red|!\[x|\[x|&lt;|<b|`q)")
# What Streamlit shows as it stands; in everything else it reads Markdown.
VERBATIM = {"Selectbox.options", "Selectbox.raw_value", "TextInput.default", "TextArea.default", "Text.body"}
VERBATIM |= {"Code.code_text", "BidiComponent.json", "Html.body"}
OURS = (".id", ".icon", ".url", ".css_content", ".js_content")  # fields that hold no words of a run

VISITS = [
    {"page": "atlas"}, {"page": "head", "head": "L4H9"}, {"page": "text", "head": "L4H9"},
    {"page": "map", "head": "L4H9"}, {"page": "intervene", "tokens": "1", "prompt": "One two, one", "edit": "L4H9"},
    {"page": "experiments", "part": "compare"}, {"page": "experiments", "part": "new"},
]  # fmt: skip


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    return partial(open_page, monkeypatch)


def texts(message: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a message of Streamlit, with the name of its field."""
    for field, value in message.ListFields():
        for one in [value] if isinstance(value, str | bytes | bool | int | float) else _each(value):
            if isinstance(one, str):
                yield f"{path}.{field.name}", one
            elif hasattr(one, "ListFields"):
                yield from texts(one, f"{path}.{field.name}")


def _each(value: Any) -> list[Any]:
    if hasattr(value, "ListFields"):
        return [value]
    return list(value.values()) if hasattr(value, "values") else list(value)


def nodes(block: Any) -> Iterator[Any]:
    for child in getattr(block, "children", {}).values():
        yield child
        yield from nodes(child)


def leaks(test: AppTest) -> set[str]:
    """Fields in which Markdown would find an image, a link, an icon, a colour or a formula."""
    found = set()
    for node in nodes(test._tree):
        proto = getattr(node, "proto", None)
        for name, text in texts(proto) if hasattr(proto, "ListFields") else ():
            field = type(proto).__name__ + name
            if field not in VERBATIM and not field.endswith(OURS) and read_as_markup(text):
                found.add(f"{field}: {text[:200]}")
            if field == "Html.body":
                assert "<script" not in text and "<img" not in text and "<b>`q`" not in text
    return found


def read_as_markup(text: str) -> bool:
    """Whether Streamlit's Markdown would find something in a text that our own words do not hold."""
    return bool(EARLY.search(text) or LATE.search(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)))


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wild")
    data = hostile(embedded_data(tokens=24), ATTACK)
    for name in (IMAGE, "a|b*c*<i>"):
        data.heads[name] = np.linspace(0, 1, len(data.heads))
        data.info["columns"][name] = ATTACK
    data.info["interventions"] = [{ATTACK: {ATTACK: ATTACK}}]
    write(data, folder / FOLDER)
    other = hostile(embedded_data(tokens=24, seed=2), ATTACK)
    other.info["model"]["name"] = ATTACK
    write(other, folder / "other")
    small_sweep(folder / f"swept {FOLDER}", order=("desc",))
    return folder


@pytest.mark.parametrize("visit", VISITS, ids=lambda v: v.get("part") or v["page"])
def test_no_text_of_a_run_is_markup(visit: dict[str, str], wild: Path, show: Callable[..., AppTest]) -> None:
    named_so = visit["page"] in ("atlas", "map") or "part" in visit
    for run in (FOLDER, *(["other"] if named_so else [])):
        test = show(wild, run=run, score=IMAGE, **visit)
        assert not test.exception
        assert leaks(test) == set()


def test_no_text_of_a_sweep_or_a_job_is_markup(wild: Path, show: Callable[..., AppTest]) -> None:
    job = wild / ".headscope-jobs" / "20250101-000000-abcdef"
    job.mkdir(parents=True)
    facts = {"kind": "scan", "output": f"{wild}/{FOLDER}", "created": 1.0}
    (job / "job.json").write_text(json.dumps(facts))
    (job / "progress.json").write_text(json.dumps({"state": "failed", "error": ATTACK, "what": ATTACK}))
    test = show(wild, page="experiments", part="sweeps")
    assert not test.exception and "failed" in test.markdown[0].value
    assert leaks(test) == set()


def numbers_gone(data: RunData) -> None:
    data.heads[data.scores] = np.nan


def no_heads(data: RunData) -> None:
    data.heads = data.heads.iloc[:0]


def one_head(data: RunData) -> None:
    data.heads, data.tokens = data.heads.iloc[:1], data.tokens.iloc[:1]


def absurd_numbers(data: RunData) -> None:
    data.heads.loc[0, ["layer", "head_id"]] = [300_000, "L300000H0"]


def negative_layer(data: RunData) -> None:
    data.heads.loc[0, ["layer", "head_id"]] = [-1, "L-1H0"]


def foreign_tokens(data: RunData) -> None:
    data.tokens["token_id"] = 10**6


def infinite(data: RunData) -> None:
    data.heads[["entropy", "induction_score"]] = np.inf


def strange_records(data: RunData) -> None:
    data.info["findings"] = [
        {"column": ["a"]}, {"column": "entropy", "heads": 5, "threshold": "x"}, {"column": "sum_sq", "n": 10**400},
        {"column": "distance", "heads": [["L0H1"], None]}, {"column": "entropy", "threshold": 1.0},
    ]  # fmt: skip
    data.info["model"]["layers"] = [{"heads": 10**9, "kv_heads": 10**8}, {"heads": "8", "kv_heads": 2.5}]
    data.info["refused"] = [{"layer": 10**12, "name": 3, "reason": ["x"]}, {"layer": -5}, {"layer": True}]
    data.info["sequences"] = [{"source": {"a": 1}, "n_tokens": "x"}]
    data.info["interventions"], data.info["sampled_rows"] = [{"A": 5}], [1]
    data.info["seed"], data.info["created"] = {"x": []}, {"a": 1}


BROKEN = (
    numbers_gone, no_heads, one_head, absurd_numbers, negative_layer, foreign_tokens, infinite, strange_records,
)  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    for change in BROKEN:
        data = embedded_data(tokens=12)
        change(data)
        write(data, folder / change.__name__)
    return folder


@pytest.mark.parametrize("name", [c.__name__ for c in BROKEN])
def test_no_page_ends_in_a_traceback(name: str, broken: Path, show: Callable[..., AppTest]) -> None:
    for visit in VISITS[:5]:
        test = show(broken, run=name, **{k: v for k, v in visit.items() if k != "head"})
        assert not test.exception, (visit, test.exception)
        if name == "foreign_tokens" and visit["page"] == "head":
            assert "vocabulary" in test.error[0].value
        if name in ("no_heads", "absurd_numbers", "negative_layer"):
            assert any("heads" in w.value for w in test.warning)


def test_a_folder_that_may_not_be_read_is_no_run_or_one_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()

    def refuse(path: Path, *_: object) -> Any:
        if path == locked or locked in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real[1](path)

    real = (Path.is_file, Path.iterdir)
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert shelf.find([tmp_path]) == [] and shelf.find_sweeps([locked]) == []
    monkeypatch.setattr(Path, "is_file", lambda path: refuse(path) if locked in path.parents else real[0](path))
    assert shelf.find([tmp_path]) == [locked]
    entry = shelf.load(locked)
    assert entry.data is None and "Permission denied" in " ".join(entry.problems)


def test_runs_of_the_same_name_can_all_be_chosen(tmp_path: Path) -> None:
    paths = [tmp_path / p for p in ("a/x/run", "b/x/run", "b/x/other", "run")]
    names = labels(paths)
    assert len(set(names)) == 4 and names[:3] == ["a/x/run", "b/x/run", "other"]
    assert labels([tmp_path, tmp_path]) == [str(tmp_path).replace("/", "//", 1)] * 2
