"""An exact piece of one head's map, full resolution or pooled; memory grows with the piece, not with the map."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..call import AttentionCall
from ..parts import one_head, rows_of
from ..rowblocks import iterate

# Columns of a block on a CPU where the normaliser is known: whole rows of a long text would leave room for a few rows
# only, and all keys would be read again for each few.
WIDEST = 8192


def tile(
    call: AttentionCall,
    lse: Tensor | None,
    batch: int,
    head: int,
    rows: range,
    cols: range,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "rows cols"]:
    """Rows x columns of one head's map; with ``size`` the mean over each cell's rows of the mass in its columns.

    Cells of a pooled tile split rows and columns as evenly as whole numbers allow. Rows of a pooled tile sum to the
    mean mass inside ``cols`` (1 if the tile spans every key).
    """
    one = one_head(call, batch, head)
    known = None if lse is None else lse[batch : batch + 1, head : head + 1]
    height, width = size or (len(rows), len(cols))
    height, width = min(height, len(rows)), min(width, len(cols))
    out = torch.zeros(height, width, device=call.query.device)
    row_cell = torch.arange(len(rows), device=out.device) * height // len(rows)
    col_cell = torch.arange(len(cols), device=out.device) * width // len(cols)
    part = rows_of(one, rows)
    splits = known is not None and call.pattern is None and not call.query.is_cuda
    lse = None if known is None else known[:, :, rows.start : rows.stop]
    for block in iterate(part, lse, skip_unreal=False, widest=WIDEST if splits else None):
        p = block.probs()[0, 0]
        lo, hi = max(block.cols.start, cols.start), min(block.cols.stop, cols.stop)
        if lo >= hi:
            continue
        piece = p[:, lo - block.cols.start : hi - block.cols.start]
        lo, hi = lo - cols.start, hi - cols.start
        first, last = lo * width // len(cols), (hi - 1) * width // len(cols) + 1
        pooled = torch.zeros(p.shape[0], last - first, device=p.device, dtype=p.dtype)
        pooled.index_add_(1, col_cell[lo:hi] - first, piece)
        out[:, first:last].index_add_(0, row_cell[block.rows.start : block.rows.stop], pooled.to(out.dtype))
    return out / torch.bincount(row_cell, minlength=height)[:, None]
