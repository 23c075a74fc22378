"""HeadScores and TokenScores: what every probe returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .display import Shown
from .heads import HeadId


@dataclass(frozen=True, eq=False)
class HeadScores(Shown):
    """One number per head, with its error, its null baseline and how it came about.

    Attributes:
        name: Column name of the score, for example ``induction_score``.
        scores: Score of each head; NaN where a layer has fewer heads or the score does not apply.
        se: Standard error over sequences or trials; NaN for a single one.
        n: Number of sequences or trials behind each score.
        threshold: Score from which a head is named after the probe; None if the probe names none.
        null: What the same score is without the phenomenon (per head or one number), or None.
        trials: Scores of each sequence or trial, where kept.
        details: Everything else worth printing (definition, parameters, counts): plain JSON-able data.
    """

    name: str
    scores: Float[Tensor, "L H"]
    se: Float[Tensor, "L H"] | None = None
    n: int = 1
    threshold: float | None = None
    null: Float[Tensor, "L H"] | float | None = None
    trials: Float[Tensor, "N L H"] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def top(self, k: int = 10) -> list[HeadId]:
        """The k highest heads, best first; ties in the order (layer, head); NaN never."""
        flat = self.scores.flatten().double()
        order = sorted((i for i in range(len(flat)) if not torch.isnan(flat[i])), key=lambda i: (-flat[i].item(), i))
        return [HeadId(*divmod(i, self.scores.shape[1])) for i in order[:k]]

    def named(self) -> list[HeadId]:
        """Heads at or above the threshold, best first (empty if the probe has no threshold)."""
        if self.threshold is None:
            return []
        return [h for h in self.top(self.scores.numel()) if self.scores[h.layer, h.head] >= self.threshold]

    def interval(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Float[Tensor, "2 L H"]:
        """Percentile bootstrap interval of the mean over sequences or trials (needs ``trials``).

        Raises:
            ValueError: If no trials were kept.
        """
        if self.trials is None:
            raise ValueError(f"{self.name} kept no trials, so there is nothing to resample.")
        gen = torch.Generator().manual_seed(seed)
        n = self.trials.shape[0]
        weights = torch.zeros(draws, n, dtype=torch.float64)
        picks = torch.randint(n, (draws, n), generator=gen)
        weights.scatter_add_(1, picks, torch.ones(draws, n, dtype=torch.float64))
        means = (weights / n) @ self.trials.double().flatten(1)
        tail = (1 - level) / 2
        bounds = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
        return bounds.reshape(2, *self.scores.shape)

    def to_frame(self) -> pd.DataFrame:
        """One row per head: layer, head, head_id, score, se, null, named; sorted by layer and head."""
        named = set(self.named())
        rows = []
        for layer in range(self.scores.shape[0]):
            for head in range(self.scores.shape[1]):
                value = self.scores[layer, head].item()
                if value != value:
                    continue
                h = HeadId(layer, head)
                se = float("nan") if self.se is None else self.se[layer, head].item()
                null = self.null[layer, head].item() if isinstance(self.null, Tensor) else self.null
                rows.append((layer, head, str(h), value, se, null, h in named))
        return pd.DataFrame(rows, columns=["layer", "head", "head_id", self.name, f"{self.name}_se", "null", "named"])

    def __repr__(self) -> str:
        layers, heads = self.scores.shape
        best = "".join(f", highest {h} {self.scores[h.layer, h.head]:.3g}" for h in self.top(1))
        named = "" if self.threshold is None else f", {len(self.named())} named from {self.threshold:g} on"
        return f"HeadScores({self.name!r}: {layers} layers x {heads} heads, n = {self.n}{named}{best})"


@dataclass(frozen=True, eq=False)
class TokenScores(Shown):
    """One row per token: a frame with ``sequence``, ``position`` and the probe's columns."""

    name: str
    frame: pd.DataFrame
    details: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """The rows themselves."""
        return self.frame

    def __repr__(self) -> str:
        columns = ", ".join(map(str, self.frame.columns))
        texts = self.frame["sequence"].nunique() if "sequence" in self.frame else 1
        return f"TokenScores({self.name!r}: {len(self.frame)} tokens of {texts} texts; columns {columns})"
