"""Row statistics in one sweep over the keys, with the normaliser computed on the way or given.

A program owns a tile of queries and streams the keys they see. The keys fall into five stretches: the first keys and
the window's edge, the far keys (where a clipped distance is W and nothing needs a mask), the keys near the diagonal,
the far keys to the right, the ragged end. Only the work that a stretch needs is done there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from ..call import AttentionCall
from ..triton_util import INTERPRET, Tile, band, key_spans, logit_constants, split_width
from .triton_rows_kernel import CLIPPED, FIRST, MARKED, RECENT, rows_kernel

# Beyond this distance a tile (at most 256 rows and columns together) meets at most two distance bins.
NEAR_BINS = 256
BASIC = ("lse", "entropy", "distance", "sum_sq", "top1_mass")


@dataclass(frozen=True, eq=False)
class Sums:
    """Additional sums Σ_j P[i, j] f(i, j) of a sweep: (kind, parameter) each, and the tensors they read.

    The parameter is W, n, n and the row of ``marks``.
    """

    names: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    params: tuple[int, ...] = ()
    marks: Tensor | None = None

    @property
    def reach(self) -> int:
        """Distance from which clipped distances and recent masses make no difference; 0 if there are none."""
        near = [n for kind, n in zip(self.kinds, self.params, strict=True) if kind in (CLIPPED, RECENT)]
        return max([*near, 1]) if near else 0

    @property
    def first(self) -> int:
        """Number of first keys looked at."""
        return max([0, *(n for kind, n in zip(self.kinds, self.params, strict=True) if kind == FIRST)])

    @property
    def are_local(self) -> bool:
        """True if a few tiles per row hold everything that is asked for."""
        return MARKED not in self.kinds


def best_tile(call: AttentionCall, local: bool = False, online: bool = False, heavy: bool = False) -> Tile:
    """Tile edges by head dim and dtype, as measured on an H200 (``benchmarks/results``)."""
    if local or INTERPRET or call.query.dtype == torch.float32 or call.query.shape[-1] > 128:
        return narrow_tile(call)
    if heavy:  # a histogram per row needs registers
        return Tile(64, 64, 4, 3, 168)
    return Tile(128, 64, 4, 3) if online else Tile(128, 64, 8, 3, 128)


def narrow_tile(call: AttentionCall) -> Tile:
    """A tile of few rows: for the stretches near the diagonal, wide heads, fp32 and samples of rows."""
    d = call.query.shape[-1]
    if INTERPRET:
        return Tile(32, 32)
    if call.query.dtype == torch.float32:
        return Tile(64, 32, 4, 2) if d <= 128 else Tile(64, 16, 4, 2)
    return Tile(64, 64, 4, 3) if d <= 128 else Tile(64, 64, 4, 2)


def rows(
    call: AttentionCall,
    names: frozenset[str],
    sums: Sums | None = None,
    lse2: Float[Tensor, "B H Q"] | None = None,
    bins: int = 0,
    tile: Tile | None = None,
    tiles: Tensor | None = None,
) -> dict[str, Tensor]:
    """One sweep: basic statistics by name and the additional sums.

    Args:
        call: Any call whose visibility is a band with optional key padding.
        names: Subset of ``ROW_NAMES``.
        sums: Additional sums.
        lse2: Base-2 log normaliser (``base2_lse``); None: it is computed in the same sweep.
        bins: Number of distance bins, if the histogram is asked for.
        tile: Launch configuration (default: ``best_tile``).
        tiles: Numbers of the row tiles to do (others keep 0); None: all.

    Returns:
        Name -> [B, H, Q] float32 (``top1_key`` int64, ``distance_histogram`` [B, H, Q, bins]); always with ``lse``.
    """
    sums = sums or Sums()
    b, h, _, q, k = call.shape
    device = call.query.device
    local = lse2 is not None and sums.are_local and not (set(names) - {"lse"})
    histogram = "distance_histogram" in names
    tile = tile or best_tile(call, local, lse2 is None, histogram)
    shift, left, right, has_left, has_right = band(call)
    padded = call.visible.keys is not None or call.real is not None
    make = torch.zeros if tiles is not None else torch.empty
    out = make(5 + len(sums.names), b, h, q, device=device)
    top = bool(set(names) & {"top1_mass", "top1_key"})
    wide = max(1, triton.next_power_of_2(bins))
    top_key = make(b, h, q, dtype=torch.int32, device=device) if "top1_key" in names else out
    hist = make(b, h, q, wide, device=device) if histogram else out
    real, span = out, out
    row_real = call.real_rows().to(torch.int8).contiguous() if padded else out
    if padded:
        real, span = key_spans(call)
    sink, sink_strides = _sink_strides(call, out)
    qs, cap = logit_constants(call)
    d1, d2 = split_width(call.query.shape[-1])
    n_tiles = triton.cdiv(q, tile.rows) if tiles is None else len(tiles)

    def pick(x: Tensor | None) -> Tensor:
        return out if x is None else x

    rows_kernel[(n_tiles * b * h,)](
        call.query, call.key, pick(lse2), sink, span, real, row_real, pick(sums.marks),
        pick(tiles), out, top_key, hist, qs, cap, h, call.groups, q, k, n_tiles,
        shift, left, right, -call.visible.kv_offset, b * k, b * h * q, *sink_strides,
        *call.query.stride(), *call.key.stride(),
        ONLINE=lse2 is None, LOCAL=local, PADDED=padded, SINKS=call.sinks is not None, SAMPLED=tiles is not None,
        HAS_LEFT=has_left, HAS_RIGHT=has_right, CAP=call.softcap is not None,
        ENTROPY="entropy" in names, DISTANCE="distance" in names, SUM_SQ="sum_sq" in names, TOP=top,
        TOP_KEY="top1_key" in names, HIST=histogram,
        CLIP=CLIPPED in sums.kinds,
        KINDS=sums.kinds, PARAMS=sums.params, N_SUMS=len(sums.names),
        NE=triton.next_power_of_2(max(1, len(sums.names))), FIRST=sums.first, NB=wide,
        REACH=max(sums.reach, NEAR_BINS if histogram else 0),
        D=call.query.shape[-1], D1=d1, D2=d2, BM=tile.rows, BN=tile.cols,
        IEEE=call.query.dtype == torch.float32, UPCAST=INTERPRET, **tile.options(),
    )  # fmt: skip
    found = {name: out[n] for n, name in enumerate(BASIC) if name == "lse" or name in names}
    found |= {name: out[5 + n] for n, name in enumerate(sums.names)}
    if "top1_key" in names:
        found["top1_key"] = top_key.long()
    if histogram:
        found["distance_histogram"] = hist[..., :bins]
    return found


def _sink_strides(call: AttentionCall, dummy: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Sink logits and their strides over batch, head and row."""
    if call.sinks is None:
        return dummy, (0, 0, 0)
    if call.sinks.dim() == 1:
        return call.sinks, (0, call.sinks.stride(0), 0)
    b, h, _, q, _ = call.shape
    full = call.sinks.reshape(b, h, -1).expand(b, h, q)
    return full, full.stride()
