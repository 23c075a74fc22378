"""Column sums, and with them the row sums that need no second look: one sweep, given lse.

A program owns a tile of keys and streams the queries that see it, so column sums stay in registers. What a key tile
contributes to a query's row sums goes to memory as 64-bit fixed-point numbers, and its largest probability as the bits
of that float: integer addition and maximum are associative, so the result does not depend on the order in which
programs finish.
"""

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
    LN2,
    Tile,
    band,
    ceil_to,
    floor_to,
    key_spans,
    logit_constants,
    scores,
    split_width,
    visible_tile,
)

# Row sums that the sweep can add up, and the fixed-point scale of each (entropy in bits, distance in tokens).
FIXED_POINT = {"entropy": 2.0**50, "sum_sq": 2.0**58, "distance": 2.0**38}
# Where each of several sums stands in memory: the order in which joining pairs of pairs puts them.
SLOTS = {"entropy": 0, "distance": 1, "sum_sq": 2}
FUSED = (*FIXED_POINT, "top1_mass", "top1_key")
_MASKED_LSE = tl.constexpr(1e29)
_HIDDEN = tl.constexpr(HIDDEN)


@triton.jit
def _from_the_last(p, last, BM: tl.constexpr, BN: tl.constexpr) -> tl.tensor:
    """Σ_j p (i - j) over a tile, given i - j for its last column: a sum of terms that are not negative.

    Column 8 a + b is (BN / 8 - 1 - a) 8 + 7 - b before the last. In a Hopper tile a is known when compiling, so that
    its factors take no registers.
    """
    parts = tl.reshape(p, (BM, BN // 8, 8))
    eights = (BN // 8 - 1 - tl.arange(0, BN // 8)).to(tl.float32)[None, :, None]
    ones = (7 - tl.arange(0, 8)).to(tl.float32)[None, :]
    mass = tl.sum(parts, axis=1)
    return tl.sum(8.0 * tl.sum(parts * eights, axis=1) + mass * (ones + last[:, None]), axis=1)


@triton.jit
def _segment(
    acc, acc_w, q_base, k1, k2, key_real, lse_ptr, weight_ptr, sums_ptr, top_ptr, lo, hi,
    col0, shift, left, right, Q, K,
    stride_row, stride_dim, qs, cap, f_entropy, f_sum_sq, f_distance,
    MASKED: tl.constexpr, PADDED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAUSAL: tl.constexpr,
    CAP: tl.constexpr, PLAIN: tl.constexpr, WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, DISTANCE: tl.constexpr,
    TOP: tl.constexpr, TOP_KEY: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    IEEE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add query tiles lo, lo + BM, ... < hi to the sums of one key tile."""
    within = tl.arange(0, BM)
    wide_stride = tl.cast(stride_row, tl.int64)
    cols = col0 + tl.arange(0, BN)
    dims = tl.arange(0, D1)
    offs1 = within[:, None] * stride_row + dims[None, :] * stride_dim
    for m0 in tl.range(lo, hi, BM):
        rows = m0 + within
        inside = rows < Q
        at = q_base + m0 * wide_stride
        if MASKED:
            q1 = tl.load(at + offs1, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
            lse = tl.load(lse_ptr + rows, mask=inside, other=1e30)
        else:
            q1 = tl.load(at + offs1, mask=(dims < D)[None, :], other=0.0) if D1 > D else tl.load(at + offs1)
            lse = tl.load(lse_ptr + rows)
        q2 = q1
        if D2 > 0:
            rest = D1 + tl.arange(0, D2)
            offs2 = within[:, None] * stride_row + rest[None, :] * stride_dim
            q2 = tl.load(at + offs2, mask=inside[:, None] & (rest < D)[None, :], other=0.0)
        s = scores(q1, q2, k1, k2, qs, cap, CAP, D2, IEEE, UPCAST)
        x = s - lse[:, None] if CAP else s * qs - lse[:, None]
        if MASKED:
            x = tl.where(visible_tile(rows, cols, shift, left, right, K, HAS_LEFT, HAS_RIGHT), x, _HIDDEN)
        if PADDED:
            x = tl.where(key_real[None, :] & (lse < _MASKED_LSE)[:, None], x, _HIDDEN)
        p = tl.exp2(x)
        # Rows 8 apart sit in one thread of a Hopper tile: adding them first halves the accumulator's registers.
        if PLAIN:
            acc += tl.reshape(tl.sum(tl.reshape(p, (BM // 16, 2, 8, BN)), axis=1), (BM // 2, BN))
        if WEIGHTED:
            pw = p * tl.load(weight_ptr + rows, mask=inside, other=0.0)[:, None]
            acc_w += tl.reshape(tl.sum(tl.reshape(pw, (BM // 16, 2, 8, BN)), axis=1), (BM // 2, BN))
        entropy = tl.zeros([BM], tl.float32)
        squares = entropy
        far = entropy
        if ENTROPY:
            entropy = tl.sum(p * x, axis=1) * -f_entropy
        if SUM_SQ:
            squares = tl.sum(p * p, axis=1) * f_sum_sq
        if DISTANCE:
            last = (rows + shift - (col0 + BN - 1)).to(tl.float32)  # from each query to the tile's last key
            if MASKED or not CAUSAL:
                away = last[:, None] + (BN - 1 - tl.arange(0, BN)).to(tl.float32)[None, :]
                far = tl.sum(tl.abs(p * away), axis=1) * f_distance
            else:
                far = _from_the_last(p, last, BM, BN) * f_distance
        if ENTROPY + SUM_SQ + DISTANCE > 1:  # together they need one exchange between threads instead of one each
            slot = tl.arange(0, 4)
            sums = tl.reshape(tl.join(tl.join(entropy, squares), tl.join(far, tl.zeros([BM], tl.float32))), (BM, 4))
            at_sums = sums_ptr + rows.to(tl.int64)[:, None] * 4 + slot[None, :]
            wanted = inside[:, None] & (slot < 3)[None, :]
            tl.atomic_add(at_sums, sums.to(tl.int64), mask=wanted, sem="relaxed")
        elif ENTROPY + SUM_SQ + DISTANCE == 1:
            tl.atomic_add(sums_ptr + rows, (entropy + squares + far).to(tl.int64), mask=inside, sem="relaxed")
        if TOP:
            best = tl.max(p, axis=1)
            bits = best.to(tl.int32, bitcast=True)  # of numbers that are not negative in the order of their values
            if TOP_KEY:  # the lowest column wins ties
                where = tl.min(tl.where(p == best[:, None], cols[None, :], 2147483647), axis=1)
                both = (bits.to(tl.int64) << 32) | (2147483647 - where).to(tl.int64)
                tl.atomic_max(top_ptr + rows, both, mask=inside, sem="relaxed")
            else:
                tl.atomic_max(top_ptr + rows, bits, mask=inside, sem="relaxed")
    return acc, acc_w


# A new text length must not compile anew.
_LENGTHS = ["n_tiles", "shift", "left", "right"]


@triton.jit(do_not_specialize=_LENGTHS)
def _columns_kernel(
    q_ptr, k_ptr, lse_ptr, weight_ptr, real_ptr, out_ptr, out_w_ptr, sums_ptr, top_ptr,
    qs, cap, f_entropy, f_sum_sq, f_distance, H, G, Q, K, n_tiles, shift, left, right,
    sqb, sqh, sqr, sqd, skb, skh, skr, skd,
    PADDED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAUSAL: tl.constexpr,
    CAP: tl.constexpr, PLAIN: tl.constexpr, WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, DISTANCE: tl.constexpr,
    TOP: tl.constexpr, TOP_KEY: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    IEEE: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    # Heads outermost: the queries of one head stay in the L2 cache, and only the last head's short tiles end the grid.
    pid = tl.program_id(0)
    bh = (pid // n_tiles).to(tl.int64)
    tile = pid % n_tiles
    b = bh // H
    h = bh % H
    col0 = tile * BN
    cols = col0 + tl.arange(0, BN)
    dims = tl.arange(0, D1)
    k_base = k_ptr + b * skb + (h // G) * skh + col0.to(tl.int64) * skr
    within = tl.arange(0, BN)
    k1 = tl.load(
        k_base + within[None, :] * skr + dims[:, None] * skd, mask=(cols < K)[None, :] & (dims < D)[:, None], other=0.0
    )
    k2 = k1
    if D2 > 0:
        rest = D1 + tl.arange(0, D2)
        k2 = tl.load(
            k_base + within[None, :] * skr + rest[:, None] * skd,
            mask=(cols < K)[None, :] & (rest < D)[:, None],
            other=0.0,
        )

    # Query rows: [lo, hi) see some of the tile, [full_lo, full_hi) see all of it.
    last = col0 + BN - 1
    lo = 0
    full_lo = 0
    hi = Q
    full_hi = Q
    if HAS_RIGHT:
        lo = floor_to(col0 - shift - right, BM)
        full_lo = ceil_to(last - shift - right, BM)
    if HAS_LEFT:
        hi = tl.minimum(last - shift + left + 1, Q)
        full_hi = tl.minimum(col0 - shift + left + 1, Q)
    key_real = cols < K
    if PADDED:
        key_real = tl.load(real_ptr + b * K + cols, mask=cols < K, other=0) != 0
        hi = tl.where(tl.sum(key_real.to(tl.int32), axis=0) > 0, hi, lo)
    hi = tl.maximum(hi, lo)
    full_hi = floor_to(tl.minimum(full_hi, hi), BM)
    full_hi = tl.where(last < K, full_hi, lo)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.maximum(full_hi, full_lo)
    # A ragged row tile is never full: full_hi is a multiple of BM, or full_lo, and then nothing is full.

    q_base = q_ptr + b * sqb + h * sqh
    lse_ptr += bh * Q
    weight_ptr += b * Q
    sums_ptr += bh * Q * (4 if ENTROPY + SUM_SQ + DISTANCE > 1 else 1)
    top_ptr += bh * Q
    acc = tl.zeros([BM // 2, BN], tl.float32)
    acc_w = tl.zeros([BM // 2, BN], tl.float32)
    acc, acc_w = _segment(
        acc, acc_w, q_base, k1, k2, key_real, lse_ptr, weight_ptr, sums_ptr, top_ptr,
        lo, full_lo, col0, shift, left, right,
        Q, K, sqr, sqd, qs, cap, f_entropy, f_sum_sq, f_distance, True, PADDED, HAS_LEFT, HAS_RIGHT, CAUSAL, CAP,
        PLAIN, WEIGHTED, ENTROPY, SUM_SQ, DISTANCE, TOP, TOP_KEY, D, D1, D2, BM, BN, IEEE, UPCAST)  # fmt: skip
    acc, acc_w = _segment(
        acc, acc_w, q_base, k1, k2, key_real, lse_ptr, weight_ptr, sums_ptr, top_ptr,
        full_lo, full_hi, col0, shift, left, right,
        Q, K, sqr, sqd, qs, cap, f_entropy, f_sum_sq, f_distance, False, PADDED, HAS_LEFT, HAS_RIGHT, CAUSAL, CAP,
        PLAIN, WEIGHTED, ENTROPY, SUM_SQ, DISTANCE, TOP, TOP_KEY, D, D1, D2, BM, BN, IEEE, UPCAST)  # fmt: skip
    acc, acc_w = _segment(
        acc, acc_w, q_base, k1, k2, key_real, lse_ptr, weight_ptr, sums_ptr, top_ptr,
        full_hi, hi, col0, shift, left, right,
        Q, K, sqr, sqd, qs, cap, f_entropy, f_sum_sq, f_distance, True, PADDED, HAS_LEFT, HAS_RIGHT, CAUSAL, CAP,
        PLAIN, WEIGHTED, ENTROPY, SUM_SQ, DISTANCE, TOP, TOP_KEY, D, D1, D2, BM, BN, IEEE, UPCAST)  # fmt: skip
    if PLAIN:
        tl.store(out_ptr + bh * K + cols, tl.sum(acc, axis=0), mask=cols < K)
    if WEIGHTED:
        tl.store(out_w_ptr + bh * K + cols, tl.sum(acc_w, axis=0), mask=cols < K)


def best_tile(call: AttentionCall, fused: frozenset[str] = frozenset()) -> Tile:
    """Tile edges by head dim and dtype, as measured on an H200 (``benchmarks/results``).

    A third stage hides the wait for the next queries; at D = 128 it costs the third program per multiprocessor, which
    pays where row sums are added up as well. Distances and the largest probability need the registers of two programs.
    """
    d = call.query.shape[-1]
    if INTERPRET:
        return Tile(32, 32)
    if call.query.dtype == torch.float32:
        return Tile(64, 64, 4, 2) if d <= 128 else Tile(32, 32, 4, 2)
    if d > 128:
        return Tile(64, 64, 4, 2)
    many = fused & {"distance", "top1_mass", "top1_key"}
    return Tile(64, 128, 4, 3 if fused or d <= 64 else 2, 255 if many else 168)


def columns(
    call: AttentionCall,
    lse2: Float[Tensor, "B H Q"],
    plain: bool = True,
    weights: Float[Tensor, "B Q"] | None = None,
    fused: frozenset[str] = frozenset(),
    tile: Tile | None = None,
) -> dict[str, Tensor]:
    """One sweep given the base-2 lse (``base2_lse``).

    Args:
        call: Any call whose visibility is a band with optional key padding.
        lse2: Base-2 log normaliser, DEAD in rows that do not count.
        plain: Return ``plain``, Σ_i P[i, j].
        weights: Return ``weighted``, Σ_i w_i P[i, j].
        fused: Names in ``FUSED`` of row statistics to collect in the same sweep.
        tile: Launch configuration (default: ``best_tile``).

    Returns:
        ``plain`` and ``weighted`` [B, H, K], and one [B, H, Q] tensor per fused name, float32 (``top1_key`` int64).
    """
    b, h, _, q, k = call.shape
    tile = tile or best_tile(call, fused)
    shift, left, right, has_left, has_right = band(call)
    padded = call.visible.keys is not None or call.real is not None
    device = call.query.device
    out = torch.empty(b, h, k, device=device) if plain else lse2
    out_w = torch.empty(b, h, k, device=device) if weights is not None else lse2
    summed = [n for n in FIXED_POINT if n in fused]
    sums = torch.zeros(b, h, q, 4 if len(summed) > 1 else 1, dtype=torch.int64, device=device) if summed else lse2
    with_key = "top1_key" in fused
    top = torch.zeros(b, h, q, dtype=torch.int64 if with_key else torch.int32, device=device)
    real = key_spans(call)[0] if padded else lse2
    weight = weights.float().contiguous() if weights is not None else lse2
    qs, cap = logit_constants(call)
    d1, d2 = split_width(call.query.shape[-1])
    n_tiles = triton.cdiv(k, tile.cols)
    _columns_kernel[(n_tiles * b * h,)](
        call.query, call.key, lse2, weight, real, out, out_w,
        sums, top,
        qs, cap, *FIXED_POINT.values(), h, call.groups, q, k, n_tiles, shift, left, right,
        *call.query.stride(), *call.key.stride(),
        PADDED=padded, HAS_LEFT=has_left, HAS_RIGHT=has_right,
        CAUSAL=call.visible.is_causal, CAP=call.softcap is not None,
        PLAIN=plain, WEIGHTED=weights is not None,
        ENTROPY="entropy" in fused, SUM_SQ="sum_sq" in fused, DISTANCE="distance" in fused,
        TOP=bool(fused & {"top1_mass", "top1_key"}), TOP_KEY=with_key,
        D=call.query.shape[-1], D1=d1, D2=d2, BM=tile.rows, BN=tile.cols,
        IEEE=call.query.dtype == torch.float32, UPCAST=INTERPRET, **tile.options(),
    )  # fmt: skip
    found = {"plain": out} if plain else {}
    found |= {"weighted": out_w} if weights is not None else {}
    for name in summed:
        total = sums[..., SLOTS[name] if len(summed) > 1 else 0]
        unit = LN2 if name == "entropy" else 1.0
        found[name] = (total.double() * (unit / FIXED_POINT[name])).float()
    mass = (top >> 32).int() if with_key else top
    if "top1_mass" in fused:
        found["top1_mass"] = mass.view(torch.float32)
    if with_key:
        found["top1_key"] = torch.where(mass > 0, 2**31 - 1 - (top & 0xFFFFFFFF), 0)
    return found
