"""Pages on a run that carries maps: drawn without the model, and without a forward where the model is at hand."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("streamlit")

from app_opening import open_page
from streamlit.testing.v1 import AppTest

from headscope.app import components, live, views
from headscope.corpus import Sequence
from headscope.loading import load
from headscope.runs import write_run
from headscope.scan import ScanConfig, scan
from headscope.storedmaps import FILE

TOKENS = 90
Open = Callable[..., AppTest]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``far``: two heads on the first of two texts, of a model that is not here; ``near``: the same with the model;
    ``bare``: far away, without maps; ``broken``: with a damaged file of maps."""
    folder, scope = tmp_path_factory.mktemp("runs"), load(device="cpu")
    texts = [Sequence(_ids(i), f"text {i}") for i in range(2)]
    data = scan(scope, texts, ScanConfig(probes=(), maps="L4H9,L2H3"))
    write_run(data, folder / "near", report=False)
    data.info["model"] |= {"name": "far/away", "hash": "0" * 64}
    write_run(data, folder / "far", report=False)
    path = write_run(data, folder / "broken", report=False) / FILE
    path.write_bytes(path.read_bytes()[:-9])
    data.maps = type(data.maps)()
    write_run(data, folder / "bare", report=False)
    return folder


def _ids(number: int) -> torch.Tensor:
    return torch.randint(10, 4000, (TOKENS,), generator=torch.Generator().manual_seed(number))


