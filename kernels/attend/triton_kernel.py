"""The kernel behind ``attend.triton``: attention of one tile of queries under edits, no map in memory.

Keys fall into up to three classes: those that lose mass, those that receive it, and the others. Each class is one
ordinary online softmax over the key tiles that hold it; the three are merged at the end by their normalisers, which is
where mass moves between them. A class that is rare costs what its few tiles cost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_util import HIDDEN, LN2, ceil_to, floor_to, scores, visible_tile

# Bits of a key's word and a query's word; a pair with a common bit is hidden. Bits below ROW_BIT belong to knockouts.
KNOCKOUTS, ROW_BIT, OTHER_BIT, LOSES_BIT, GAINS_BIT, PADDING_BIT = 24, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_HIDDEN, _LN2 = tl.constexpr(HIDDEN), tl.constexpr(LN2)
_BLIND = tl.constexpr(HIDDEN / 16)
_KNOCKED, _ROW = tl.constexpr((1 << KNOCKOUTS) - 1), tl.constexpr(ROW_BIT)
_OTHER, _LOSES, _GAINS = tl.constexpr(OTHER_BIT), tl.constexpr(LOSES_BIT), tl.constexpr(GAINS_BIT)
_PADDING = tl.constexpr(PADDING_BIT)
# Where a loop's key tiles come from: three ranges, one range that needs no mask, a list of tiles, a list of blocks.
RANGES, PLAIN, TILES, BLOCKS = 0, 1, 2, 3
_RANGES, _PLAIN, _TILES, _BLOCKS = (tl.constexpr(n) for n in (RANGES, PLAIN, TILES, BLOCKS))


@triton.jit
def _add_keys(
    m, l, acc, q1, q2, q_word, k_base, v_base, word_ptr, bias_ptr, keep_ptr, list_ptr, begin, end,
    a_lo, a_n, b_lo, ab_n, c_lo, rows, shift, left, right, K, V, first, sinks, recent, size, grid_rows, grid_cols,
    skr, skd, svr, svd, qs, cap, factor,
    SOURCE: tl.constexpr, SUB: tl.constexpr, GRID: tl.constexpr, KEYED: tl.constexpr, PAIRED: tl.constexpr,
    HIDES: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    CAP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, IEEE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax of one tile of queries over the key tiles numbered begin to end - 1 of a source."""
    within = tl.arange(0, BN)
    dims = tl.arange(0, D1)
    out_dims = tl.arange(0, DV)
    k_stride = tl.cast(skr, tl.int64)
    v_stride = tl.cast(svr, tl.int64)
    for t in tl.range(begin, end):
        if SOURCE == _RANGES:
            n0 = tl.where(t < a_n, a_lo + t * BN, tl.where(t < ab_n, b_lo + (t - a_n) * BN, c_lo + (t - ab_n) * BN))
        elif SOURCE == _PLAIN:
            n0 = a_lo + t * BN
        elif SOURCE == _TILES:
            n0 = tl.load(list_ptr + t).to(tl.int32) * BN
        else:
            n0 = tl.load(list_ptr + t // SUB).to(tl.int32) * (SUB * BN) + t % SUB * BN
        cols = n0 + within
        there = cols < K
        k_at = k_base + n0 * k_stride
        v_at = v_base + n0 * v_stride
        k_offs = within[None, :] * skr + dims[:, None] * skd
        v_offs = within[:, None] * svr + out_dims[None, :] * svd
        if SOURCE == _PLAIN and D1 == D:
            k1 = tl.load(k_at + k_offs)
        else:
            k1 = tl.load(k_at + k_offs, mask=there[None, :] & (dims < D)[:, None], other=0.0)
        k2 = k1
        if D2 > 0:
            rest = D1 + tl.arange(0, D2)
            k2 = tl.load(
                k_at + within[None, :] * skr + rest[:, None] * skd, mask=there[None, :] & (rest < D)[:, None], other=0.0
            )
        s = scores(q1, q2, k1, k2, qs, cap, CAP, D2, IEEE, UPCAST)
        s = s * (factor if CAP else qs)
        if BIAS:
            s += tl.load(bias_ptr + cols, mask=there, other=0.0)[None, :]
        if SOURCE != _PLAIN:
            seen = visible_tile(rows, cols, shift, left, right, K, HAS_LEFT, HAS_RIGHT)
            if WINDOW:
                near = tl.abs((rows + shift)[:, None] - cols[None, :]) < recent
                seen = seen & (near | (cols < first + sinks)[None, :])
            s = tl.where(seen, s, _HIDDEN)
        if GRID and SOURCE != _BLOCKS:
            down = tl.minimum(tl.maximum((rows + shift - first) // size, 0), grid_rows - 1)
            across = tl.minimum(tl.maximum((cols - first) // size, 0), grid_cols - 1)
            keep = tl.load(keep_ptr + down[:, None].to(tl.int64) * grid_cols + across[None, :])
            s = tl.where(keep != 0, s, _HIDDEN)
        shown = there
        if KEYED:
            word = tl.load(word_ptr + cols, mask=there, other=_PADDING)
            shown = (word & _PADDING) == 0
            if PAIRED:
                s = tl.where(((q_word | HIDES)[:, None] & word[None, :]) == 0, s, _HIDDEN)
            else:
                s = tl.where(((word & HIDES) == 0)[None, :], s, _HIDDEN)
        if SOURCE == _PLAIN and not KEYED and DV == V:
            v = tl.load(v_at + v_offs)
        else:
            v = tl.load(v_at + v_offs, mask=shown[:, None] & (out_dims < V)[None, :], other=0.0)
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        m = m_new
        acc = acc * alpha[:, None]
        if UPCAST:
            acc += tl.dot(p, v.to(tl.float32), input_precision="ieee")
        elif IEEE:
            acc = tl.dot(p, v, acc, input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc)
    return m, l, acc


# A new text length must not compile anew.
_LENGTHS = ["n_tiles", "shift", "left", "right", "grid_rows", "grid_cols", "list_rows", "list_cols"]


@triton.jit(do_not_specialize=_LENGTHS)
def attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, head_ptr, first_ptr, factor_ptr, bias_ptr, window_ptr, keep_ptr, list_ptr,
    count_ptr, key_word_ptr, query_word_ptr, share_ptr, loses_ptr, loses_n_ptr, gains_ptr, gains_n_ptr, sink_ptr,
    qs, cap, G, Q, K, V, n_tiles, n_heads, shift, left, right, size, grid_rows, grid_cols, list_rows, list_cols,
    key_tiles, lse_b, lse_h, lse_q, bias_b, bias_h, kw_b, kw_h, qw_b, qw_h, set_b, set_h, sink_b, sink_h, sink_q,
    sqb, sqh, sqr, sqd, skb, skh, skr, skd, svb, svh, svr, svd, sob, soh, sor, sod,
    FACTOR: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, GRID: tl.constexpr, SUB: tl.constexpr,
    KEYED: tl.constexpr, PAIRED: tl.constexpr, CLASSES: tl.constexpr, SOME_ROWS: tl.constexpr, SINKS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAP: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, IEEE: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Edited output and log normaliser of one tile of queries of one head; see ``attend.triton``."""
    pid = tl.program_id(0)
    tile = n_tiles - 1 - pid % n_tiles
    one = pid // n_tiles
    b = (one // n_heads).to(tl.int64)
    h = tl.load(head_ptr + one % n_heads).to(tl.int64)
    r0 = tile * BM
    rows = r0 + tl.arange(0, BM)
    inside = rows < Q
    dims = tl.arange(0, D1)
    q_base = q_ptr + b * sqb + h * sqh + r0.to(tl.int64) * sqr
    q_at = tl.arange(0, BM)[:, None] * sqr
    q1 = tl.load(q_base + q_at + dims[None, :] * sqd, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    q2 = q1
    if D2 > 0:
        rest = D1 + tl.arange(0, D2)
        q2 = tl.load(q_base + q_at + rest[None, :] * sqd, mask=inside[:, None] & (rest < D)[None, :], other=0.0)
    k_base = k_ptr + b * skb + (h // G) * skh
    v_base = v_ptr + b * svb + (h // G) * svh
    first = tl.load(first_ptr + b).to(tl.int32)
    factor = 1.0
    if FACTOR:
        factor = tl.load(factor_ptr + h)
        if not CAP:
            qs = qs * factor
    sinks = 0
    recent = 2147483647
    if WINDOW:
        sinks = tl.load(window_ptr + 2 * h)
        recent = tl.load(window_ptr + 2 * h + 1)
    q_word = tl.full([BM], _PADDING, tl.int32)
    row_on = inside
    if PAIRED or SOME_ROWS:
        q_word = tl.load(query_word_ptr + b * qw_b + h * qw_h + rows, mask=inside, other=0)
        row_on = (q_word & _ROW) != 0
        q_word = q_word & _KNOCKED
    word_ptr = key_word_ptr + b * kw_b + h * kw_h
    bias_ptr += b * bias_b + h * bias_h

    # Columns [lo, hi) are seen by some row, [full_lo, full_hi) by every row, [lo, early) hold the window's first keys.
    at_first = r0 + shift
    at_last = tl.minimum(r0 + BM, Q) - 1 + shift
    lo = 0
    hi = K
    full_lo = 0
    full_hi = K
    if HAS_LEFT:
        lo = tl.maximum(lo, at_first - left)
        full_lo = tl.maximum(full_lo, at_last - left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, at_last + right + 1)
        full_hi = tl.minimum(full_hi, at_first + right + 1)
    lo = floor_to(lo, BN)
    hi = tl.maximum(hi, lo)
    early = lo
    far_lo = lo
    if WINDOW:
        windowed = recent < 2147483647
        early = tl.where(sinks > 0, tl.minimum(tl.maximum(ceil_to(first + sinks, BN), lo), ceil_to(hi, BN)), lo)
        far_lo = tl.where(windowed, tl.maximum(lo, floor_to(at_first - recent + 1, BN)), lo)
        full_lo = tl.where(windowed, tl.maximum(full_lo, at_last - recent + 1), full_lo)
        full_hi = tl.where(windowed, tl.minimum(full_hi, tl.maximum(at_first, 0) + tl.minimum(recent, K)), full_hi)
        hi = tl.where(windowed, tl.minimum(hi, tl.maximum(at_last, 0) + tl.minimum(recent, K)), hi)
    near_lo = tl.maximum(far_lo, early)
    hi = tl.maximum(hi, near_lo)
    full_lo = tl.minimum(tl.maximum(ceil_to(full_lo, BN), near_lo), ceil_to(hi, BN))
    full_hi = tl.maximum(tl.minimum(floor_to(full_hi, BN), floor_to(hi, BN)), full_lo)

    m0 = tl.full([BM], _HIDDEN, tl.float32)
    l0 = tl.zeros([BM], tl.float32)
    acc0 = tl.zeros([BM, DV], tl.float32)
    hides: tl.constexpr = _PADDING | (_LOSES if CLASSES > 1 else 0) | (_GAINS if CLASSES > 2 else 0)
    keep_ptr += h * grid_rows * grid_cols
    if SUB > 0:
        down = at_first // size
        at = h * list_rows + down
        n = tl.load(count_ptr + at)
        m0, l0, acc0 = _add_keys(
            m0, l0, acc0, q1, q2, q_word, k_base, v_base, word_ptr, bias_ptr, keep_ptr, list_ptr + at * list_cols,
            0, n * SUB, 0, 0, 0, 0, 0, rows, shift, left, right, K, V, first, sinks, recent, size, grid_rows,
            grid_cols, skr, skd, svr, svd, qs, cap, factor, _BLOCKS, SUB, GRID, KEYED, PAIRED, hides, WINDOW, BIAS,
            HAS_LEFT, HAS_RIGHT, CAP, D, D1, D2, DV, BN, IEEE, UPCAST)  # fmt: skip
    else:
        a_n = (early - lo + BN - 1) // BN
        ab_n = a_n + (full_lo - near_lo + BN - 1) // BN
        n = ab_n + (tl.maximum(hi - full_hi, 0) + BN - 1) // BN
        m0, l0, acc0 = _add_keys(
            m0, l0, acc0, q1, q2, q_word, k_base, v_base, word_ptr, bias_ptr, keep_ptr, list_ptr, 0,
            (full_hi - full_lo) // BN, full_lo, 0, 0, 0, 0, rows, shift, left, right, K, V, first, sinks, recent, size,
            grid_rows, grid_cols, skr, skd, svr, svd, qs, cap, factor, _PLAIN, SUB, GRID, KEYED, PAIRED, hides, WINDOW,
            BIAS, HAS_LEFT, HAS_RIGHT, CAP, D, D1, D2, DV, BN, IEEE, UPCAST)  # fmt: skip
        m0, l0, acc0 = _add_keys(
            m0, l0, acc0, q1, q2, q_word, k_base, v_base, word_ptr, bias_ptr, keep_ptr, list_ptr, 0, n, lo, a_n,
            near_lo, ab_n, full_hi, rows, shift, left, right, K, V, first, sinks, recent, size, grid_rows, grid_cols,
            skr, skd, svr, svd, qs, cap, factor, _RANGES, SUB, GRID, KEYED, PAIRED, hides, WINDOW, BIAS,
            HAS_LEFT, HAS_RIGHT, CAP, D, D1, D2, DV, BN, IEEE, UPCAST)  # fmt: skip

    sink = tl.full([BM], _HIDDEN, tl.float32)
    if SINKS:
        sink = tl.load(sink_ptr + b * sink_b + h * sink_h + rows.to(tl.int64) * sink_q, mask=inside, other=0.0)
        sink = tl.maximum(sink.to(tl.float32) * 1.4426950408889634, _HIDDEN)
        sink = tl.where(sink > _BLIND, sink * factor, sink)
    largest = tl.maximum(m0, sink)
    if CLASSES > 1:
        m1 = tl.full([BM], _HIDDEN, tl.float32)
        l1 = tl.zeros([BM], tl.float32)
        acc1 = tl.zeros([BM, DV], tl.float32)
        of = b * set_b + h * set_h
        begin = tl.load(loses_n_ptr + of * (key_tiles + 1) + lo // BN)
        end = tl.load(loses_n_ptr + of * (key_tiles + 1) + (hi + BN - 1) // BN)
        hides_1: tl.constexpr = _PADDING | _OTHER | _GAINS
        m1, l1, acc1 = _add_keys(
            m1, l1, acc1, q1, q2, q_word, k_base, v_base, word_ptr, bias_ptr, keep_ptr, loses_ptr + of * key_tiles,
            begin, end, 0, 0, 0, 0, 0, rows, shift, left, right, K, V, first, sinks, recent, size, grid_rows,
            grid_cols, skr, skd, svr, svd, qs, cap, factor, _TILES, SUB, GRID, KEYED, PAIRED, hides_1, WINDOW, BIAS,
            HAS_LEFT, HAS_RIGHT, CAP, D, D1, D2, DV, BN, IEEE, UPCAST)  # fmt: skip
        largest = tl.maximum(largest, m1)
    if CLASSES > 2:
        m2 = tl.full([BM], _HIDDEN, tl.float32)
        l2 = tl.zeros([BM], tl.float32)
        acc2 = tl.zeros([BM, DV], tl.float32)
        of = b * set_b + h * set_h
        begin = tl.load(gains_n_ptr + of * (key_tiles + 1) + lo // BN)
        end = tl.load(gains_n_ptr + of * (key_tiles + 1) + (hi + BN - 1) // BN)
        hides_2: tl.constexpr = _PADDING | _OTHER | _LOSES
        m2, l2, acc2 = _add_keys(
            m2, l2, acc2, q1, q2, q_word, k_base, v_base, word_ptr, bias_ptr, keep_ptr, gains_ptr + of * key_tiles,
            begin, end, 0, 0, 0, 0, 0, rows, shift, left, right, K, V, first, sinks, recent, size, grid_rows,
            grid_cols, skr, skd, svr, svd, qs, cap, factor, _TILES, SUB, GRID, KEYED, PAIRED, hides_2, WINDOW, BIAS,
            HAS_LEFT, HAS_RIGHT, CAP, D, D1, D2, DV, BN, IEEE, UPCAST)  # fmt: skip
        largest = tl.maximum(largest, m2)

    e0 = tl.where(m0 > _BLIND, tl.exp2(m0 - largest), 0.0)
    total = l0 * e0
    if SINKS:
        total += tl.where(sink > _BLIND, tl.exp2(sink - largest), 0.0)
    if CLASSES > 1:
        e1 = tl.where(m1 > _BLIND, tl.exp2(m1 - largest), 0.0)
        loses = l1 * e1
        gains = l0 * e0
        total += loses
        if CLASSES > 2:
            e2 = tl.where(m2 > _BLIND, tl.exp2(m2 - largest), 0.0)
            gains = l2 * e2
            total += gains
        alive = (largest > _BLIND) | (total != total)  # a NaN must stay one
        total = tl.where(alive, total, 1.0)
        share = tl.load(share_ptr + h)
        moves = row_on & (gains > 1.2e-38 * total)
        grown = tl.where(moves, 1.0 + (1.0 - share) * loses / tl.where(moves, gains, 1.0), 1.0)
        left_over = tl.where(moves, share, 1.0)
        if CLASSES > 2:
            out = acc0 * e0[:, None] + acc1 * (e1 * left_over)[:, None] + acc2 * (e2 * grown)[:, None]
        else:
            out = acc0 * (e0 * grown)[:, None] + acc1 * (e1 * left_over)[:, None]
    else:
        alive = (largest > _BLIND) | (total != total)
        total = tl.where(alive, total, 1.0)
        out = acc0 * e0[:, None]
    out = tl.where(alive[:, None], out / total[:, None], 0.0)
    out_dims = tl.arange(0, DV)
    out_at = out_ptr + b * sob + h * soh + rows.to(tl.int64)[:, None] * sor + out_dims[None, :] * sod
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (out_dims < V)[None, :])
    lse = tl.where(alive, (largest + tl.log2(total)) * _LN2, -float("inf"))
    tl.store(lse_ptr + b * lse_b + h * lse_h + rows.to(tl.int64) * lse_q, lse, mask=inside)
