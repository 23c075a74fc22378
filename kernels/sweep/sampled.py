"""Averages of row statistics from a sample of the query rows, each with a standard error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from ..call import AttentionCall
from ..parts import rows_of
from ..request import Request
from . import choose, sweep

CLUSTER = 64
# Runs at the start that are always looked at: statistics change like 1/i there, and a draw would be at its worst.
CERTAIN = 4


@dataclass(frozen=True, eq=False)
class Estimate:
    """Mean over real rows of each sequence and head, its standard error, and the rows it rests on.

    The rows come in runs of 64; ``se`` is NaN where fewer than two runs hold a real row.
    """

    mean: Float[Tensor, "B H"]
    se: Float[Tensor, "B H"]
    rows: int


def sampled(
    call: AttentionCall,
    request: Request,
    rows: float | Fraction = Fraction(1, 16),
    lse: Float[Tensor, "B H Q"] | None = None,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimate the means of row statistics from a fraction of the rows.

    The first 256 rows are always looked at. After them one run of 64 rows is drawn from each stretch of 1/rows runs,
    so that early and late rows are all represented. The standard error compares neighbouring stretches (successive
    differences), which is conservative where a statistic drifts along the text, and carries the finite-population
    factor 1 - rows; the rows that are always looked at have none.

    Args:
        call: The call.
        request: Row statistics only: no columns; ``top1_key`` and the histogram have no mean.
        rows: Fraction of the rows to look at, in (0, 1].
        lse: Normaliser, if known.
        seed: Seed of the draw.

    Raises:
        ValueError: If columns are asked for or the fraction is outside (0, 1].
    """
    if request.columns or request.rows & {"top1_key", "distance_histogram"}:
        raise ValueError("Sampled rows give means of row statistics; columns, top1_key and histograms need all rows.")
    fraction = Fraction(rows).limit_denominator(10**6)
    if not 0 < fraction <= 1:
        raise ValueError(f"Expected a fraction of rows in (0, 1]; found {rows}.")
    q = call.shape[3]
    total = -(-q // CLUSTER)
    sure = min(CERTAIN, total)
    picks = [*range(sure), *(sure + n for n in draw(total - sure, fraction, seed))]
    names, sums, weights = _on_gpu(call, request, picks, lse) or _one_by_one(call, request, picks, lse)
    everything = call.real_rows().sum(-1).double()
    looked = sum(len(r) for r in _ranges(picks, q))
    share = (len(picks) - sure) / max(1, total - sure)
    means, errors = _estimate(sums, weights, sure, share, everything)
    return {n: Estimate(mean, se, looked) for n, mean, se in zip(names, means, errors, strict=True)}


def draw(runs: int, fraction: Fraction, seed: int) -> list[int]:
    """Numbers of the runs to look at: one drawn at random from each of about runs * fraction equal stretches."""
    n = min(runs, max(1, round(runs * fraction)))
    random = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = torch.arange(n, dtype=torch.float64) * runs / n
    found = (start + random * runs / n).long().clamp(max=runs - 1)
    return sorted(set(found.tolist()))


def _ranges(picks: list[int], q: int) -> list[range]:
    return [range(n * CLUSTER, min(q, (n + 1) * CLUSTER)) for n in picks]


def _on_gpu(
    call: AttentionCall, request: Request, picks: list[int], lse: Tensor | None
) -> tuple[list[str], Tensor, Tensor] | None:
    """Names, sums of all runs [S, B, H, n] and real rows [B, n], from one launch where the Triton kernels can do it."""
    if not call.query.is_cuda or choose(call, request)[0] != "triton":
        return None
    from . import triton

    def by_run(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % CLUSTER))
        return x.unflatten(-1, (-1, CLUSTER))[..., picks, :].sum(-1, dtype=torch.float64)

    found = triton.run_tiles(call, request, picks, CLUSTER, lse)
    return list(found), by_run(torch.stack(list(found.values()))), by_run(call.real_rows())


def _one_by_one(
    call: AttentionCall, request: Request, picks: list[int], lse: Tensor | None
) -> tuple[list[str], Tensor, Tensor]:
    parts = [_run(call, request, r, lse) for r in _ranges(picks, call.shape[3])]
    names = list(parts[0][0])
    sums = torch.stack([torch.stack([v[n] for n in names]) for v, _ in parts], -1)
    return names, sums, torch.stack([w for _, w in parts], -1)


def _run(call: AttentionCall, request: Request, rows: range, lse: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over one run's real rows, [B, H] each in float64, and the number of real rows, [B]."""
    cut = slice(rows.start, rows.stop)
    part = rows_of(call, rows)
    asked = replace(
        request,
        targets={n: t.reshape(call.shape[0], -1)[:, cut] for n, t in request.targets.items()},
        matches={n: replace(m, query_labels=m.query_labels[:, cut]) for n, m in request.matches.items()},
    )
    found = sweep(part, asked, None if lse is None else lse[:, :, cut])
    return {n: v.double().sum(-1) for n, v in found.items()}, part.real_rows().sum(-1).double()


def _estimate(sums: Tensor, weights: Tensor, sure: int, share: float, everything: Tensor) -> tuple[Tensor, Tensor]:
    """Means over all real rows and their standard errors, [S, B, H]: the first ``sure`` runs are known exactly."""
    known, rest = sums[..., :sure].sum(-1), sums[..., sure:]
    drawn = weights[:, sure:]
    left = (everything - weights[:, :sure].sum(-1))[:, None]  # real rows behind the drawn runs
    seen = drawn.sum(-1)[:, None]
    ratio = torch.where(seen > 0, rest.sum(-1) / seen.clamp(min=1), 0.0)
    mean = (known + ratio * left) / everything[:, None].clamp(min=1)
    n = drawn.shape[-1]
    if share >= 1 or n == 0:
        return mean, torch.zeros_like(mean)
    # Ratio estimator: deviations of the runs' sums from what the mean predicts, compared with their neighbours'.
    residual = rest - ratio[..., None] * drawn[:, None]
    spread = residual.diff(dim=-1).square().sum(-1) / max(1, 2 * (n - 1))
    error = (n * spread * (1 - share)).clamp(min=0).sqrt() / seen.clamp(min=1)
    error = error * left / everything[:, None].clamp(min=1)
    return mean, torch.where((drawn > 0).sum(-1)[:, None] < 2, float("nan"), error)
