"""Mass on the keys whose label equals the query's: rows and keys sorted by label, so that matches lie in few tiles.

A tile of rows with neighbouring labels meets only the keys that hold those labels. In text about one pair of tokens in
a hundred matches, so this costs a few per cent of a sweep; at worst (all labels equal) it is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..call import AttentionCall
from ..request import Match
from ..triton_util import (
    DEAD,
    HIDDEN,
    INTERPRET,
    Tile,
    band,
    key_spans,
    logit_constants,
    scores,
    split_width,
    visible_tile,
)
from .matches import finder

_HIDDEN = tl.constexpr(HIDDEN)
_DEAD_FROM = tl.constexpr(DEAD / 10)
# A new text length must not compile anew.
_LENGTHS = ["n_tiles", "shift", "left", "right"]


@triton.jit(do_not_specialize=_LENGTHS)
def _matches_kernel(
    q_ptr, k_ptr, lse_ptr, run_ptr, order_ptr, real_ptr, out_ptr, qs, cap, H, G, Q, K, n_tiles, shift, left, right,
    sqb, sqh, sqr, sqd, skb, skh, skr, skd,
    PADDED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAP: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    IEEE: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    pid = tl.program_id(0)
    tile = pid % n_tiles
    bh = (pid // n_tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    at = tile * BM + tl.arange(0, BM)
    inside = at < Q
    run_ptr += b * 3 * Q + at
    rows = tl.load(run_ptr, mask=inside, other=0)
    begin = tl.load(run_ptr + Q, mask=inside, other=K)
    end = tl.load(run_ptr + 2 * Q, mask=inside, other=0)
    lse = tl.load(lse_ptr + bh * Q + rows, mask=inside, other=1e30)
    dims = tl.arange(0, D1)
    q_at = q_ptr + b * sqb + h * sqh + rows.to(tl.int64)[:, None] * sqr
    k_base = k_ptr + b * skb + (h // G) * skh
    q1 = tl.load(q_at + dims[None, :] * sqd, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    q2 = q1
    if D2 > 0:
        rest = D1 + tl.arange(0, D2)
        q2 = tl.load(q_at + rest[None, :] * sqd, mask=inside[:, None] & (rest < D)[None, :], other=0.0)
    total = tl.zeros([BM], tl.float32)
    last = tl.max(end, axis=0)
    for n0 in tl.range(tl.min(begin, axis=0), last, BN):
        slot = n0 + tl.arange(0, BN)
        listed = slot < last
        cols = tl.load(order_ptr + b * K + slot, mask=listed, other=0)
        k_at = k_base + cols.to(tl.int64)[None, :] * skr
        k1 = tl.load(k_at + dims[:, None] * skd, mask=listed[None, :] & (dims < D)[:, None], other=0.0)
        k2 = k1
        if D2 > 0:
            rest = D1 + tl.arange(0, D2)
            k2 = tl.load(k_at + rest[:, None] * skd, mask=listed[None, :] & (rest < D)[:, None], other=0.0)
        s = scores(q1, q2, k1, k2, qs, cap, CAP, D2, IEEE, UPCAST)
        x = s - lse[:, None] if CAP else s * qs - lse[:, None]
        same = (slot[None, :] >= begin[:, None]) & (slot[None, :] < end[:, None])
        same = same & visible_tile(rows, cols, shift, left, right, K, HAS_LEFT, HAS_RIGHT)
        if PADDED:
            key_real = tl.load(real_ptr + b * K + cols, mask=listed, other=0) != 0
            same = same & key_real[None, :] & (lse < _DEAD_FROM)[:, None]
        total += tl.sum(tl.exp2(tl.where(same, x, _HIDDEN)), axis=1)
    tl.store(out_ptr + bh * Q + rows, total, mask=inside)


def best_tile(call: AttentionCall) -> Tile:
    """Small tiles: a label has few tokens, and the keys come one by one from wherever they are."""
    if INTERPRET:
        return Tile(16, 16)
    if call.query.dtype == torch.float32 or call.query.shape[-1] > 128:
        return Tile(32, 32, 4, 2)
    return Tile(64, 32, 4, 2)


def match_mass(
    call: AttentionCall, lse2: Float[Tensor, "B H Q"], match: Match, tile: Tile | None = None
) -> Float[Tensor, "B H Q"]:
    """Σ_j P[i, j] over the keys j <= i - lag that bear row i's label, given the base-2 lse (``base2_lse``)."""
    b, h, _, q, k = call.shape
    tile = tile or best_tile(call)
    runs, order = finder(match, call).runs
    shift, left, right, has_left, has_right = band(call)
    padded = call.visible.keys is not None or call.real is not None
    out = torch.empty(b, h, q, device=call.query.device)
    qs, cap = logit_constants(call)
    d1, d2 = split_width(call.query.shape[-1])
    n_tiles = triton.cdiv(q, tile.rows)
    _matches_kernel[(n_tiles * b * h,)](
        call.query, call.key, lse2, runs, order, key_spans(call)[0] if padded else lse2, out,
        qs, cap, h, call.groups, q, k, n_tiles, shift, left, right,
        *call.query.stride(), *call.key.stride(),
        PADDED=padded, HAS_LEFT=has_left, HAS_RIGHT=has_right, CAP=call.softcap is not None,
        D=call.query.shape[-1], D1=d1, D2=d2, BM=tile.rows, BN=tile.cols,
        IEEE=call.query.dtype == torch.float32, UPCAST=INTERPRET, **tile.options(),
    )  # fmt: skip
    return out
