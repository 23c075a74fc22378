"""One head of one sequence, ready to be looked at: any part of its map, exact, at any resolution, in short time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..kernels.call import AttentionCall
from ..kernels.parts import keys_of, one_head, rows_of
from ..kernels.request import Request
from ..kernels.sweep import sweep
from ..kernels.tile import tile

SCREEN = 256  # cells along each side of what is sent to the browser
BASE = 2048  # cells along each side of the pooled picture that coarse views are taken from
DIRECT = 4096  # up to this many tokens no pooled picture is needed
SAMPLE = 8  # neighbouring rows of each cell that stand for all of them in a preview

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Tile:
    """A rectangle of a map: rows ``[r0, r1)``, columns ``[c0, c1)``, pooled to cells of ``cell`` tokens.

    A value is the mean over the cell's rows of the mass in the cell's columns; with ``sampled`` rows, over so many
    neighbouring ones in the middle of the cell.
    """

    r0: int
    r1: int
    c0: int
    c1: int
    cell: int
    values: Float[Tensor, "h w"]
    sampled: int = 0


@dataclass(frozen=True, eq=False)
class HeadView:
    """A head's queries and keys with the log normaliser of each row, and, for long texts, its whole map pooled.

    As a draft it is a preview: what is close is exact, coarse views are from sampled rows.
    """

    call: AttentionCall
    lse: Float[Tensor, "1 1 Q"] | None
    base: Float[Tensor, "n n"] | None = None
    base_cell: int = 1
    draft: bool = False

    @property
    def length(self) -> int:
        """Number of keys (and of queries, in self-attention)."""
        return self.call.shape[4]

    @property
    def n_rows(self) -> int:
        """Number of queries."""
        return self.call.shape[3]

    def exact(self, rows: range, cols: range, size: tuple[int, int] | None = None) -> Float[Tensor, "rows cols"]:
        """A piece of the map, computed from nothing but its own queries and keys."""
        if self.lse is None:
            part = rows_of(self.call, rows)
            return tile(keys_of(part, cols), _normaliser(part), 0, 0, range(len(rows)), range(len(cols)), size).cpu()
        return tile(keys_of(self.call, cols), self.lse, 0, 0, rows, range(len(cols)), size).cpu()

    @cached_property
    def overview(self) -> Tile:
        """The whole map on one screen."""
        return self.look(0, self.n_rows, 0, self.length)

    def look(self, r0: int, r1: int, c0: int, c1: int) -> Tile:
        """The view of these rows and columns in at most ``SCREEN`` cells a side; ends snap outwards to whole cells."""
        r0, r1 = _inside(r0, r1, self.n_rows)
        c0, c1 = _inside(c0, c1, self.length)
        cell = 1
        while max(r1 - r0, c1 - c0) > cell * SCREEN:
            cell *= 2
        r0, r1 = r0 // cell * cell, min(-(-r1 // cell) * cell, self.n_rows)
        c0, c1 = c0 // cell * cell, min(-(-c1 // cell) * cell, self.length)
        if self.base is not None and cell >= self.base_cell:
            values = self._pooled(r0, r1, c0, c1, cell)
        elif self.draft and cell > SAMPLE:
            return Tile(r0, r1, c0, c1, cell, self._sampled(range(r0, r1), range(c0, c1), cell), SAMPLE)
        else:
            values = _blocks(self.exact, range(r0, r1), range(c0, c1), cell)
        return Tile(r0, r1, c0, c1, cell, values)

    def _sampled(self, rows: range, cols: range, cell: int) -> Tensor:
        """A coarse view from a few rows of each cell: what there is to see while the exact picture is computed."""
        lines = []
        for start in range(rows.start, rows.stop, cell):
            height = min(cell, rows.stop - start)
            first = start + max(0, height - SAMPLE) // 2
            some = range(first, min(first + SAMPLE, start + height))
            lines.append(torch.cat([self.exact(some, c, (1, m)) for c, m in _split(cols, cell)], 1))
        return torch.cat(lines)

    def _pooled(self, r0: int, r1: int, c0: int, c1: int, cell: int) -> Tensor:
        unit, factor = self.base_cell, cell // self.base_cell
        part = self.base[r0 // unit : math.ceil(r1 / unit), c0 // unit : math.ceil(c1 / unit)]
        counts = torch.full((part.shape[0],), float(unit))
        counts[-1] = r1 - r0 - unit * (part.shape[0] - 1)
        height, width = math.ceil(part.shape[0] / factor), math.ceil(part.shape[1] / factor)
        pad = (0, width * factor - part.shape[1], 0, height * factor - part.shape[0])
        weight = torch.nn.functional.pad(counts, (0, pad[3])).reshape(height, factor)
        sums = torch.nn.functional.pad(part * counts[:, None], pad).reshape(height, factor, width, factor).sum((1, 3))
        return sums / weight.sum(1)[:, None]


def build(
    call: AttentionCall, head: int, tell: Tell, picture: bool = True, lse: Float[Tensor, "1 1 Q"] | None = None
) -> HeadView:
    """The view of one head of a captured call (one sequence).

    Args:
        call: The call of the head's layer.
        head: Which head.
        tell: Told about progress, ``tell(done, total, what)``; may raise to stop.
        picture: Also pool the whole map of a long text, so that coarse views take no time.
        lse: Log normaliser of each row, where it is known; computed otherwise.
    """
    one = _owned(one_head(call, 0, head))
    q = one.shape[3]
    view = HeadView(one, _normalisers(one, tell, (1 + picture) * q) if lse is None else lse)
    if max(q, view.length) <= DIRECT or not picture:
        return view
    unit = 1
    while max(q, view.length) > unit * BASE:
        unit *= 2
    bands = []
    height = 64 * unit
    for start in range(0, q, height):
        tell(q + start, 2 * q, "Whole map, pooled")
        bands.append(_blocks(view.exact, range(start, min(start + height, q)), range(view.length), unit))
    return replace(view, base=torch.cat(bands), base_cell=unit)


def preview(call: AttentionCall, head: int, lse: Float[Tensor, "1 1 Q"] | None = None) -> HeadView:
    """The view of one head of a captured call that takes no time to make (see `HeadView`)."""
    return HeadView(_owned(one_head(call, 0, head)), lse, draft=True)


def encode(values: Float[Tensor, "h w"]) -> bytes:
    """Two bytes a value: 0 for 0, else its logarithm from 1e-8 to 1 in 65,534 steps (0.03 % apart)."""
    v = values.double().clamp(0, 1).numpy()
    with np.errstate(divide="ignore"):
        level = np.round((np.log10(v) + 8) / 8 * 65534) + 1
    return np.where(v < 1e-8, 0, level).astype("<u2").tobytes()


def _blocks(exact: Callable[..., Tensor], rows: range, cols: range, cell: int) -> Tensor:
    """Cells of exactly ``cell`` tokens, the last of each side perhaps smaller."""
    row_parts, col_parts = _split(rows, cell), _split(cols, cell)
    lines = [torch.cat([exact(r, c, (n, m)) for c, m in col_parts], 1) for r, n in row_parts]
    return torch.cat(lines)


def _split(span: range, cell: int) -> list[tuple[range, int]]:
    """The part that whole cells cover and the rest, each with its number of cells."""
    whole = len(span) // cell
    middle = span.start + whole * cell
    parts = [(range(span.start, middle), whole), (range(middle, span.stop), 1)]
    return [(r, n) for r, n in parts if len(r)]


def _inside(start: int, stop: int, n: int) -> tuple[int, int]:
    start = min(max(int(start), 0), n - 1)
    return start, min(max(int(stop), start + 1), n)


def _normalisers(one: AttentionCall, tell: Tell, total: int) -> Tensor:
    """Log normaliser of all rows, some at a time."""
    q = one.shape[3]
    parts, step = [], max(1024, q // 16)
    for start in range(0, q, step):
        tell(start, total, "Normaliser of each row")
        parts.append(_normaliser(rows_of(one, range(start, min(start + step, q)))))
    return torch.cat(parts, -1)


def _normaliser(call: AttentionCall) -> Tensor:
    return sweep(call, Request(rows=frozenset({"lse"})))["lse"]


def _owned(call: AttentionCall) -> AttentionCall:
    """The call with memory of its own, so that the whole layer's can be freed."""
    pattern = None if call.pattern is None else call.pattern.clone()
    return replace(
        call, query=call.query.clone(), key=call.key.clone(), value=call.value[..., :0].clone(), pattern=pattern
    )
