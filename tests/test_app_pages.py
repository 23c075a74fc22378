"""Pages as Streamlit's own test harness runs them: what they show, what they remember, what they survive."""

from __future__ import annotations

import ast
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytest.importorskip("streamlit")

from app_opening import MAIN, open_page
from app_runs import embedded_data, hostile, write
from fake_run import fake_run
from streamlit.testing.v1 import AppTest
from streamlit.testing.v1.element_tree import Selectbox

from headscope.app.common import plain

PAGES = ("atlas", "head", "text", "map", "intervene", "experiments")
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"

Open = Callable[..., AppTest]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write(embedded_data(tokens=60), folder / "first")
    write(embedded_data(tokens=60, seed=1), folder / "second")
    write(hostile(embedded_data(tokens=40), ATTACK), folder / "third")
    return folder


@pytest.fixture
def show(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    def show_page(page: str, *extra: str, folder: Path | None = None, **query: str) -> AppTest:
        return open_page(monkeypatch, folder or runs, *extra, page=page, **query)

    return show_page


def html_of(test: AppTest) -> str:
    """Everything that is put into the page as HTML."""
    return "\n".join(node.proto.body for node in test.get("html"))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("run", ["first", "third"])
def test_every_page_opens(page: str, run: str, show: Open) -> None:
    test = show(page, run=run, head="L4H9", tokens="2")
    assert not test.exception and not test.error
    said = html_of(test)
    assert "hs-foot" in said and "<script" not in said and "<img" not in said
    if run == "third":
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in said


def test_choices_come_from_the_address_and_go_back_there(show: Open) -> None:
    test = show("atlas", score="entropy", second="none", top="17", picked="L0H1,L9H9,L2H3", run="second")
    assert test.selectbox(key="w_score").value == "entropy"
    found = {k: v if isinstance(v, str) else v[0] for k, v in test.query_params.items()}
    assert found == {"run": "second", "score": "entropy", "top": "17", "picked": "L0H1,L2H3"}


@pytest.mark.parametrize(
    "wrong", [{"score": "<b>"}, {"head": "L99H1"}, {"run": "none"}, {"page": "nowhere"}, {"top": "many"}]
)
def test_nonsense_in_the_address_opens_the_default(wrong: dict[str, str], show: Open) -> None:
    page = wrong.pop("page", "head" if "head" in wrong else "atlas")
    test = show(page, **wrong)
    assert not test.exception


@pytest.mark.parametrize("view", ["1-2-3", "a-b-c-d", "5-1-0-9", "0-9999-0-3", "7-20-1-30"])
def test_a_view_in_the_address_is_checked(view: str, show: Open) -> None:
    test = show("map", head="L0H0", view=view)
    assert not test.exception and not test.error


def test_a_choice_is_kept_across_pages(show: Open) -> None:
    test = show("head", head="L3H2")
    test.selectbox(key="w_head").set_value("L5H7").run()
    assert test.session_state["kept"]["head"] == "L5H7"
    test.session_state["kept"]["page"] = "map"
    test.run()
    assert test.selectbox(key="w_head").value == "L5H7" and not test.exception


def test_previous_and_next_step_through_the_heads(show: Open) -> None:
    test = show("head", head="L0H0")
    assert next(b for b in test.button if b.label == "Previous").disabled
    next(b for b in test.button if b.label == "Next").click().run()
    assert next(s for s in test.selectbox if s.label == "Head").value == "L0H1"


def test_heads_that_do_not_exist_are_refused_in_words(show: Open) -> None:
    test = show("intervene", edit="L77H1", tokens="2")
    assert not test.exception and "does not exist" in test.error[0].value


def test_every_technique_runs(show: Open) -> None:
    from headscope.app.techniques import TECHNIQUES

    test = show("intervene", edit="L4H9,L2H3", tokens="1", prompt="One two three one two")
    for name in TECHNIQUES:
        test.selectbox(key="w_technique").set_value(name).run()
        assert not test.exception and not test.error, name
        assert any("headscope.interventions" in c.value for c in test.code)


def test_own_text_is_read_by_the_live_model(show: Open) -> None:
    test = show("text", text="own text", words="Hello <b>world</b>.", head="L4H9")
    assert not test.exception and test.text_area(key="w_words").value == "Hello <b>world</b>."


def test_a_model_that_is_not_here_leaves_the_runs_numbers(show: Open) -> None:
    for page in ("head", "text", "map", "intervene"):
        test = show(page, "--model", "nobody/nothing")
        assert not test.exception and any("not a folder on this machine" in plainly(i.value) for i in test.info)


@pytest.mark.parametrize(("head", "said"), [("L9H3", "has layers 0 to 7"), ("L3H13", "has heads 0 to 11")])
def test_a_run_of_a_larger_model_than_the_live_one_says_so(head: str, said: str, show: Open, tmp_path: Path) -> None:
    data = fake_run(layers=10, heads=14, sequences=2, tokens=40)
    data.info["model"] |= {"name": "headscope-reference", "hash": None}
    write(data, tmp_path / "large")
    for page in ("head", "map", "text"):
        test = show(page, folder=tmp_path, head=head)
        assert not test.exception and not test.error, page
        assert any(said in plainly(i.value) and "--model FOLDER" in plainly(i.value) for i in test.info), page
        assert "hs-foot" in html_of(test) and "<b>Live</b>" not in html_of(test), page
        assert test.query_params["head"] in (head, [head]), page


def test_text_and_the_other_pages_share_a_head(show: Open) -> None:
    test = show("text", head="L3H2")

    def listed() -> Selectbox:
        return next(s for s in test.selectbox if s.label == "Head")

    def go(page: str) -> None:
        test.session_state["kept"]["page"] = page
        test.run()

    assert listed().value == "L3H2"
    listed().set_value("L5H7").run()
    go("head")
    assert listed().value == "L5H7"
    listed().set_value("L1H1").run()
    go("text")
    assert listed().value == "L1H1"
    listed().set_value("all heads").run()
    assert listed().value == "all heads" and "head" not in test.query_params
    test.run()
    assert listed().value == "all heads" and not test.exception


def test_a_half_copied_run_says_what_is_missing(show: Open, runs: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for name in ("run.json", "heads.parquet"):
        (half / name).write_bytes((runs / "first" / name).read_bytes())
    for page in ("atlas", "head", "text", "experiments"):
        test = show(page, folder=half)
        assert not test.exception and any("tokens.parquet" in plainly(w.value) for w in test.warning)


def test_no_run_at_all_says_how_to_make_one(show: Open, tmp_path: Path) -> None:
    test = show("atlas", folder=tmp_path)
    assert not test.exception and "headscope demo" in test.code[0].value


def test_without_runs_the_experiments_can_still_be_started(show: Open, tmp_path: Path) -> None:
    for part in ("sweeps", "compare", "new"):
        test = show("experiments", folder=tmp_path, part=part)
        assert not test.exception and not test.error
        assert any("Start a scan or sweep" in option for group in test.get("button_group") for option in group.options)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    needs: dict[str, set[str]] = {}
    for file in MAIN.parent.glob("*.py"):
        own = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.level == 1]
        needs[file.stem] = {name for n in own for name in ([n.module] if n.module else [a.name for a in n.names])}
    tuple(TopologicalSorter(needs).static_order())  # raises CycleError


def test_markdown_in_names_stays_text() -> None:
    assert plain("[x](y) *b* <i> $z$ :red[w] &lt;") == r"\[x\]\(y\) \*b\* \<i\> \$z\$ \:red\[w\] \&lt;"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (":smile:", r"\:~smile\:"),
        ("a:material/home:", r"a\:~material/home\:"),
        ("HTTP://y.z", r"HTTP\:~//y\.z"),
        ("Www.y", r"Www~\.y"),
        ("m@y.z", r"m@~y\.z"),
        ("a -> b <-> c -- d", r"a \-~\> b \<~\-\> c \-~\- d"),
        ("12:30 C:\\x {a: 1} a->b www @ -", r"12\:30 C\:\\x \{a\: 1\} a\-\>b www @ \-"),
        ("x\n===\n\n    y  \nz", r"x \=\=\= y z"),
    ],
)
def test_what_streamlit_makes_of_unescaped_text_is_kept_apart(text: str, left: str) -> None:
    """Here ``~`` stands for the word joiner; ordinary names get none, so that they can be copied."""
    assert plain(text).replace("\u2060", "~") == left


def plainly(text: str) -> str:
    return text.replace("\\", "")
