"""Probability of one named key per query, given lse: O(Q D) work, no sweep."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ..call import AttentionCall
from ..triton_util import DEAD, INTERPRET, band, key_spans, logit_constants, split_width

_DEAD_FROM = tl.constexpr(DEAD / 10)


# A new text length must not compile anew.
_LENGTHS = ["n_tiles", "shift", "left", "right"]


@triton.jit(do_not_specialize=_LENGTHS)
def _targets_kernel(
    q_ptr, k_ptr, lse_ptr, index_ptr, real_ptr, out_ptr, qs, cap, H, G, Q, K, n_tiles, shift, left, right,
    sqb, sqh, sqr, sqd, skb, skh, skr, skd,
    PADDED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
) -> None:  # fmt: skip
    pid = tl.program_id(0)
    bh = (pid // n_tiles).to(tl.int64)
    b = bh // H
    h = bh % H
    rows = (pid % n_tiles) * BM + tl.arange(0, BM)
    inside = rows < Q
    index = tl.load(index_ptr + b * Q + rows, mask=inside, other=-1)
    lse = tl.load(lse_ptr + bh * Q + rows, mask=inside, other=1e30)
    at = rows + shift
    named = (index >= 0) & (index < K) & (lse < _DEAD_FROM)
    if HAS_LEFT:
        named = named & (index >= at - left)
    if HAS_RIGHT:
        named = named & (index <= at + right)
    if PADDED:
        named = named & (tl.load(real_ptr + b * K + index, mask=named, other=0) != 0)
    dims = tl.arange(0, DP)
    mask = named[:, None] & (dims < D)[None, :]
    q_at = q_ptr + b * sqb + h * sqh + rows.to(tl.int64)[:, None] * sqr + dims[None, :] * sqd
    k_at = k_ptr + b * skb + (h // G) * skh + index.to(tl.int64)[:, None] * skr + dims[None, :] * skd
    q = tl.load(q_at, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(k_at, mask=mask, other=0.0).to(tl.float32)
    s = tl.sum(q * k, axis=1) * qs
    if CAP:
        s = cap * (1.0 - 2.0 / (tl.exp2(s) + 1.0))
    tl.store(out_ptr + bh * Q + rows, tl.where(named, tl.exp2(tl.where(named, s - lse, 0.0)), 0.0), mask=inside)


def target_mass(call: AttentionCall, lse2: Float[Tensor, "B H Q"], index: Int[Tensor, "B Q"]) -> Float[Tensor, "B H Q"]:
    """P[i, t(i)] for the column index t(i) of each row (0 where it is negative, hidden, or the row does not count)."""
    b, h, _, q, k = call.shape
    shift, left, right, has_left, has_right = band(call)
    padded = call.visible.keys is not None
    real = key_spans(call)[0] if padded else lse2
    out = torch.empty(b, h, q, device=call.query.device)
    qs, cap = logit_constants(call)
    d = call.query.shape[-1]
    rows = 32 if INTERPRET or d > 128 else 64
    n_tiles = triton.cdiv(q, rows)
    index = index.reshape(b, q).to(torch.int32).contiguous()
    _targets_kernel[(n_tiles * b * h,)](
        call.query, call.key, lse2, index, real, out, qs, cap, h, call.groups, q, k, n_tiles, shift, left, right,
        *call.query.stride(), *call.key.stride(),
        PADDED=padded, HAS_LEFT=has_left, HAS_RIGHT=has_right, CAP=call.softcap is not None,
        D=d, DP=triton.next_power_of_2(sum(split_width(d))), BM=rows, num_warps=4,
    )  # fmt: skip
    return out
