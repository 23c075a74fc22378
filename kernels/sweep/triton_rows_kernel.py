"""The kernel behind ``triton_rows``: one program per tile of queries, five stretches of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_util import DEAD, HIDDEN, LN2, ceil_to, floor_to, scores, visible_tile

_HIDDEN = tl.constexpr(HIDDEN)
_LN2 = tl.constexpr(LN2)
_DEAD_FROM = tl.constexpr(DEAD / 10)
# Kinds of additional sums: Σ P f with f as named. Clipped, recent and first keys are touched in few tiles only.
CLIPPED, RECENT, FIRST, MARKED = 0, 1, 2, 3
_CLIPPED, _RECENT, _FIRST, _MARKED = (tl.constexpr(n) for n in (CLIPPED, RECENT, FIRST, MARKED))


@triton.jit
def _distance_bin(d) -> tl.tensor:
    """0, 1, 2-3, 4-7 ... -> 0, 1, 2, 3 ...: the exponent of d as a float (exact below 2^24)."""
    return tl.maximum((d.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def _stretch(
    m, l, t, dist, ssq, top, top_key, near, sums, hist, run, run_bin, q1, q2, lse, k_base, real_ptr, marks_ptr,
    lo, hi, r0, rows, row_ok, shift, left, right, first_key, Q, K, BK, stride_col, stride_dim, qs, cap,
    MASKED: tl.constexpr, NEAR: tl.constexpr, ONLINE: tl.constexpr, PADDED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAP: tl.constexpr,
    ENTROPY: tl.constexpr, DISTANCE: tl.constexpr, SUM_SQ: tl.constexpr, TOP: tl.constexpr, TOP_KEY: tl.constexpr,
    HIST: tl.constexpr,
    CLIP: tl.constexpr,
    KINDS: tl.constexpr, PARAMS: tl.constexpr, N_SUMS: tl.constexpr, NE: tl.constexpr,
    NB: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    IEEE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add key tiles lo, lo + BN, ... < hi to the running sums of one query tile."""
    within = tl.arange(0, BN)
    wide_stride = tl.cast(stride_col, tl.int64)
    dims = tl.arange(0, D1)
    slot = tl.arange(0, NE)
    bins = tl.arange(0, NB)
    offs1 = within[None, :] * stride_col + dims[:, None] * stride_dim
    for n0 in tl.range(lo, hi, BN):
        cols = n0 + within
        at = k_base + n0 * wide_stride
        if MASKED:
            k1 = tl.load(at + offs1, mask=(cols < K)[None, :] & (dims < D)[:, None], other=0.0)
        elif D1 > D:
            k1 = tl.load(at + offs1, mask=(dims < D)[:, None], other=0.0)
        else:
            k1 = tl.load(at + offs1)
        k2 = k1
        if D2 > 0:
            rest = D1 + tl.arange(0, D2)
            offs2 = within[None, :] * stride_col + rest[:, None] * stride_dim
            k2 = tl.load(at + offs2, mask=(cols < K)[None, :] & (rest < D)[:, None], other=0.0)
        s = scores(q1, q2, k1, k2, qs, cap, CAP, D2, IEEE, UPCAST)
        if MASKED:
            seen = visible_tile(rows, cols, shift, left, right, K, HAS_LEFT, HAS_RIGHT)
            if PADDED:
                key_real = tl.load(real_ptr + cols, mask=cols < K, other=0) != 0
                seen = seen & key_real[None, :] & row_ok[:, None]
        if ONLINE:
            if not CAP:
                s = s * qs
            shown = s
            if MASKED:
                shown = tl.where(seen, s, _HIDDEN)
            m_new = tl.maximum(m, tl.max(shown, axis=1))
            x = s - m_new[:, None]
        elif CAP:
            x = s - lse[:, None]
        else:
            x = s * qs - lse[:, None]
        if MASKED:
            x = tl.where(seen, x, _HIDDEN)
        p = tl.exp2(x)
        if ONLINE:
            alpha = tl.exp2(m - m_new)
            if ENTROPY:
                t = alpha * (t + (m - m_new) * l)
            l = l * alpha + tl.sum(p, axis=1)
            m = m_new
            if DISTANCE:
                dist = dist * alpha
            if SUM_SQ:
                ssq = ssq * alpha * alpha
            if TOP:
                top = top * alpha
            if CLIP:
                near = near * alpha
            if N_SUMS > 0:
                sums = sums * alpha[:, None]
            if HIST:
                hist = hist * alpha[:, None]
                run = run * alpha
        if ENTROPY:
            t += tl.sum(p * x, axis=1)
        if SUM_SQ:
            ssq += tl.sum(p * p, axis=1)
        if TOP:
            best = tl.max(p, axis=1)
            if TOP_KEY:  # a second plain reduction costs less than one over (value, index) pairs
                where = tl.min(tl.where(p == best[:, None], cols[None, :], 2147483647), axis=1)
                top_key = tl.where(best > top, where, top_key)
            top = tl.maximum(best, top)
        away = (rows + shift)[:, None] - cols[None, :]
        if DISTANCE:
            # As floats the columns' part is the same in every turn; whole numbers below 2^24 stay exact.
            far = (rows + shift - n0).to(tl.float32)[:, None] - within.to(tl.float32)[None, :]
            dist += tl.sum(tl.abs(p * far), axis=1)
        if HIST:
            # |i - j| over the tile runs from `nearest` to `furthest`; far from the diagonal that is two bins at most.
            low = r0 + shift - n0 - BN + 1
            high = r0 + shift - n0 + BM - 1
            nearest = tl.where((low <= 0) & (high >= 0), 0, tl.minimum(tl.abs(low), tl.abs(high)))
            lowest = _distance_bin(nearest)
            highest = _distance_bin(tl.maximum(tl.abs(low), tl.abs(high)))
            if NEAR:
                which = _distance_bin(tl.abs(away))
                for one in tl.range(lowest, highest + 1):
                    part = tl.sum(tl.where(which == one, p, 0.0), axis=1)
                    hist += tl.where((bins == one)[None, :], part[:, None], 0.0)
            else:
                if highest == lowest:
                    # Consecutive tiles mostly fall into one bin: it is written once they have left it.
                    if lowest != run_bin:
                        hist += tl.where((bins == run_bin)[None, :], run[:, None], 0.0)
                        run = run * 0.0
                        run_bin = lowest
                    run += tl.sum(p, axis=1)
                else:
                    further = tl.abs(away) >= (1 << lowest)
                    beyond = tl.sum(tl.where(further, p, 0.0), axis=1)
                    closer = tl.sum(tl.where(further, 0.0, p), axis=1)
                    hist += tl.where((bins == lowest)[None, :], closer[:, None], 0.0)
                    hist += tl.where((bins == lowest + 1)[None, :], beyond[:, None], 0.0)
        if NEAR and CLIP:
            near += tl.sum(p, axis=1)
        for e in tl.static_range(N_SUMS):
            if KINDS[e] == _CLIPPED:
                if NEAR:
                    part = tl.sum(p * tl.minimum(tl.abs(away), PARAMS[e]).to(tl.float32), axis=1)
                    sums += tl.where((slot == e)[None, :], part[:, None], 0.0)
            elif KINDS[e] == _RECENT:
                if NEAR:
                    part = tl.sum(tl.where(tl.abs(away) < PARAMS[e], p, 0.0), axis=1)
                    sums += tl.where((slot == e)[None, :], part[:, None], 0.0)
            elif KINDS[e] == _FIRST:
                if MASKED:
                    early = (cols >= first_key) & (cols < first_key + PARAMS[e])
                    part = tl.sum(tl.where(early[None, :], p, 0.0), axis=1)
                    sums += tl.where((slot == e)[None, :], part[:, None], 0.0)
            else:
                at_mark = (marks_ptr + PARAMS[e] * BK + n0) + within
                mark = (tl.load(at_mark, mask=cols < K, other=0) if MASKED else tl.load(at_mark)) != 0
                part = tl.sum(tl.where(mark[None, :], p, 0.0), axis=1)
                sums += tl.where((slot == e)[None, :], part[:, None], 0.0)
    return m, l, t, dist, ssq, top, top_key, near, sums, hist, run, run_bin


