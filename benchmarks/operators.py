"""What ``benchmarks/kernels.py`` times: every operator, the edits of a plan, and the peers they stand against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.exactness import zipf
from headscope.kernels.attend import flex
from headscope.kernels.attend import triton as fused
from headscope.kernels.blocks import blocks
from headscope.kernels.call import AttentionCall
from headscope.kernels.edits import BlockMask, Knockout, Reset
from headscope.kernels.forward import forward
from headscope.kernels.plan import Plan
from headscope.kernels.request import ColumnSum, KeySet, Match, Request
from headscope.kernels.sweep import sweep
from headscope.kernels.sweep.sampled import sampled
from headscope.kernels.tile import tile

HEADS, KV_HEADS = 32, 8
ROWS = Request(
    rows=frozenset({"entropy"}),
    clipped={"clipped_distance_64": 64},
    masses={"mass_first4": KeySet(first=4), "mass_recent64": KeySet(recent=64)},
)
COLUMNS = Request(columns={"received": ColumnSum()})
FUTURE = Request(columns={"future": ColumnSum(lo=10, hi=100)})
MEASURED = Request(ROWS.rows, ROWS.clipped, ROWS.masses, columns=COLUMNS.columns)
TOP = Request(rows=frozenset({"top1_mass", "top1_key"}))
HISTOGRAM = Request(rows=frozenset({"distance_histogram"}))
ALL_ROWS = Request(
    rows=frozenset({"entropy", "distance", "sum_sq", "top1_mass", "top1_key", "distance_histogram"}),
    clipped=ROWS.clipped,
    masses=ROWS.masses,
)
# The 12 statistics that a scan measures without being asked, and attention received.
ROWS_OF_DEFAULT = frozenset({"entropy", "distance", "sum_sq", "top1_mass"})
FIRST_AND_RECENT = {"mass_first": KeySet(first=1), **ROWS.masses}
# name -> (looks at q k^T, counted as one for each 2 D of work and 0 where it is no sweep; the operator)
Table = dict[str, tuple[int, Callable[[], object]]]


def operators(call: AttentionCall, lse: Tensor) -> Table:
    """The statistics, with and without a normaliser, and the forwards they are compared with."""
    q, k, v, scale = call.query, call.key, call.value, call.scale
    length = q.shape[2]
    at = torch.arange(length, device="cuda")[None]
    labels = zipf(length)
    duplicate, induction = (
        Match(labels, labels, 1),
        Match(labels, torch.nn.functional.pad(labels[:, :-1], (1, 0), value=-1)),
    )
    usual = Request(
        rows=ROWS_OF_DEFAULT, clipped={"clipped_distance": 10}, masses=FIRST_AND_RECENT,
        targets={"self": at, "previous": at - 1}, matches={"duplicate": duplicate, "induction": induction},
        columns=COLUMNS.columns,
    )  # fmt: skip
    both = Request(columns={"a": ColumnSum(), "b": ColumnSum(weights=torch.rand(1, length, device="cuda"))})
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    piece = range(length - 512, length)

    def given(request: Request) -> Callable[[], object]:
        return lambda: sweep(call, request, lse)

    def alone(request: Request) -> Callable[[], object]:
        return lambda: sweep(call, request)

    return {
        "forward: cuDNN SDPA with lse": (2, lambda: forward(call)),
        "forward: flash SDPA": (2, lambda: flash(q, k, v, 0.0, True, False, scale=scale)),
        "given lse: 4 row statistics + received, one sweep": (1, given(MEASURED)),
        "given lse: 4 row statistics": (1, given(ROWS)),
        "given lse: received": (1, given(COLUMNS)),
        "given lse: received and weighted received": (1, given(both)),
        "given lse: future, window 10-100": (0, given(FUTURE)),
        "given lse: target mass": (0, given(Request(targets={"previous": at - 1}))),
        "given lse: the 12 default statistics + received": (1, given(usual)),
        "given lse: duplicate tokens, as frequent as words": (0, given(Request(matches={"a": duplicate}))),
        "given lse: duplicate tokens, all alike": (
            1,
            given(Request(matches={"a": Match(labels * 0, labels * 0, 1)})),
        ),
        "given lse: top-1 key and mass": (1, given(TOP)),
        "given lse: distance histogram": (1, given(HISTOGRAM)),
        "given lse: every row statistic, top-1 and histogram too": (1, given(ALL_ROWS)),
        "no lse: lse": (1, alone(Request(rows=frozenset({"lse"})))),
        "no lse: 4 row statistics": (1, alone(ROWS)),
        "no lse: every row statistic, top-1 and histogram too": (1, alone(ALL_ROWS)),
        "no lse: 4 row statistics + received, two sweeps": (2, alone(MEASURED)),
        "given lse: block mass and maximum, edge 128": (1, lambda: blocks(call, 128, ("block_mass", "block_max"), lse)),
        "antidiagonal blocks, edge 128, stride 16": (0, lambda: blocks(call, 128, ("antidiagonal",))),
        "given lse: tile of one head, last 512 rows, all keys, pooled to 512 x 512": (
            0,
            lambda: tile(call, lse, 0, 5, piece, range(length), (512, 512)),
        ),
        "no lse: 4 row statistics from 1/16 of the rows": (0, lambda: sampled(call, ROWS)),
    }


def plans(length: int) -> dict[str, Plan]:
    """One plan per field, every head edited."""
    random = torch.Generator("cuda").manual_seed(length)
    every = torch.ones(HEADS, dtype=torch.bool, device="cuda")
    share = torch.full((HEADS,), 0.4, device="cuda")
    n = -(-length // 128)

    def drawn(p: float, *shape: int) -> Tensor:
        return torch.rand(shape, device="cuda", generator=random) < p

    few = torch.zeros(1, HEADS, length, dtype=torch.bool, device="cuda")
    few[..., torch.randperm(length, device="cuda", generator=random)[:32]] = True
    half = drawn(0.5, 1, HEADS, length)
    blocks = drawn(0.25, HEADS, n, n) | torch.eye(n, dtype=torch.bool, device="cuda")
    return {
        "temperature": Plan(logit_scale=share),
        "key bias": Plan(logit_bias=torch.randn(HEADS, length, device="cuda", generator=random)),
        "window of 4 + 1,024 keys": Plan(window=torch.tensor([[4, 1024]] * HEADS, device="cuda")),
        "a quarter of the 128 x 128 blocks": Plan(block_mask=BlockMask(blocks, 128)),
        "knockout": Plan(knockout=Knockout(every, drawn(0.5, 1, 1, length), drawn(0.1, 1, 1, length))),
        "reset of 32 keys": Plan(reset=Reset(few, share)),
        "reset of half the keys": Plan(reset=Reset(half, share)),
        "reset of 32 keys to half the keys": Plan(reset=Reset(few, share, half)),
    }


def edits(call: AttentionCall) -> Table:
    """The fused edited attention: without an edit, for a window of the model's own, and field by field."""
    from dataclasses import replace

    narrow = replace(call, visible=replace(call.visible, left=1023), softcap=30.0)
    found: Table = {
        "edited forward, no edit": (2, lambda: fused.attend(call, Plan())),
        "forward: sliding window 1,024 and soft-cap": (0, lambda: forward(narrow)),
    }
    for name, plan in plans(call.shape[3]).items():
        looks = 0 if name.startswith(("window", "a quarter")) else 2
        found[f"edited forward, {name}"] = (looks, lambda plan=plan: fused.attend(call, plan))
    return found


