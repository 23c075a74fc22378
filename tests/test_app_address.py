"""Links: every choice that a colleague would want is in the address, comes back from it, and is not lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")

from app_opening import open_page
from app_runs import embedded_data, small_sweep, write
from streamlit.runtime.state.query_params_proxy import QueryParamsProxy
from streamlit.testing.v1 import AppTest

from headscope.app.state import LINKED

Open = Callable[..., AppTest]

VIEWS = {
    "atlas": {"run": "two", "score": "sink_rate", "second": "distance", "top": "17", "lowest": "1",
              "picked": "L0H1,L2H3", "shade": "log"},
    "head": {"run": "two", "head": "L4H9", "text": "1"},
    "text": {"run": "two", "head": "L4H9", "text": "1", "mode": "given", "log": "1", "hide": "1", "token": "3",
             "marks": "0"},
    "own": {"page": "text", "run": "two", "head": "L2H3", "text": "own text", "words": "A lamp; a desk.",
            "mode": "given"},
    "map": {"run": "two", "head": "L4H9", "text": "1", "view": "3-12-2-11", "linear": "1"},
    "intervene": {"run": "two", "edit": "L2H3,L4H9", "technique": "temperature", "strength": "0.7", "tokens": "2",
                  "prompt": "One two, one", "statistic": "distance", "pickscore": "sink_rate"},
    "compare": {"page": "experiments", "part": "compare", "run": "two", "other": "one", "score": "distance"},
    "sweeps": {"page": "experiments", "part": "sweeps", "sweep": "swept", "versus": "again"},
    "scan": {"page": "experiments", "part": "new", "kind": "scan", "source": "own", "sample": "A lamp; a desk.",
             "probes": "default,retrieval", "seqlen": "64", "limit": "3", "maps": "L4H9,top2:entropy",
             "newrun": "lamps"},
    "prune": {"page": "experiments", "part": "new", "kind": "prune", "tasks": "ppl;niah{lengths: [64], needles: 1}",
              "rank": "sink;mine.json", "k": "0:8:2", "order": "asc", "seeds": "3", "batch": "4", "newsweep": "cut"},
    "each": {"page": "experiments", "part": "new", "kind": "leave-one-out", "tasks": "capitals", "heads": "L0H0-3",
             "batch": "2", "newsweep": "alone"},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write(embedded_data(tokens=40), folder / "one")
    write(embedded_data(tokens=40, seed=1), folder / "two")
    small_sweep(folder / "swept")
    small_sweep(folder / "again", order=("desc",))
    return folder


@pytest.fixture
def show(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    return partial(open_page, monkeypatch, runs)


def address(test: AppTest) -> dict[str, str]:
    return {k: v if isinstance(v, str) else v[0] for k, v in test.query_params.items()}


def told(test: AppTest) -> dict[str, Any]:
    """What a browser that knows nothing but the last message would show in each widget, by its label."""
    said: dict[str, Any] = {}
    for kind in ("selectbox", "toggle", "slider", "number_input", "text_input", "text_area", "multiselect"):
        for widget in getattr(test, kind):
            proto = widget.proto
            if kind == "selectbox":
                said[widget.label] = proto.raw_value if proto.set_value else proto.options[proto.default]
            elif kind == "multiselect":
                said[widget.label] = [proto.options[i] for i in proto.default]
            elif kind == "slider":
                said[widget.label] = proto.default[0]
            else:
                said[widget.label] = proto.default
    for group in test.get("button_group"):
        said[group.proto.label] = [group.proto.options[i].content for i in group.proto.default]
    return said


SHOWN = {
    "atlas": {"Score": "sink rate", "Second score": "distance"},
    "head": {"Text": "2. demo text 2 (40 tokens)"},
    "text": {"Shade by attention": ["attention given"], "Log shading": True, "Hide sink": True},
    "own": {"Text": "own text", "Text to read": "A lamp; a desk.", "Shade by attention": ["attention given"]},
    "intervene": {"Technique": "Temperature", "Tau": 0.7, "Tokens to generate": 2, "Statistic": "distance"},
    "compare": {"Compared with": "one", "Score": "distance"},
    "sweeps": {"Sweep": "swept", "Compared with": "again"},
    "scan": {
        "Longest sequence, tokens": 64,
        "Text to read": "A lamp; a desk.",
        "Store the maps of heads": "L4H9,top2:entropy",
    },
    "prune": {"Tasks": ["ppl", "niah{lengths: [64], needles: 1}"], "Order": ["asc"], "Random draws": 3},
    "each": {"Tasks": ["capitals"], "Heads": "L0H0-3"},
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_link_reopens_its_view_in_every_message(name: str, show: Open) -> None:
    """A click before the first drawing has reached the browser starts a second one; all of the first may be lost.

    What the widgets of the second say must then still be what the link asked for, for the browser sends it back.
    """
    query = VIEWS[name]
    test = show(**({} if "page" in query else {"page": name}), **query)
    assert not test.exception and not test.error
    found, first = address(test), told(test)
    assert found.items() >= query.items() and first.items() >= SHOWN.get(name, {}).items()
    again = show(**found)
    assert address(again) == found, "the address that a view writes is its own"
    if "Head" in first and "head" in query:
        assert first["Head"].startswith(query["head"])
    if name in SHOWN:
        assert told(test.run()) == first and address(test) == found


@pytest.mark.parametrize("name", VIEWS)
def test_a_visit_is_one_step_of_the_browsers_history(name: str, show: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, str]] = []
    put = QueryParamsProxy.from_dict
    monkeypatch.setattr(QueryParamsProxy, "from_dict", lambda self, new: (written.append(dict(new)), put(self, new))[1])
    query = VIEWS[name]
    show(page=query.get("page", name), **{k: query[k] for k in ("part", "kind") if k in query})
    assert len(written) == 1


HOSTILE = ["", "<script>alert(1)</script>\x00", "-1", "nan", "9" * 5000, "../.."]


@pytest.mark.parametrize("wrong", HOSTILE)
def test_nonsense_in_any_place_of_an_address_opens_the_default(wrong: str, show: Open) -> None:
    for name in ("atlas", "scan", "prune", "each", "compare"):
        query = VIEWS[name]
        fixed = {k: query[k] for k in ("page", "part", "kind") if k in query} or {"page": name}
        test = show(**dict.fromkeys(query, wrong) | fixed)
        assert not test.exception, (name, wrong)
        assert not test.error or name in ("scan", "prune", "each"), "free text may be refused, in words"


@pytest.mark.parametrize("wrong", ["nan", "1e999", "<script>", "-5"])
def test_nonsense_about_an_edit_opens_the_default(wrong: str, show: Open) -> None:
    query = dict.fromkeys(VIEWS["intervene"], wrong) | {"page": "intervene", "edit": "L4H9", "prompt": "One two"}
    test = show(**query, task=wrong)
    assert not test.exception and not test.error
    assert told(test)["Technique"] == "Remove (zero output)" and told(test)["Tokens to generate"] == 32


def test_the_address_follows_a_choice_at_once(show: Open) -> None:
    test = show(page="intervene", edit="L4H9", tokens="1", prompt="One two")
    next(s for s in test.selectbox if s.label == "Statistic").set_value("distance").run()
    assert address(test)["statistic"] == "distance"


def test_another_score_has_its_own_number_of_heads(show: Open) -> None:
    test = show(page="atlas", score="induction_score", top="50")
    assert address(test)["top"] == "50"
    next(s for s in test.selectbox if s.label == "Score").set_value("distance").run()
    assert address(test)["top"] == "10"


def test_another_technique_has_its_own_strength(show: Open) -> None:
    test = show(page="intervene", edit="L4H9", tokens="1", prompt="One two", technique="scale", strength="3.5")
    assert told(test)["Factor"] == 3.5
    next(s for s in test.selectbox if s.label == "Technique").set_value("temperature").run()
    assert told(test)["Tau"] == 0.5 and address(test)["strength"] == "0.5"


def test_a_text_too_long_for_a_link_is_left_out_and_said_so(show: Open) -> None:
    test = show(page="experiments", part="new", kind="scan", source="own", sample="word " * LINKED)
    assert "sample" not in address(test) and not test.exception
    assert any("not in the page's link" in c.value for c in test.caption)


def test_going_back_reopens_the_address_and_leaves_it_alone(show: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    import streamlit as st

    from headscope.app import state

    session: dict[str, Any] = {"w_texthead": "L0H1"}
    monkeypatch.setattr(st, "session_state", session)
    monkeypatch.setattr(st, "query_params", Params({"score": "entropy", "top": "9"}))
    state.turn()
    assert state.recall("score", "x") == "entropy"
    state.choose("score", "distance")
    state.show(score="distance", top="9")
    assert st.query_params.to_dict() == {"score": "distance", "top": "9"}
    before = state.key_of("score")
    state.reopen("?score=entropy")
    state.turn()
    assert state.recall("score", "x") == "entropy" and state.recall("top", None) is None
    assert state.key_of("score") != before, "the browser's old widget must not answer"
    assert "w_texthead" not in session
    written = list(st.query_params.written)
    state.show(score="entropy", top="10")
    state.turn()
    state.show(score="entropy", top="10")
    assert st.query_params.written == written
    state.show(score="entropy", top="11")
    assert st.query_params.to_dict() == {"score": "entropy", "top": "11"}


class Params(dict):
    """Query parameters as Streamlit has them."""

    def __init__(self, given: dict[str, str]) -> None:
        super().__init__(given)
        self.written: list[dict[str, str]] = []

    def to_dict(self) -> dict[str, str]:
        return dict(self)

    def from_dict(self, new: dict[str, str]) -> None:
        self.written.append(new)
        self.clear()
        self.update(new)