# A new text length must not compile anew.
_LENGTHS = ["n_tiles", "shift", "left", "right", "first_col", "BK", "out_stride"]


@triton.jit(do_not_specialize=_LENGTHS)
def rows_kernel(
    q_ptr, k_ptr, lse_ptr, sink_ptr, span_ptr, real_ptr, row_real_ptr, marks_ptr, tiles_ptr,
    out_ptr, top_ptr, hist_ptr, qs, cap, H, G, Q, K, n_tiles, shift, left, right, first_col, BK, out_stride,
    sink_b, sink_h, sink_q, sqb, sqh, sqr, sqd, skb, skh, skr, skd,
    ONLINE: tl.constexpr, LOCAL: tl.constexpr, PADDED: tl.constexpr, SINKS: tl.constexpr, SAMPLED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAP: tl.constexpr,
    ENTROPY: tl.constexpr, DISTANCE: tl.constexpr, SUM_SQ: tl.constexpr, TOP: tl.constexpr, TOP_KEY: tl.constexpr,
    HIST: tl.constexpr,
    CLIP: tl.constexpr,
    KINDS: tl.constexpr, PARAMS: tl.constexpr, N_SUMS: tl.constexpr, NE: tl.constexpr,
    REACH: tl.constexpr, FIRST: tl.constexpr, NB: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, IEEE: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """All statistics of one tile of queries of one head; see ``triton_rows.rows``."""
    pid = tl.program_id(0)
    bh = (pid // n_tiles).to(tl.int64)
    tile = n_tiles - 1 - pid % n_tiles
    if SAMPLED:
        tile = tl.load(tiles_ptr + tile)
    b = bh // H
    h = bh % H
    r0 = tile * BM
    rows = r0 + tl.arange(0, BM)
    inside = rows < Q
    dims = tl.arange(0, D1)
    q_base = q_ptr + b * sqb + h * sqh + r0.to(tl.int64) * sqr
    at = tl.arange(0, BM)[:, None] * sqr
    q1 = tl.load(q_base + at + dims[None, :] * sqd, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    q2 = q1
    if D2 > 0:
        rest = D1 + tl.arange(0, D2)
        q2 = tl.load(q_base + at + rest[None, :] * sqd, mask=inside[:, None] & (rest < D)[None, :], other=0.0)
    row_ok = inside
    first_key = first_col
    c_lo = 0
    c_hi = K
    if PADDED:
        row_ok = tl.load(row_real_ptr + b * Q + rows, mask=inside, other=0) != 0
        c_lo = tl.load(span_ptr + 3 * b)
        c_hi = tl.load(span_ptr + 3 * b + 1)
        first_key = tl.load(span_ptr + 3 * b + 2)
    lse = tl.zeros([BM], tl.float32)
    if not ONLINE:
        lse = tl.load(lse_ptr + bh * Q + rows, mask=inside, other=1e30)
        row_ok = row_ok & (lse < _DEAD_FROM)

    # Columns [c_lo, c_hi) are seen by some row, [full_lo, full_hi) by every row.
    at_first = r0 + shift
    at_last = tl.minimum(r0 + BM, Q) - 1 + shift
    full_lo = 0
    full_hi = floor_to(K, BN)
    if HAS_LEFT:
        c_lo = tl.maximum(c_lo, at_first - left)
        full_lo = at_last - left
    if HAS_RIGHT:
        c_hi = tl.minimum(c_hi, at_last + right + 1)
        full_hi = tl.minimum(full_hi, floor_to(at_first + right + 1, BN))
    a_lo = floor_to(c_lo, BN)
    c_hi = tl.maximum(c_hi, a_lo)
    a_hi = ceil_to(full_lo, BN)
    if FIRST > 0:
        early = tl.where(first_key + FIRST > c_lo, ceil_to(first_key + FIRST, BN), 0)
        a_hi = tl.maximum(a_hi, early)
        if LOCAL:
            a_hi = early
    elif LOCAL:
        a_hi = a_lo
    a_hi = tl.minimum(tl.maximum(a_hi, a_lo), c_hi)
    near_lo = tl.minimum(full_hi, c_hi)
    near_hi = near_lo
    if REACH > 0:
        near_lo = tl.minimum(near_lo, floor_to(at_first - REACH + 1, BN))
        near_hi = tl.minimum(ceil_to(at_last + REACH, BN), c_hi)
    near_lo = tl.maximum(near_lo, a_hi)
    near_hi = tl.maximum(near_hi, near_lo)
    if HAS_RIGHT:
        near_hi = c_hi
    right_hi = tl.maximum(tl.minimum(full_hi, c_hi), near_hi)

    has_far = (near_lo > a_hi) | (c_hi > near_hi)

    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    t = tl.zeros([BM], tl.float32)
    dist = tl.zeros([BM], tl.float32)
    ssq = tl.zeros([BM], tl.float32)
    top = tl.zeros([BM], tl.float32)
    top_key = tl.zeros([BM], tl.int32)
    near = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, NE], tl.float32)
    hist = tl.zeros([BM, NB], tl.float32)
    run = tl.zeros([BM], tl.float32)
    run_bin = tile * 0
    k_base = k_ptr + b * skb + (h // G) * skh
    real_ptr += b * K
    marks_ptr += b * K
    for part in tl.static_range(5):
        lo = a_lo
        hi = a_hi
        if part == 1:
            lo = a_hi
            hi = near_lo
        elif part == 2:
            lo = near_lo
            hi = near_hi
        elif part == 3:
            lo = near_hi
            hi = right_hi
        elif part == 4:
            lo = right_hi
            hi = c_hi
        edge = part == 0 and (FIRST > 0 or (HAS_LEFT and not LOCAL))
        middle = part == 2 and (REACH > 0 or not LOCAL)
        if edge or middle or (not LOCAL and (part == 1 or (part > 2 and not HAS_RIGHT))):
            m, l, t, dist, ssq, top, top_key, near, sums, hist, run, run_bin = _stretch(
                m, l, t, dist, ssq, top, top_key, near, sums, hist, run, run_bin, q1, q2, lse, k_base, real_ptr,
                marks_ptr, lo, hi, r0, rows, row_ok, shift, left, right, first_key, Q, K, BK, skr, skd, qs, cap,
                PADDED or part % 2 == 0, part == 0 or part == 2, ONLINE, PADDED, HAS_LEFT, HAS_RIGHT, CAP,
                ENTROPY, DISTANCE, SUM_SQ, TOP, TOP_KEY, HIST, CLIP, KINDS, PARAMS, N_SUMS, NE, NB, D, D1, D2, BM,
                BN, IEEE, UPCAST)  # fmt: skip

    # Per unit of weight: P = p / total, and `mass` is what the keys hold of it (less than 1 beside a sink).
    scale = tl.where(row_ok, 1.0, 0.0)
    mass = scale
    sink = tl.full([BM], -1e30, tl.float32)
    if SINKS:
        sink = tl.load(sink_ptr + b * sink_b + h * sink_h + rows.to(tl.int64) * sink_q, mask=inside, other=0.0)
        sink = sink.to(tl.float32) * 1.4426950408889634
    if ONLINE:
        top_m = tl.maximum(m, sink)
        total = l * tl.exp2(m - top_m)
        if SINKS:
            total += tl.exp2(sink - top_m)
        counts = row_ok
        row_ok = row_ok & (top_m > -1e29) & (total > 0.0)
        lse = tl.where(row_ok, top_m + tl.log2(tl.where(row_ok, total, 1.0)), 1e30)
        scale = tl.where(row_ok, tl.exp2(m - lse), 0.0)
        mass = l * scale
        t = t * scale - mass * (lse - m)
    elif SINKS:
        mass = tl.where(row_ok, 1.0 - tl.exp2(sink - lse), 0.0)
        t = t * scale
    out_ptr += bh * Q + rows
    wide = tl.cast(out_stride, tl.int64)
    known = tl.where(lse < _DEAD_FROM, lse, 0.0) * _LN2
    if ONLINE:  # a NaN in q or k must not pass for a row that sees nothing
        known = tl.where(counts & (total != total), total, known)
    tl.store(out_ptr, known, mask=inside)
    if ENTROPY:
        tl.store(out_ptr + wide, tl.where(row_ok, -t * _LN2, 0.0), mask=inside)
    if DISTANCE:
        tl.store(out_ptr + 2 * wide, dist * scale, mask=inside)
    if SUM_SQ:
        tl.store(out_ptr + 3 * wide, ssq * scale * scale, mask=inside)
    if TOP:
        tl.store(out_ptr + 4 * wide, top * scale, mask=inside)
        if TOP_KEY:
            tl.store(top_ptr + bh * Q + rows, tl.where(row_ok, top_key, 0), mask=inside)
    # What the near tiles do not hold is far away: W each. Rows whose visible keys all lie in near tiles have none.
    far = tl.where(row_ok & (has_far != 0), tl.maximum(mass - near * scale, 0.0), 0.0)
    slot = tl.arange(0, NE)
    for e in tl.static_range(N_SUMS):
        value = tl.sum(tl.where((slot == e)[None, :], sums, 0.0), axis=1) * scale
        if KINDS[e] == _CLIPPED:
            value += PARAMS[e] * far
        tl.store(out_ptr + (5 + e) * wide, value, mask=inside)
    if HIST:
        bins = tl.arange(0, NB)
        hist += tl.where((bins == run_bin)[None, :], run[:, None], 0.0)
        at = hist_ptr + (bh * Q + rows)[:, None] * NB + bins[None, :]
        tl.store(at, hist * scale[:, None], mask=inside[:, None])
