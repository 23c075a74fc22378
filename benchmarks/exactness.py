"""Exactness at lengths where no dense reference fits: float64 on whole heads, and on sampled rows and columns."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from headscope.kernels.call import AttentionCall
from headscope.kernels.forward import forward
from headscope.kernels.request import ColumnSum, KeySet, Match, Request
from headscope.kernels.sweep import sweep
from headscope.kernels.sweep.bins import bin_edges


def everything(length: int) -> Request:
    """Every row and column statistic there is, with token labels as frequent as in text."""
    at = torch.arange(length, device="cuda")[None]
    labels = zipf(length)
    before = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=-1)
    weights = torch.rand(1, length, device="cuda", generator=torch.Generator("cuda").manual_seed(length))
    return Request(
        rows=frozenset({"entropy", "distance", "sum_sq", "top1_mass", "top1_key", "distance_histogram"}),
        clipped={"clipped_distance_64": 64},
        masses={"mass_first4": KeySet(first=4), "mass_recent64": KeySet(recent=64)},
        targets={"prev_token_score": at - 1},
        matches={"duplicate_token_score": Match(labels, labels, 1), "induction_score": Match(labels, before)},
        columns={
            "received": ColumnSum(),
            "weighted received": ColumnSum(weights=weights),
            "future": ColumnSum(lo=10, hi=100, mean=True),
        },
    )


def zipf(length: int, vocabulary: int = 32000) -> Tensor:
    """Token ids drawn like words of a text: the n-th most frequent one with a share proportional to 1 / n, [1, N]."""
    shares = 1 / torch.arange(1, vocabulary + 1, device="cuda", dtype=torch.float64)
    random = torch.Generator("cuda").manual_seed(length)
    return torch.multinomial(shares, length, replacement=True, generator=random)[None]


def against_float64(call: AttentionCall, heads: tuple[int, ...] = (0, 17)) -> dict:
    """Norm-relative errors of every row and column of some heads, given the forward's lse.

    Once with the statistics that one sweep adds up beside the columns, once with all in a sweep over the rows; the
    larger error counts. For ``top1_key`` it is the share of rows with another key.
    """
    length, width = call.query.shape[2:]
    lse, request = forward(call)[1], everything(call.query.shape[2])
    fused = replace(request, rows=request.rows - {"distance_histogram"})
    runs = [sweep(call, r, lse) for r in (request, fused)]
    errors: dict[str, float] = {}
    for h in heads:
        want = _head(call.query[0, h].double(), call.key[0, h // call.groups].double(), call.scale, request)
        want_lse = want.pop("lse")
        errors["lse"] = max(errors.get("lse", 0.0), _error(lse[0, h], want_lse))
        for name, value in want.items():
            found = [run[name][0, h] for run in runs if name in run]
            if name == "top1_key":
                error = max((x != value).double().mean().item() for x in found)
            else:
                error = max(_error(x, value) for x in found)
            errors[name] = max(error, errors.get(name, 0.0))
    return {"length": length, "width": width, "heads": list(heads), "errors": errors}


def _error(found: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    return ((found.double() - want).norm() / want.norm()).item()


def _head(q: Tensor, k: Tensor, scale: float, request: Request, step: int = 1024) -> dict[str, Tensor]:
    """Every statistic of one causal head from its dense map in float64, some rows at a time."""
    n = len(q)
    parts: list[dict[str, Tensor]] = []
    columns = {name: torch.zeros_like(q[:, 0]) for name in request.columns}
    for start in range(0, n, step):
        rows = torch.arange(start, min(start + step, n), device=q.device)
        p, part = _rows(q[rows], k, scale, rows)
        parts.append(part | _labelled(p, rows, request))
        for name, column in request.columns.items():
            columns[name] += _column(p, rows, column)
    found = {name: torch.cat([x[name] for x in parts]) for name in parts[0]}
    later = torch.arange(n, device=q.device)
    window = (n - (later + 10)).clamp(0, 91)  # rows that are 10 to 100 tokens behind a key
    columns["future"] /= window.clamp(min=1)
    return found | columns


def _rows(q: Tensor, k: Tensor, scale: float, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Map and statistics of some rows of one causal head in float64."""
    j = torch.arange(len(k), device=q.device)
    away = rows[:, None] - j
    s = (q @ k.mT * scale).masked_fill_(away < 0, -torch.inf)
    lse = s.logsumexp(-1)
    p = s.sub_(lse[:, None]).exp_()
    top = p.max(-1)
    edges = bin_edges(len(k), len(k), 0)
    which = torch.bucketize(away.abs(), torch.tensor(edges, device=q.device), right=True) - 1
    return p, {
        "lse": lse,
        "entropy": -torch.xlogy(p, p).sum(-1),
        "distance": (p * away).sum(-1),
        "sum_sq": p.square().sum(-1),
        "top1_mass": top.values,
        "top1_key": top.indices,
        "clipped_distance_64": (p * away.clamp(max=64)).sum(-1),
        "mass_first4": p[:, :4].sum(-1),
        "mass_recent64": (p * (away < 64)).sum(-1),
        "distance_histogram": p.new_zeros(len(q), len(edges)).scatter_add_(1, which, p),
    }


