"""Whole maps behind a byte budget, and exact pieces of maps of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .display import Shown
from .errors import UserError
from .heads import HeadId
from .kernels.call import AttentionCall
from .kernels.tile import tile
from .runtime import Site


class Maps(Shown, Mapping[HeadId, Tensor]):
    """Attention maps of the chosen heads: ``maps["L5H1"]`` or ``maps[5, 1]`` is [B, Q, K] in fp32."""

    def __init__(self) -> None:
        self._maps: dict[HeadId, Tensor] = {}

    def __getitem__(self, head: object) -> Tensor:
        from .heads import parse_heads

        key = parse_heads(head, [10**6] * 10**4)[0]
        if key not in self._maps:
            raise UserError(f"{key} was not captured. Captured: {', '.join(map(str, self._maps))}.")
        return self._maps[key]

    def __iter__(self) -> Any:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        shape = list(next(iter(self._maps.values())).shape) if self._maps else []
        names = ", ".join(map(str, [*self][:8])) + (" …" if len(self) > 8 else "")
        return f"Maps({len(self)} heads of [batch, query, key] = {shape}: {names})"


class MapRecorder:
    """Keeps whole maps of chosen heads (the last forward only)."""

    def __init__(self, heads: list[HeadId]) -> None:
        self.maps, self._heads = Maps(), heads

    def begin(self, ids: Tensor | None) -> None:
        """A forward starts: forget the one before."""
        self.maps._maps.clear()

    def record(self, call: AttentionCall, lse: Tensor | None, site: Site) -> None:
        """Keep the chosen heads of one call."""
        b, _, _, q, k = call.shape
        for head in (h for h in self._heads if h.layer == call.layer):
            pieces = [tile(call, lse, i, head.head, range(q), range(k)) for i in range(b)]
            self.maps._maps[head] = torch.stack(pieces).cpu()


class TileRecorder:
    """Computes one tile of one head's map during a forward."""

    def __init__(
        self, head: HeadId, rows: range | None, cols: range | None, size: tuple[int, int] | None, sequence: int
    ) -> None:
        self._head, self._rows, self._cols, self._size, self._sequence = head, rows, cols, size, sequence
        self.tile = torch.zeros(0, 0)

    def begin(self, ids: Tensor | None) -> None:
        """A forward starts."""

    def record(self, call: AttentionCall, lse: Tensor | None, site: Site) -> None:
        """Compute the tile if this call is the head's layer.

        Raises:
            UserError: If the batch has no such sequence, row or column.
        """
        if call.layer != self._head.layer:
            return
        b, _, _, q, k = call.shape
        rows = inside("rows", self._rows, q)
        cols = inside("columns", self._cols, k)
        if not 0 <= self._sequence < b:
            raise UserError(f"The batch has sequences 0 to {b - 1}; sequence {self._sequence} was asked for.")
        self.tile = tile(call, lse, self._sequence, self._head.head, rows, cols, self._size).cpu()


def check_budget(batch: dict[str, Any], heads: list[HeadId], budget: int) -> None:
    """Refuse before the forward if the maps of these heads would not fit.

    Raises:
        UserError: With the bytes needed and what to do.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        return
    b, n = ids.shape[:2]
    need = len(heads) * b * n * n * 4
    if need > budget:
        raise UserError(
            f"Maps of {len(heads)} heads at {n} tokens take {need / 2**30:.2f} GiB, more than the budget of "
            f"{budget / 2**30:.2f} GiB. Choose heads=..., use tile() for a piece, raise budget=..., or ask "
            "for statistics."
        )


def inside(what: str, wanted: range | None, n: int) -> range:
    """The rows or columns asked for, all ``n`` by default.

    Raises:
        UserError: If they are not a plain range within the map.
    """
    if wanted is None:
        return range(n)
    if wanted.step != 1 or wanted.start < 0 or wanted.stop > n or not len(wanted):
        raise UserError(f"Expected {what} within 0..{n} (step 1, not empty); found {wanted}.")
    return wanted
