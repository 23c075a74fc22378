"""Whole maps behind a budget, and exact tiles at every zoom."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calls import KINDS, call_of
from torch import nn

import headscope as hs
from headscope.kernels.forward import forward
from headscope.kernels.sweep import naive
from headscope.kernels.tile import tile


@pytest.mark.parametrize("kind", KINDS)
def test_tile_is_a_piece_of_the_map(kind: str) -> None:
    """Odd rows and columns of one head of the second sequence, with and without a known lse."""
    torch.manual_seed(0)
    call = call_of(kind, 37, 60)
    batch, head = call.shape[0] - 1, 3
    truth = naive.pattern(call)[0][batch, head]
    for lse in (None, forward(call)[1] if call.pattern is None else None):
        piece = tile(call, lse, batch, head, range(5, 30), range(7, 55))
        torch.testing.assert_close(piece.double(), truth[5:30, 7:55], atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_columns_give_the_same_tile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows are read in several pieces where the normaliser is known; cells lie across their borders."""
    torch.manual_seed(2)
    call = call_of(kind, 70, 205)
    lse = forward(call)[1] if call.pattern is None else None
    whole = tile(call, None, 0, 2, range(3, 70), range(7, 200), (9, 11))
    monkeypatch.setattr("headscope.kernels.tile.WIDEST", 13)
    torch.testing.assert_close(tile(call, lse, 0, 2, range(3, 70), range(7, 200), (9, 11)), whole, atol=2e-6, rtol=0)
    pieces = tile(call, lse, 0, 2, range(3, 70), range(7, 200))
    full = tile(call, None, 0, 2, range(3, 70), range(7, 200))
    torch.testing.assert_close(pieces, full, atol=2e-6, rtol=0)


def test_pooled_tile_keeps_the_mass() -> None:
    """Each cell is the mean over its rows of the mass in its columns; rows of the whole picture sum to 1."""
    torch.manual_seed(1)
    call = call_of("causal", 205, 205)
    truth = naive.pattern(call)[0][0, 1]
    pooled = tile(call, None, 0, 1, range(205), range(205), (10, 7))
    rows = torch.arange(205) * 10 // 205
    cols = torch.arange(205) * 7 // 205
    expected = torch.zeros(10, 7, dtype=torch.float64)
    for r in range(10):
        for c in range(7):
            expected[r, c] = truth[rows == r][:, cols == c].sum() / (rows == r).sum()
    torch.testing.assert_close(pooled.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(pooled.sum(-1), torch.ones(10), atol=1e-6, rtol=0)


def test_maps_and_tiles_of_a_model_agree(tiny: Callable[..., nn.Module]) -> None:
    """run_with_cache and tile() give the same numbers; rows sum to 1."""
    scope = hs.Scope(tiny("llama"))
    ids = torch.arange(23)[None] % 20
    _, maps = scope.run_with_cache(ids, ["L1H2", "L0H0"])
    assert [str(h) for h in maps] == ["L0H0", "L1H2"] or set(map(str, maps)) == {"L0H0", "L1H2"}
    torch.testing.assert_close(maps["L1H2"].sum(-1), torch.ones(1, 23))
    piece = scope.tile(ids, "L1H2", rows=range(3, 20), cols=range(0, 9))
    torch.testing.assert_close(piece, maps["1.2"][0, 3:20, :9], atol=1e-6, rtol=0)


def test_budget_is_checked_before_the_forward(tiny: Callable[..., nn.Module]) -> None:
    """The message says how much it would take and what to do."""
    scope = hs.Scope(tiny("llama"))
    ran = []
    hook = scope.model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        assert scope.layers
        ran.clear()
        with pytest.raises(hs.UserError, match="GiB, more than the budget"):
            scope.run_with_cache(torch.zeros(1, 500, dtype=torch.long), budget=1000)
        assert not ran
    finally:
        hook.remove()


def test_bad_pieces(tiny: Callable[..., nn.Module]) -> None:
    """Rows outside the input, several heads at once, heads that were not captured."""
    scope = hs.Scope(tiny("llama"))
    ids = torch.zeros(1, 9, dtype=torch.long)
    with pytest.raises(hs.UserError, match="rows within 0..9"):
        scope.tile(ids, "L0H0", rows=range(0, 10))
    with pytest.raises(hs.UserError, match="one head"):
        scope.tile(ids, "L0H0-1")
    _, maps = scope.run_with_cache(ids, "L0H0")
    with pytest.raises(hs.UserError, match="was not captured"):
        maps["L1H0"]
