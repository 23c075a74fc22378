"""Statistics in plain torch, whole rows at a time: exact on any device, memory O(rows x K)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import AttentionCall
from ..request import Request
from ..rowblocks import iterate
from .columns import ColumnAccumulator
from .matches import finder
from .rows import RowSums, edges_of

# Above this many keys rows are cut into tiles of so many columns, so that a tile and its keys stay in the cache.
TILE = 4096
# A given lse is trusted in tiles as long as every row then sums to 1 within this.
TRUST = 1e-5


def sweep(call: AttentionCall, request: Request, lse: Tensor | None = None) -> dict[str, Tensor]:
    """Every tensor that ``request`` asks for, in fp32; see ``headscope.kernels.sweep``."""
    with torch.no_grad():
        if _may_tile(call, lse):
            out, worst = _run(call, request, lse, TILE)
            if worst <= TRUST:
                return out
        return _run(call, request, lse, None)[0]


def _may_tile(call: AttentionCall, lse: Tensor | None) -> bool:
    """True where rows need not be whole: long rows on a CPU whose normaliser is known and should be exact."""
    exact = lse is not None and call.query.dtype == torch.float32 and call.sinks is None
    return exact and call.pattern is None and not call.query.is_cuda and call.shape[4] > 2 * TILE


def _run(
    call: AttentionCall, request: Request, lse: Tensor | None, widest: int | None
) -> tuple[dict[str, Tensor], float]:
    """All statistics, and how far a row sum is from 1 at most (0 for whole rows: they are divided by their sum)."""
    out = _allocate(call, request)
    columns = ColumnAccumulator(call, request.columns)
    finders = {name: finder(match, call) for name, match in request.matches.items()}
    mend = lse is not None and call.sinks is None
    worst, sums = 0.0, RowSums(call, request, finders)
    for block in iterate(call, lse, widest=widest):
        sums = RowSums(call, request, finders) if block.first else sums
        p = sums.add(block)
        whole = block.first and block.last
        columns.add(block, p, sums.norm() if mend and whole else None)
        del p
        if not block.last:
            del block
            continue
        heads = slice(block.kv.start * call.groups, block.kv.stop * call.groups)
        for name, value in sums.finish(block, mend).items():
            rows = slice(block.rows.start, block.rows.stop)
            out[name][block.batch, heads, rows] = value.reshape(heads.stop - heads.start, *value.shape[2:])
        if not whole:
            real = call.real_rows()[block.batch, block.rows.start : block.rows.stop]
            worst = max(worst, ((sums.norm() - 1).abs() * real).max().item())
        del block  # before the next one is made, which then reuses its memory
    out |= columns.finish()
    real = call.real_rows()
    for name in set(out) - set(request.columns):
        out[name] *= real[:, None, :] if out[name].dim() == 3 else real[:, None, :, None]
    return out, worst


def _allocate(call: AttentionCall, request: Request) -> dict[str, Tensor]:
    b, h, _, q, k = call.shape
    names = set(request.rows) | set(request.clipped) | set(request.masses) | set(request.targets)
    names |= set(request.matches)
    out = {n: torch.zeros(b, h, q, device=call.query.device) for n in names}
    if "top1_key" in out:
        out["top1_key"] = out["top1_key"].long()
    if "distance_histogram" in out:
        bins = len(edges_of(call))
        out["distance_histogram"] = torch.zeros(b, h, q, bins, device=call.query.device)
    return out