def _labelled(p: Tensor, rows: Tensor, request: Request) -> dict[str, Tensor]:
    """Masses on keys that a target or a label names."""
    j = torch.arange(p.shape[1], device=p.device)
    found: dict[str, Tensor] = {}
    for name, index in request.targets.items():
        at = index.flatten()[rows]
        found[name] = p.gather(1, at.clamp(min=0)[:, None])[:, 0] * (at >= 0)
    for name, match in request.matches.items():
        same = match.query_labels[0, rows][:, None] == match.key_labels[0]
        found[name] = (p * (same & (rows[:, None] - j >= match.lag))).sum(-1)
    return found


def _column(p: Tensor, rows: Tensor, column: ColumnSum) -> Tensor:
    """The rows' part of a column sum."""
    if column.weights is not None:
        p = p * column.weights[0, rows][:, None].double()
    if column.lo is not None and column.hi is not None:
        away = rows[:, None] - torch.arange(p.shape[1], device=p.device)
        p = p * ((away >= column.lo) & (away <= column.hi))
    return p.sum(0)


def million(call: AttentionCall, request: Request, n: int = 16) -> dict:
    """One layer at a length of about a million: time, memory, and errors on sampled rows and columns of every head."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begin = time.time()
    found = sweep(call, replace(request, rows=request.rows | {"lse"}))
    torch.cuda.synchronize()
    alone = time.time() - begin
    lse = found["lse"]
    begin = time.time()
    given = sweep(call, request, lse)
    torch.cuda.synchronize()
    fused = time.time() - begin
    peak = torch.cuda.max_memory_allocated() / 2**30
    length = call.query.shape[2]
    rows = torch.linspace(0, length - 1, n, device="cuda").long()
    j = torch.arange(length, device="cuda")
    errors: dict[str, float] = {}

    def note(name: str, have: Tensor, want: Tensor) -> None:
        errors[name] = max(errors.get(name, 0.0), _error(have, want))

    for h in range(call.query.shape[1]):
        q, k = call.query[0, h], call.key[0, h // call.groups].double()
        for name, value in _rows(q[rows].double(), k, call.scale, rows)[1].items():
            if name in found:
                note(name, found[name][0, h, rows], value)
            if name in given:
                note(name + " (lse given)", given[name][0, h, rows], value)
        columns = torch.linspace(0, length - 2, n, device="cuda").long()
        s = q.double() @ k[columns].mT * call.scale
        p = (s - lse[0, h, :, None].double()).exp_().masked_fill_(j[:, None] < columns, 0.0)
        note("received", given["received"][0, h, columns], p.sum(0))
    return {
        "tokens": length,
        "seconds without lse": round(alone, 2),
        "seconds given lse": round(fused, 2),
        "peak GiB": round(peak, 2),
        "rows and columns checked per head": n,
        "largest relative error": errors,
    }
