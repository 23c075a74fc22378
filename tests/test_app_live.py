"""The live model behind the app: what it captures is the model's own attention, and it is left as it was."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("streamlit")

from headscope.app import live, views
from headscope.app.effects import Effect, Outcome, measure
from headscope.app.live import Live, capture
from headscope.app.spectrum import product_values, spectra
from headscope.app.techniques import TECHNIQUES, call, python_code
from headscope.errors import UserError
from headscope.heads import HeadId
from headscope.interventions.base import from_yaml
from headscope.loading import load
from headscope.scope import Scope
from headscope.stats import Stats


def quiet(done: int, total: int, what: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def embedded() -> Live:
    return Live(load(device="cpu"), None)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "xlnet", "bloom"])
def test_what_is_captured_is_the_models_map(family: str, tiny: Callable[..., nn.Module]) -> None:
    try:
        model = tiny(family)
    except (KeyError, StopIteration, ValueError):
        pytest.skip(f"no tiny {family}")
    scope = Scope(model)
    ids = torch.randint(5, 60, (23,), generator=torch.Generator().manual_seed(0))
    layer = len(scope.layers) - 1
    got = capture(Live(scope, None), ids, layer, quiet)
    view = views.build(got, scope.layers[layer].heads - 1, quiet)
    _, maps = scope.run_with_cache(ids, f"L{layer}H{scope.layers[layer].heads - 1}")
    torch.testing.assert_close(
        view.exact(range(23), range(23)), maps[layer, scope.layers[layer].heads - 1][0], atol=2e-6, rtol=0
    )
    assert model.__dict__.get("_headscope") is None


def test_layers_on_the_way_are_kept_and_the_oldest_forgotten_beyond_the_room(
    embedded: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded.captures.clear()
    ids = torch.arange(5, 20)
    last = capture(embedded, ids, 2, quiet)
    assert sorted(layer for _, layer in embedded.captures) == [0, 1, 2]
    assert capture(embedded, ids, 2, quiet) is last
    one = last.query.nbytes + last.key.nbytes
    monkeypatch.setattr(live, "KEPT_BYTES", 2 * one)
    capture(embedded, ids, 4, quiet)
    assert sorted(layer for _, layer in embedded.captures) == [3, 4]
    monkeypatch.setattr(live, "KEPT_BYTES", 0)
    capture(embedded, ids, 1, quiet)
    assert [layer for _, layer in embedded.captures] == [1]


def test_a_capture_in_the_middle_is_that_layers_own(embedded: Live) -> None:
    ids = torch.arange(40, 61)
    embedded.captures.clear()
    capture(embedded, ids, 5, quiet)
    kept = embedded.captures[live.key_of(ids, 3)]
    embedded.captures.clear()
    alone = capture(embedded, ids, 3, quiet)
    torch.testing.assert_close(kept.query, alone.query)
    torch.testing.assert_close(kept.key, alone.key)


def test_a_cancelled_capture_leaves_the_model_free(embedded: Live) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        capture(embedded, torch.arange(5, 30), 3, stop)
    assert embedded.scope.model.__dict__.get("_headscope") is None
    assert capture(embedded, torch.arange(5, 30), 3, quiet).layer == 3


@pytest.mark.parametrize(
    ("layer", "head", "said"),
    [
        (8, 0, "Layer 8 is wanted.*has layers 0 to 7: use --model"),
        (3, 12, "Head 12 is wanted.*layer 3.*has heads 0 to 11: use --model"),
        (-1, 0, "Layer -1 is wanted"),
        (7, 11, None),
        (0, 0, None),
    ],
)
def test_a_head_that_the_model_lacks_is_named(layer: int, head: int, said: str | None, embedded: Live) -> None:
    found = live.lacking(embedded, layer, head)
    assert found is None if said is None else re.search(said, found)


def test_a_capture_of_a_layer_that_the_model_lacks_is_refused(embedded: Live) -> None:
    for layer in (8, -1):
        with pytest.raises(UserError, match="has layers 0 to 7: use --model"):
            capture(embedded, torch.arange(5, 30), layer, quiet)
    assert embedded.scope.model.__dict__.get("_headscope") is None


def test_singular_values_are_those_of_the_product(embedded: Live) -> None:
    left, right = torch.randn(30, 4), torch.randn(20, 4)
    torch.testing.assert_close(
        product_values(left, right), torch.linalg.svdvals(left @ right.T)[:4], atol=1e-4, rtol=1e-4
    )
    found = spectra(embedded.scope, HeadId(4, 9))
    assert found is not None and all(len(v) == 32 and bool((v[:-1] >= v[1:]).all()) for v in found)
    attention = embedded.scope.model.model.layers[4].self_attn
    query, key = attention.q_proj.weight[9 * 32 : 10 * 32], attention.k_proj.weight[3 * 32 : 4 * 32]
    direct = torch.linalg.svdvals((query.T @ key).double())[:32].float()
    torch.testing.assert_close(found[0], direct, atol=1e-4, rtol=1e-4)


def test_a_model_with_other_projections_has_no_spectrum(tiny: Callable[..., nn.Module]) -> None:
    assert spectra(Scope(tiny("gpt2")), HeadId(0, 0)) is None


def test_an_edit_shows_beside_the_plain_model(embedded: Live) -> None:
    edit = TECHNIQUES["zero"].build("L4H9,L4H10,L2H3,L4H11", 0.0)
    prompt = "Anna found a red key. Ben found a blue cup. Anna found a red key. Ben found a"
    told = []
    effect = measure(embedded, prompt, edit, 4, lambda *x: told.append(x))
    ids = torch.tensor([embedded.scope.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        out = embedded.scope.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert "".join(effect.before.text) == embedded.scope.tokenizer.decode(out[0, ids.shape[1] :])
    assert effect.after.loss > effect.before.loss + 0.2 and effect.divergence() > 0.1
    rows = effect.next_tokens(5)
    assert len(rows) == 5 and max(rows[0][1:]) >= max(rows[1][1:])
    assert len(told) == 10 and told[-1][0] <= told[-1][1]


def test_divergence_of_nothing_changed_is_zero() -> None:
    probs = torch.tensor([0.25, 0.75, 0.0])
    same = Outcome(probs, [], 0.0, Stats([]))
    assert abs(Effect(same, same, []).divergence()) < 1e-12
    assert [i for i, _, _ in Effect(same, same, []).next_tokens(2)] == [1, 0]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_can_be_copied_as_yaml_and_python(name: str) -> None:
    how = TECHNIQUES[name]
    edit = how.build("L0H1,L2H3", how.usual)
    (back,) = from_yaml(edit.to_yaml())
    assert back == edit
    scope: dict = {}
    code = python_code(None, edit, 'it\'s "quoted"\n', 5)
    compile(code, "copied", "exec")
    exec(code.splitlines()[1], scope)
    assert eval(call(edit), scope) == edit
