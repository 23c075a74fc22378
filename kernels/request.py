"""What to measure in one sweep: names of row statistics, key sets, targets, matches and column sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

ROW_NAMES = ("lse", "entropy", "distance", "sum_sq", "top1_mass", "top1_key", "distance_histogram")


@dataclass(frozen=True, eq=False)
class KeySet:
    """A set of keys whose mass is wanted: the first n real keys, the n most recent, or any marked ones.

    Exactly one field is set. ``recent = n`` is ``|i - j| < n``: n keys including the query's own position.
    """

    first: int | None = None
    recent: int | None = None
    marked: Bool[Tensor, "B K"] | None = None


@dataclass(frozen=True, eq=False)
class Match:
    """Mass on the keys whose label equals the query's label, among keys at least ``lag`` positions back.

    Duplicate token: both labels are token ids, lag 1. Induction: the key's label is the id of the token before it,
    lag 0. A negative label matches nothing. ``found`` remembers which pairs match, for the layers that follow.
    """

    query_labels: Int[Tensor, "B Q"]
    key_labels: Int[Tensor, "B K"]
    lag: int = 0
    found: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True, eq=False)
class ColumnSum:
    """Sum over real queries i of weight_i P[i, j], only rows with j + lo <= i <= j + hi where given.

    ``mean`` divides by the number of real queries that may see j (in the window), 0 where there is none.
    """

    weights: Float[Tensor, "B Q"] | None = None
    lo: int | None = None
    hi: int | None = None
    mean: bool = False


@dataclass(frozen=True, eq=False)
class Request:
    """One sweep's work. Every entry becomes one tensor of the result, under its key (rows: their own name).

    Attributes:
        rows: Subset of ``ROW_NAMES``.
        clipped: name -> W of Σ_j P min(|i-j|, W).
        masses: name -> key set.
        targets: name -> column index per row (−1: none) whose probability is wanted, [B, Q] or [B, 1, Q].
        matches: name -> label match.
        columns: name -> column sum.
    """

    rows: frozenset[str] = frozenset()
    clipped: dict[str, int] = field(default_factory=dict)
    masses: dict[str, KeySet] = field(default_factory=dict)
    targets: dict[str, Int[Tensor, "B Q"]] = field(default_factory=dict)
    matches: dict[str, Match] = field(default_factory=dict)
    columns: dict[str, ColumnSum] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """True if nothing is asked for."""
        return not (self.rows or self.clipped or self.masses or self.targets or self.matches or self.columns)
