"""Label matches (duplicate token, induction): equal pairs are few, so they are looked up, not searched for."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from ..call import AttentionCall
from ..request import Match
from ..rowblocks import Block


class PairFinder:
    """Pairs (row, column) with equal labels, found by sorting the key labels once.

    Sorted by (label, position), the keys that row i matches are one run: it begins at the label's first key and ends
    before the first key later than i - lag.

    Attributes:
        order: Columns sorted by label, then by position.
        first: Where each row's run of columns begins in ``order``.
        count: How many columns each row matches.
    """

    def __init__(self, match: Match, call: AttentionCall) -> None:
        _, _, _, q, k = call.shape
        device = call.query.device
        keys, queries = match.key_labels.to(device).long(), match.query_labels.to(device).long()
        columns = torch.arange(k, device=device)
        shift = call.visible.q_offset - call.visible.kv_offset
        last = torch.arange(q, device=device) + shift - match.lag  # last column a row may match
        code, order = (keys * k + columns).masked_fill(keys < 0, -1).sort(-1)
        base = queries.clamp(min=0) * k
        first = torch.searchsorted(code, base)
        end = torch.searchsorted(code, base + last.clamp(max=k - 1), right=True)
        empty = (queries < 0) | (last < 0)
        self.order: Int[Tensor, "B K"] = order
        self.first: Int[Tensor, "B Q"] = first
        self.count: Int[Tensor, "B Q"] = (end - first).clamp(min=0).masked_fill(empty, 0)
        self._rows: tuple[int, int, int] | None = None
        self._pairs: dict[tuple[int, int] | None, tuple[Tensor, Tensor]] = {}

    def pairs(self, block: Block) -> tuple[Tensor, Tensor]:
        """Row and column numbers within the block; the same for every head, so those of its rows are remembered."""
        rows, cols = (block.batch, block.rows.start, block.rows.stop), (block.cols.start, block.cols.stop)
        if rows != self._rows:
            self._rows, self._pairs = rows, {None: self._of_rows(*rows)}
        if cols not in self._pairs:
            r, c = self._pairs[None]
            inside = (c >= cols[0]) & (c < cols[1])  # other tiles hold the rest, or a sliding window leaves it out
            self._pairs[cols] = (r, c - cols[0]) if bool(inside.all()) else (r[inside], c[inside] - cols[0])
        return self._pairs[cols]

    def _of_rows(self, batch: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Row numbers from ``start`` on, and the columns they match."""
        count = self.count[batch, start:stop]
        r = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
        within = torch.arange(len(r), device=count.device) - (count.cumsum(0) - count)[r]
        return r, self.order[batch][self.first[batch, start:stop][r] + within]

    @cached_property
    def runs(self) -> tuple[Int32[Tensor, "B 3 Q"], Int32[Tensor, "B K"]]:
        """Rows with neighbouring runs side by side: (row, where its run begins, where it ends), and ``order``.

        Rows without a match come last; their run begins behind all columns and ends at 0.
        """
        matched = self.count > 0
        first = self.first.masked_fill(~matched, self.order.shape[1])
        first, rows = first.sort(dim=-1, stable=True)
        end = (self.first + self.count).masked_fill(~matched, 0).gather(1, rows)
        return torch.stack([rows, first, end], 1).to(torch.int32), self.order.to(torch.int32)


def finder(match: Match, call: AttentionCall) -> PairFinder:
    """The pairs of a match; looked up once for all layers whose rows and columns lie alike."""
    at = (call.visible.q_offset - call.visible.kv_offset, call.query.device)
    if at not in match.found:
        match.found[at] = PairFinder(match, call)
    return match.found[at]


def match_mass(p: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """Sum of p over the pairs, per row, [n, G, R]."""
    n, g, rows, cols = p.shape
    picked = p.reshape(n * g, rows * cols)[:, r * cols + c]
    return p.new_zeros(n * g, rows).index_add_(1, r, picked).reshape(n, g, rows)