@pytest.fixture
def show(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    return lambda page, run, **query: open_page(monkeypatch, runs / run, page=page, **query)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was last sent to the browser, by component."""
    found: dict[str, Any] = {}

    def record(name: str) -> None:
        draw = getattr(components, name)
        monkeypatch.setattr(
            components, name, lambda data, *args, **more: (found.update({name: data}), draw(data, *args, **more))[1]
        )

    for name in ("matrix", "text", "plot"):
        record(name)
    return found


def decoded(values: str, width: int) -> torch.Tensor:
    """The inverse of `views.encode`."""
    level = np.frombuffer(base64.b64decode(values), "<u2").astype(float)
    return torch.tensor(np.where(level == 0, 0.0, 10 ** ((level - 1) / 65534 * 8 - 8))).reshape(-1, width)


def wanted(head: str, rows: range = range(TOKENS), cols: range = range(TOKENS)) -> torch.Tensor:
    return load(device="cpu").tile(_ids(0), head, rows, cols).double()


def foot(test: AppTest) -> str:
    return next(body for body in (node.proto.body for node in test.get("html")) if "hs-foot" in body)


def choice(test: AppTest, name: str) -> Any:
    """The list of a choice; its key gets a number behind it once code has made the choice."""
    return next(s for s in test.selectbox if s.key.split("~")[0] == f"w_{name}")


def test_a_map_is_drawn_without_the_model(show: Open, sent: dict[str, Any]) -> None:
    """The first stored head opens by itself; the whole picture, then a zoom down to tokens."""
    test = show("map", "far")
    assert not test.exception and not test.error and not test.info
    assert choice(test, "head").value == "L4H9"
    tile = sent["matrix"]["tile"]
    torch.testing.assert_close(decoded(tile["values"], tile["w"]), wanted("L4H9"), atol=1e-6, rtol=1e-3)
    assert "<b>Maps</b> queries and keys of L4H9 on sequence 1, stored in the run" in foot(test)
    assert "<b>Live</b>" not in foot(test)
    show("map", "far", head="L2H3", view="40-50-3-20")
    tile = sent["matrix"]["tile"]
    assert (tile["r0"], tile["r1"], tile["c0"], tile["c1"], tile["cell"]) == (40, 50, 3, 20, 1)
    want = wanted("L2H3", range(40, 50), range(3, 20))
    torch.testing.assert_close(decoded(tile["values"], 17), want, atol=1e-6, rtol=1e-3)
    assert len(sent["matrix"]["words"]["rows"]) == 10


def test_a_long_map_is_previewed_and_then_exact(
    show: Open, sent: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limits of a long text set low: the page shows a preview and replaces it."""
    monkeypatch.setattr(views, "DIRECT", 40)
    monkeypatch.setattr(views, "BASE", 32)
    monkeypatch.setattr(views, "SCREEN", 16)
    test = show("map", "far", head="L4H9", view="0-90-0-90")
    for _ in range(20):
        if not any("Preview" in str(p.proto) for p in test.get("progress")):
            break
        test.run()
    tile = sent["matrix"]["tile"]
    assert not test.exception and tile["cell"] == 8 and not tile["sampled"]
    values = decoded(tile["values"], tile["w"])
    torch.testing.assert_close(values[:11].sum(1), torch.ones(11).double(), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("page", "query"), [("map", {"head": "L0H1"}), ("head", {"head": "L0H1"})])
def test_what_is_not_stored_is_said_and_what_is_is_one_click_away(
    page: str, query: dict[str, str], show: Open, sent: dict[str, Any]
) -> None:
    test = show(page, "far", **query)
    assert not test.exception and "L0H1" in choice(test, "head").value
    assert "far/away" in test.info[0].value.replace("\\", "") and "carries the maps" in test.info[0].value
    assert [b.label for b in test.button if b.label.startswith("L")] == ["L4H9", "L2H3"]
    sent.clear()
    next(b for b in test.button if b.label == "L2H3").click().run()
    assert not test.exception and choice(test, "head").value == "L2H3" and sent


def test_another_text_leads_back_to_the_stored_one(show: Open, sent: dict[str, Any]) -> None:
    test = show("map", "far", head="L4H9", text="1")
    assert "matrix" not in sent and "carries the maps" in test.info[0].value
    next(b for b in test.button if b.label == "L4H9").click().run()
    assert choice(test, "text").value == "0" and "matrix" in sent


def test_text_offers_the_stored_heads(show: Open, sent: dict[str, Any]) -> None:
    test = show("text", "far", head="L4H9")
    assert not test.exception and choice(test, "texthead").options == ["all heads, mean", *_labels(test)]
    assert "<b>Maps</b> queries and keys of L4H9" in foot(test)
    torch.testing.assert_close(decoded(sent["text"]["map"], TOKENS), wanted("L4H9"), atol=1e-6, rtol=1e-3)
    other = show("text", "far", head="L4H9", text="1")
    assert len(choice(other, "texthead").options) == 1 and not other.exception
    assert "<b>Maps</b>" not in foot(other)


def _labels(test: AppTest) -> list[str]:
    return [o for o in choice(test, "texthead").options if o.startswith(("L4H9", "L2H3"))]


def test_head_draws_its_examples_without_the_model(show: Open, sent: dict[str, Any]) -> None:
    test = show("head", "far", head="L4H9")
    said = "\n".join(node.proto.body for node in test.get("html"))
    assert not test.exception and 'class="strip"' in said and "hs-foot" in said
    assert sent["plot"]["file"] == "far-L4H9" and len(sent["plot"]["panels"]) == 3
    assert "<b>Maps</b> queries and keys of L4H9" in foot(test)


def test_with_the_model_at_hand_no_forward_is_run(show: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored heads come from the run; others, and other texts, from the model."""
    asked: list[int] = []
    capture = live.capture

    def watched(model: live.Live, ids: torch.Tensor, layer: int, tell: Any) -> Any:
        asked.append(layer)
        return capture(model, ids, layer, tell)

    monkeypatch.setattr(live, "capture", watched)
    for page in ("map", "head", "text"):
        test = show(page, "near", head="L4H9")
        assert not test.exception and not test.error and not asked, page
        assert "<b>Maps</b> queries and keys of L4H9 on sequence 1" in foot(test), page
    test = show("map", "near", head="L3H1")
    assert "<b>Maps</b>" not in foot(test) and "<b>Live</b>" in foot(test)
    assert not test.exception and asked == [3]
    assert "own text" in choice(test, "text").options


def test_without_maps_and_model_the_page_says_how_to_store_them(show: Open) -> None:
    for page in ("map", "head"):
        test = show(page, "bare")
        assert not test.exception and "headscope scan" in test.info[0].value, page


def test_a_damaged_file_of_maps_is_named_and_the_rest_shown(show: Open) -> None:
    test = show("map", "broken")
    assert not test.exception and FILE in test.warning[0].value.replace("\\", "")
    assert not show("atlas", "broken").exception
