"""Block mass and block maximum on a GPU: one sweep given lse, one number written per block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..call import AttentionCall
from ..triton_util import (
    HIDDEN,
    INTERPRET,
    band,
    floor_to,
    key_spans,
    logit_constants,
    scores,
    split_width,
    visible_tile,
)

EDGES = (16, 32, 64, 128)
_HIDDEN = tl.constexpr(HIDDEN)


# A new text length must not compile anew.
_LENGTHS = ["QB", "KB", "n_tiles", "shift", "left", "right"]


@triton.jit(do_not_specialize=_LENGTHS)
def _blocks_kernel(
    q_ptr, k_ptr, lse_ptr, real_ptr, mass_ptr, max_ptr, qs, cap, H, G, Q, K, QB, KB, n_tiles, shift, left, right,
    sqb, sqh, sqr, sqd, skb, skh, skr, skd,
    MASS: tl.constexpr, MAX: tl.constexpr, PADDED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    CAP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EDGE: tl.constexpr, IEEE: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    pid = tl.program_id(0)
    bh = (pid // n_tiles).to(tl.int64)
    tile = n_tiles - 1 - pid % n_tiles
    b = bh // H
    h = bh % H
    r0 = tile * BM
    rows = r0 + tl.arange(0, BM)
    inside = rows < Q
    dims = tl.arange(0, D1)
    q_base = q_ptr + b * sqb + h * sqh + rows.to(tl.int64)[:, None] * sqr
    q1 = tl.load(q_base + dims[None, :] * sqd, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    q2 = q1
    rest = D1 + tl.arange(0, D2 if D2 > 0 else 16)
    if D2 > 0:
        q2 = tl.load(q_base + rest[None, :] * sqd, mask=inside[:, None] & (rest < D)[None, :], other=0.0)
    lse = tl.load(lse_ptr + bh * Q + rows, mask=inside, other=1e30)
    alive = lse < 1e29
    at_first = r0 + shift
    at_last = tl.minimum(r0 + BM, Q) - 1 + shift
    lo = 0
    hi = K
    if HAS_LEFT:
        lo = floor_to(at_first - left, BN)
    if HAS_RIGHT:
        hi = tl.minimum(K, at_last + right + 1)
    k_base = k_ptr + b * skb + (h // G) * skh
    down = tl.arange(0, BM // EDGE)
    across = tl.arange(0, BN // EDGE)
    wide = tl.cast(skr, tl.int64)
    for n0 in tl.range(lo, hi, BN):
        cols = n0 + tl.arange(0, BN)
        at = k_base + n0 * wide + tl.arange(0, BN)[None, :] * skr
        k1 = tl.load(at + dims[:, None] * skd, mask=(cols < K)[None, :] & (dims < D)[:, None], other=0.0)
        k2 = k1
        if D2 > 0:
            k2 = tl.load(at + rest[:, None] * skd, mask=(cols < K)[None, :] & (rest < D)[:, None], other=0.0)
        s = scores(q1, q2, k1, k2, qs, cap, CAP, D2, IEEE, UPCAST)
        if not CAP:
            s = s * qs
        seen = visible_tile(rows, cols, shift, left, right, K, HAS_LEFT, HAS_RIGHT) & alive[:, None]
        if PADDED:
            seen = seen & (tl.load(real_ptr + b * K + cols, mask=cols < K, other=0) != 0)[None, :]
        p = tl.exp2(tl.where(seen, s - lse[:, None], _HIDDEN))
        cells = tl.reshape(p, (BM // EDGE, EDGE, BN // EDGE, EDGE))
        row_block = r0 // EDGE + down
        col_block = n0 // EDGE + across
        at_out = (bh * QB + row_block)[:, None] * KB + col_block[None, :]
        fits = (row_block < QB)[:, None] & (col_block < KB)[None, :]
        if MASS:
            tl.store(mass_ptr + at_out, tl.sum(tl.sum(cells, axis=3), axis=1), mask=fits)
        if MAX:
            tl.store(max_ptr + at_out, tl.max(tl.max(cells, axis=3), axis=1), mask=fits)


def block_maps(
    call: AttentionCall, edge: int, outputs: frozenset[str], lse2: Float[Tensor, "B H Q"]
) -> dict[str, Tensor]:
    """``block_mass`` and ``block_max`` for edges in ``EDGES``, given the base-2 lse."""
    b, h, _, q, k = call.shape
    shift, left, right, has_left, has_right = band(call)
    padded = call.visible.keys is not None
    shape = b, h, -(-q // edge), -(-k // edge)
    out = {n: torch.zeros(shape, device=call.query.device) for n in outputs & {"block_mass", "block_max"}}
    real = key_spans(call)[0] if padded else lse2
    qs, cap = logit_constants(call)
    d1, d2 = split_width(call.query.shape[-1])
    size = max(edge, 32 if INTERPRET or (call.query.dtype == torch.float32 and d1 > 128) else 64)
    n_tiles = triton.cdiv(q, size)
    _blocks_kernel[(n_tiles * b * h,)](
        call.query, call.key, lse2, real, out.get("block_mass", lse2), out.get("block_max", lse2),
        qs, cap, h, call.groups, q, k, shape[2], shape[3], n_tiles, shift, left, right,
        *call.query.stride(), *call.key.stride(),
        MASS="block_mass" in out, MAX="block_max" in out, PADDED=padded, HAS_LEFT=has_left, HAS_RIGHT=has_right,
        CAP=call.softcap is not None, D=call.query.shape[-1], D1=d1, D2=d2, BM=size, BN=size, EDGE=edge,
        IEEE=call.query.dtype == torch.float32, UPCAST=INTERPRET, num_warps=8 if size > 64 else 4, num_stages=2,
    )  # fmt: skip
    return out