def peers(call: AttentionCall, lse: Tensor, with_edits: bool) -> Table:
    """What the same numbers cost without these kernels."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    q, k = call.query, call.key
    length = q.shape[2]
    compiled = torch.compile(flex_attention)
    later = create_block_mask(lambda b, h, a, c: c >= a, None, None, length, length, device="cuda")
    key = k.repeat_interleave(call.groups, 1)

    def score(s: Tensor, b: Tensor, h: Tensor, a: Tensor, c: Tensor) -> Tensor:
        return s - lse[b, h, c]

    def received() -> Tensor:
        value = torch.ones_like(q)
        out, aux = compiled(key, q, value, score, later, scale=call.scale, return_aux=AuxRequest(lse=True))
        return aux.lse.exp()

    def eager() -> tuple[Tensor, ...]:
        s = (q @ key.mT).float() * call.scale
        s.masked_fill_(torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1), -torch.inf)
        p = s.softmax(-1)
        return p.sum(2), -torch.xlogy(p, p).sum(-1)

    found: Table = {"peer: received by a second FlexAttention call": (2, received)}
    for name, plan in plans(length).items() if with_edits else ():
        if flex.supports(call, plan)[0]:
            looks = 0 if name.startswith(("window", "a quarter")) else 2
            found[f"peer: FlexAttention, {name}"] = (looks, lambda plan=plan: flex.attend(call, plan))
    if length <= 8192:
        found["peer: entropy and received, dense torch"] = (1, eager)
    return found
