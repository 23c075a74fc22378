"""Stats: exact head statistics of a set of sequences; they merge over batches, workers and machines."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .display import Shown
from .errors import UserError, unknown_name


@dataclass(frozen=True)
class LayerInfo:
    """One attention module: its name, kind (``self`` or ``cross``), head counts and how it was captured (tier)."""

    name: str
    kind: str = "self"
    heads: int = 0
    kv_heads: int = 0
    tier: int = 1
    number: int = 0


@dataclass(eq=False)
class Stats(Shown):
    """Sums per sequence, layer and head in float64, and on request the values of every row and column.

    A head's value is the mean over all real query tokens of all sequences: Σ sums / Σ counts. Its standard error
    treats a sequence as the unit (tokens of one sequence are not independent): the linearised error of a ratio of
    two sums over sequences. Layers with fewer heads than the widest are padded with NaN.

    Attributes:
        layers: The attention modules, in order.
        sums: name -> per-sequence sums of a row statistic over real queries, [S, L, H] float64.
        counts: Real query tokens of each sequence and layer, [S, L] float64.
        rows: name -> one [L, H, N] tensor per sequence (values of each real query), where kept.
        columns: name -> one [L, H, N] tensor per sequence (values of each real key), where asked for.
        tokens: Token ids of each sequence's real tokens (the query side), where known.
        sampled: Fraction of the rows that ``sums`` are estimated from, as text (``1/16``); empty: all rows, exact.
        errors: name -> standard error of each sum that is estimated, [S, L, H] float64.
    """

    layers: list[LayerInfo]
    sums: dict[str, Float[Tensor, "S L H"]] = field(default_factory=dict)
    counts: Float[Tensor, "S L"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: list[Tensor] = field(default_factory=list)
    sampled: str = ""
    errors: dict[str, Float[Tensor, "S L H"]] = field(default_factory=dict)

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return self.counts.shape[0]

    @property
    def n_tokens(self) -> int:
        """Number of real query tokens (of the layer that saw most)."""
        return int(self.counts.sum(0).max().item()) if self.counts.numel() else 0

    @property
    def names(self) -> list[str]:
        """Row statistics held."""
        return sorted(self.sums)

    def __getitem__(self, name: str) -> Float[Tensor, "L H"]:
        """Mean of a row statistic over real query tokens, per head (natural units, nats for entropy)."""
        return self._sum(name).sum(0) / self.counts.sum(0)[:, None]

    def by_sequence(self, name: str) -> Float[Tensor, "S L H"]:
        """Mean of a row statistic within each sequence."""
        return self._sum(name) / self.counts[..., None]

    def se(self, name: str) -> Float[Tensor, "L H"]:
        """Standard error of ``self[name]`` over sequences; NaN if there is only one.

        Of sampled rows it holds the error of the sample as well; of one sequence it is that error alone.
        """
        s = self.n_sequences
        if s < 2:
            return self.sampling_se(name) if name in self.errors else torch.full_like(self[name], float("nan"))
        residual = self._sum(name) - self.counts[..., None] * self[name]
        total = self.counts.sum(0)[:, None]
        return (residual.square().sum(0) * s / (s - 1)).sqrt() / total

    def sampling_se(self, name: str) -> Float[Tensor, "L H"]:
        """Standard error of ``self[name]`` from looking at a sample of the rows only; 0 where all were looked at."""
        if name not in self.errors:
            return torch.zeros_like(self[name])
        return self.errors[name].square().sum(0).sqrt() / self.counts.sum(0)[:, None]

    def _sum(self, name: str) -> Tensor:
        if name in self.columns:
            raise UserError(f"{name} is one number per token, not per head: read stats.columns[{name!r}].")
        if name == "distance_histogram":
            raise UserError(f"{name} has no mean: measure with keep_rows=({name!r},) and read stats.rows[{name!r}].")
        if name not in self.sums:
            raise unknown_name("statistic", name, self.sums)
        return self.sums[name]

    def select(self, layers: list[int]) -> Stats:
        """The statistics of these layers only, in this order."""
        return replace(
            self,
            layers=[self.layers[i] for i in layers],
            sums={k: v[:, layers] for k, v in self.sums.items()},
            counts=self.counts[:, layers],
            rows={k: [x[layers] for x in v] for k, v in self.rows.items()},
            columns={k: [x[layers] for x in v] for k, v in self.columns.items()},
            errors={k: v[:, layers] for k, v in self.errors.items()},
        )

    def merge(self, other: Stats) -> Stats:
        """The statistics of both sets of sequences: what one run over all of them gives.

        Raises:
            UserError: If the two come from different models or hold different statistics.
        """
        if not self.n_sequences:
            return other
        if not other.n_sequences:
            return self
        if self.layers != other.layers or set(self.sums) != set(other.sums):
            raise UserError(
                "Only statistics of the same model and the same names can be merged: "
                f"found {len(self.layers)} layers with {self.names} and {len(other.layers)} layers with {other.names}."
            )
        if self.sampled != other.sampled or set(self.errors) != set(other.errors):
            raise UserError(
                f"Statistics of {self.sampled or 'all'} rows and of {other.sampled or 'all'} rows cannot be merged: "
                "measure both with the same rows=."
            )
        return replace(
            self,
            sums={k: torch.cat([v, other.sums[k]]) for k, v in self.sums.items()},
            counts=torch.cat([self.counts, other.counts]),
            rows={k: v + other.rows.get(k, []) for k, v in self.rows.items()},
            columns={k: v + other.columns.get(k, []) for k, v in self.columns.items()},
            tokens=self.tokens + other.tokens,
            errors={k: torch.cat([v, other.errors[k]]) for k, v in self.errors.items()},
        )

    def __repr__(self) -> str:
        parts = [f"per head {', '.join(self.names)}"] if self.sums else []
        parts += [f"per token {', '.join(sorted(self.columns))}"] if self.columns else []
        parts += [f"rows of {', '.join(sorted(self.rows))}"] if self.rows else []
        return f"Stats({self.n_sequences} texts, {self.n_tokens} tokens, {len(self.layers)} layers; {'; '.join(parts)})"
