"""The Triton kernels against the float64 specification: in the interpreter without a GPU, natively with one."""

from __future__ import annotations

import os
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated, that is on import
pytest.importorskip("triton")

from headscope.kernels.blocks import blocks  # noqa: E402
from headscope.kernels.blocks import naive as naive_blocks  # noqa: E402
from headscope.kernels.blocks import triton as triton_blocks  # noqa: E402
from headscope.kernels.call import AttentionCall  # noqa: E402
from headscope.kernels.request import ROW_NAMES, ColumnSum, KeySet, Match, Request  # noqa: E402
from headscope.kernels.sweep import naive, triton  # noqa: E402
from headscope.kernels.sweep.sampled import draw, sampled  # noqa: E402
from headscope.kernels.triton_util import base2_lse, split_width  # noqa: E402
from headscope.kernels.visibility import Visibility  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel leaves unwritten shows up as NaN."""
    empty = torch.empty

    def filled(*args, **kwargs) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", filled)


def make(
    b: int = 2, h: int = 2, hk: int = 1, q: int = 41, k: int = 67, d: int = 20, dtype: torch.dtype = torch.float32,
    transposed: bool = False, sinks: Tensor | None = None, softcap: float | None = None, padded: bool = False, **rule
) -> AttentionCall:  # fmt: skip
    """A random call; padding is filled with NaN in q and k."""
    random = torch.Generator().manual_seed(q + 7 * k + d)

    def tensor(heads: int, n: int) -> Tensor:
        shape = (b, n, heads, d) if transposed else (b, heads, n, d)
        x = torch.randn(shape, generator=random).to(DEVICE, dtype)
        return x.transpose(1, 2) if transposed else x

    query, key = tensor(h, q) * 2, tensor(hk, k)
    rule = {"right": 0, "q_offset": k - q, **rule}
    real = keys = None
    if padded:
        keys = torch.ones(b, k, dtype=torch.bool, device=DEVICE)
        keys[0, : k // 2] = False
        keys[1, k - 9 :] = False
        real = keys[:, k - q :].clone()
        key = key.masked_fill(~keys[:, None, :, None], float("nan"))
        query = query.masked_fill(~real[:, None, :, None], float("nan"))
    return AttentionCall(
        query, key, key, d**-0.5, Visibility(keys=keys, **rule), softcap=softcap, real=real,
        sinks=None if sinks is None else sinks.to(DEVICE),
    )  # fmt: skip


def everything(call: AttentionCall) -> Request:
    b, _, _, q, k = call.shape
    random = torch.Generator().manual_seed(1)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(-1, high, shape, generator=random).to(DEVICE)

    return Request(
        rows=frozenset(ROW_NAMES),
        clipped={"clip5": 5, "clip40": 40},
        masses={
            "first": KeySet(first=4),
            "recent": KeySet(recent=9),
            "marked": KeySet(marked=integers(2, b, k) > 0),
        },
        targets={"target": integers(k, b, q)},
        matches={"match": Match(integers(4, b, q), integers(4, b, k), lag=1)},
        columns={
            "received": ColumnSum(),
            "weighted": ColumnSum(weights=torch.rand(b, q, generator=random).to(DEVICE)),
            "future": ColumnSum(lo=1, hi=12, mean=True),
            "mean": ColumnSum(mean=True),
        },
    )


# What one sweep adds up beside the columns when lse is given.
FUSED = Request(
    rows=frozenset({"entropy", "sum_sq", "distance", "lse", "top1_mass", "top1_key"}),
    clipped={"clip5": 5},
    masses={"first": KeySet(first=4), "recent": KeySet(recent=9)},
    columns={"received": ColumnSum()},
)


def clean(call: AttentionCall) -> AttentionCall:
    return replace(call, query=call.query.nan_to_num(0.0), key=call.key.nan_to_num(0.0))


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(found) == set(wanted)
    for name, want in wanted.items():
        have = found[name].double()
        assert have.shape == want.shape, name
        want = want.double().masked_fill(want == -torch.inf, 0.0)
        if name == "top1_key":
            assert torch.equal(have, want), name
        else:
            assert (have - want).abs().max() <= tolerance * max(1e-3, want.abs().max()), name


CASES = {
    "cache": {},
    "square": {"q": 67},
    "bidirectional": {"right": None},
    "window": {"q": 67, "left": 11},
    "two-sided window": {"right": 6, "left": 11, "d": 80},
    "later keys in whole tiles": {"b": 1, "q": 70, "k": 70, "d": 16, "right": 40},
    "padding": {"padded": True},
    "soft-cap": {"softcap": 4.0},
    "sink per head": {"sinks": torch.tensor([5.0, -1.0])},
    "sink per query": {"sinks": torch.linspace(-2, 3, 2 * 2 * 41).reshape(2, 2, 41), "softcap": 6.0},
    "sliding cache": {"q_offset": 30, "kv_offset": 13},
    "half, heads last": {"dtype": torch.float16, "transposed": True, "d": 96, "b": 1},
    "one kv head per head": {"hk": 2, "d": 16},
    "four heads per kv head": {"b": 1, "h": 4, "q": 17, "k": 35},
    "one query": {"q": 1, "k": 33},
    "rows that see nothing": {"q": 67, "q_offset": -9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given", [False, True], ids=["lse computed", "lse given"])
def test_every_statistic_is_the_specification(case: str, given: bool) -> None:
    call = make(**CASES[case])
    request = everything(call)
    lse = naive.pattern(clean(call))[1].float() if given else None
    assert_close(triton.run(call, request, lse), naive.sweep(clean(call), request))


@pytest.mark.parametrize("case", ["cache", "window", "bidirectional", "padding", "sink per head"])
def test_rows_and_columns_in_one_sweep(case: str) -> None:
    call = make(**CASES[case])
    lse = naive.pattern(clean(call))[1].float()
    found = triton.run(call, FUSED, lse)
    assert_close(found, naive.sweep(clean(call), FUSED))
    again = triton.run(call, FUSED, lse)
    assert all(torch.equal(found[n], again[n]) for n in found)


@pytest.mark.parametrize("given", [False, True], ids=["lse computed", "lse given"])
@pytest.mark.parametrize("where", ["query", "key", "infinite query"])
def test_a_nan_in_the_model_is_no_number(where: str, given: bool) -> None:
    call = make(b=1, h=4, hk=2, q=67)
    spoilt = {"query": call.query.clone(), "key": call.key.clone()}
    spoilt[where.split()[-1]][0, 1, 40] = float("inf" if "infinite" in where else "nan")
    bad = replace(call, **spoilt)
    heads, rows = ([2, 3], slice(40, None)) if where == "key" else ([1], slice(40, 41))
    lse = naive.pattern(bad)[1].float() if given else None
    for request in (everything(call), FUSED):
        found, wanted = triton.run(bad, request, lse), naive.sweep(call, request)
        for name in set(found) - {"top1_key"}:
            cut = slice(None) if name in request.columns else rows
            assert bool(found[name][0, heads, cut].isnan().all()), name
            found[name][0, heads, cut] = wanted[name][0, heads, cut].float()
        assert_close(*({n: x for n, x in y.items() if n != "top1_key"} for y in (found, wanted)))
    tiles = triton.run_tiles(bad, ROWS_ONLY, [1], 32, lse)
    assert all(bool(x[0, heads, 40].isnan().all()) and not bool(x[:, :, :32].any()) for x in tiles.values())


def test_rows_that_see_nothing_are_not_broken() -> None:
    call = make(**CASES["rows that see nothing"])
    found = triton.run(call, FUSED)
    assert all(bool(x.isfinite().all()) and not bool(x[:, :, 0].any()) for n, x in found.items() if n != "received")


@needs_gpu
@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_nan_comes_through_the_forward(where: str, dtype: torch.dtype) -> None:
    from headscope.kernels.forward import forward

    call = make(b=1, h=2, hk=2, q=200, k=200, d=64, dtype=dtype)
    spoilt = getattr(call, where).clone()
    spoilt[0, 1, 100] = float("nan")
    bad = replace(call, **{where: spoilt})
    lse = forward(bad)[1]
    found = triton.run(bad, FUSED, lse) | blocks(bad, 64, ["block_mass"], lse)
    for name in set(found) - {"top1_key"}:
        x = found[name][0, 1]
        assert bool((x[1] if name == "block_mass" else x[100]).isnan().any()), name
        assert bool(found[name][0, 0].isfinite().all()), name


@pytest.mark.parametrize("labels", [1, 3, 200])
@pytest.mark.parametrize("case", ["square", "cache", "window", "bidirectional", "padding", "sliding cache"])
def test_matches_of_few_and_of_many_labels(case: str, labels: int) -> None:
    call = make(**CASES[case])
    b, _, _, q, k = call.shape
    random = torch.Generator().manual_seed(labels)
    ids = torch.randint(0, labels, (b, 120), generator=random).to(DEVICE)
    ids[:, 5] = -1
    rows = ids[:, call.visible.q_offset :][:, :q]
    columns = ids[:, call.visible.kv_offset :][:, :k]
    before = torch.nn.functional.pad(columns[:, :-1], (1, 0), value=-1)
    request = Request(matches={"duplicate": Match(rows, columns, 1), "induction": Match(rows, before)})
    wanted = naive.sweep(clean(call), request)
    assert sum(bool(x.any()) for x in wanted.values()) == 2
    assert_close(triton.run(call, request), wanted)
    assert_close(triton.run(call, request, naive.pattern(clean(call))[1].float()), wanted)


@pytest.mark.parametrize("right", [0, None])
def test_far_from_the_diagonal(right: int | None) -> None:
    call = make(b=1, h=1, q=40, k=720, right=right, q_offset=330 if right is None else 680)
    call = replace(call, query=call.query / 8)  # flat rows: far keys hold most of the mass
    request = replace(everything(call), targets={}, columns={})
    assert_close(triton.run(call, request), naive.sweep(call, request))


def test_large_logits_stay_finite() -> None:
    call = make(q=67)
    call = replace(call, query=call.query * 3e3)
    found = triton.run(call, FUSED)
    assert all(bool(x.isfinite().all()) for x in found.values())
    assert torch.allclose(found["received"].sum(-1), torch.full((2, 2), 67.0, device=DEVICE), rtol=1e-3)


def test_column_sums_add_up_to_the_rows() -> None:
    call = make(padded=True)
    found = triton.run(call, Request(columns={"received": ColumnSum()}))["received"]
    assert torch.allclose(found.sum(-1), call.real_rows().sum(-1).float()[:, None].expand(2, 2), rtol=1e-5)
    assert bool((found.masked_select(~call.visible.keys[:, None].expand_as(found)) == 0).all())


def test_reasons_for_row_blocks() -> None:
    call = make()
    ask = Request(rows=frozenset({"entropy"}))
    assert triton.supports(call, ask)[0]
    assert "bias" in triton.supports(replace(call, bias=torch.zeros(1, 1, 41, 67)), ask)[1]
    ruled = replace(call, visible=replace(call.visible, rule=lambda b, h, i, j: i > j))
    assert "mask" in triton.supports(ruled, ask)[1]
    assert "dtype" in triton.supports(replace(call, query=call.query.double()), ask)[1]
    wide = make(d=300, q=3, k=3)
    assert "256" in triton.supports(wide, ask)[1]


def test_head_dims_are_split_into_powers_of_two() -> None:
    assert [split_width(d) for d in (8, 64, 80, 96, 128, 192, 256)] == [
        (16, 0), (64, 0), (64, 16), (64, 32), (128, 0), (128, 64), (256, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["cache", "bidirectional", "window", "padding"])
@pytest.mark.parametrize("edge", [16, 12])
def test_block_maps(case: str, edge: int) -> None:
    call = make(**CASES[case])
    stride = edge // 4
    wanted = naive_blocks.blocks(clean(call), edge, frozenset({"block_mass", "block_max", "antidiagonal"}), stride)
    assert_close(blocks(clean(call), edge, stride=stride), wanted)
    if edge in triton_blocks.EDGES:
        exact = frozenset({"block_mass", "block_max"})
        lse2 = base2_lse(call, naive.pattern(clean(call))[1].float())
        assert_close(triton_blocks.block_maps(call, edge, exact, lse2), {n: wanted[n] for n in exact})


def test_block_maps_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="multiple of the stride"):
        blocks(make(), 24, stride=16)
    with pytest.raises(ValueError, match="block_mass"):
        blocks(make(), 16, ["mass"])


ROWS_ONLY = Request(rows=frozenset({"entropy"}), clipped={"clip5": 5}, masses={"first": KeySet(first=4)})


def test_some_row_tiles_only() -> None:
    call = make(b=1, h=2, hk=1, q=200, k=200)
    labels = (torch.arange(200, device=DEVICE) % 7)[None]
    request = replace(
        ROWS_ONLY, targets={"self": torch.arange(200, device=DEVICE)[None]}, matches={"same": Match(labels, labels, 1)}
    )
    chosen = torch.zeros(200, device=DEVICE)
    chosen[32:64] = chosen[192:] = 1
    wanted = {n: x * chosen for n, x in naive.sweep(call, request).items()}
    assert_close(triton.run_tiles(call, request, [1, 6], 32), wanted)
    assert_close(triton.run_tiles(call, request, [1, 6], 32, naive.pattern(call)[1].float()), wanted)


def test_all_rows_sampled_is_the_mean() -> None:
    call = make(q=41, padded=True)
    wanted = naive.sweep(clean(call), ROWS_ONLY)
    n = call.real_rows().sum(-1)[:, None]
    for name, estimate in sampled(clean(call), ROWS_ONLY, 1).items():
        assert torch.allclose(estimate.mean, wanted[name].sum(-1) / n, rtol=1e-5, atol=1e-6)
        assert bool((estimate.se == 0).all())


def test_standard_error_covers_the_mean() -> None:
    call = make(b=1, h=2, hk=1, q=2500, k=2500, d=16)
    request = Request(rows=frozenset({"entropy"}))
    wanted = sampled(call, request, 1)["entropy"].mean
    hits = 0
    for seed in range(20):
        estimate = sampled(call, request, Fraction(1, 4), seed=seed)["entropy"]
        assert estimate.rows < 1000
        hits += int(((estimate.mean - wanted).abs() <= 2 * estimate.se).sum())
    assert hits >= 32  # of 40; a normal estimate covers 38


def test_samples_spread_over_the_text() -> None:
    picks = draw(160, Fraction(1, 16), seed=3)
    assert [p // 16 for p in picks] == list(range(10))
    assert draw(0, Fraction(1, 16), 0) == []
    with pytest.raises(ValueError, match="columns"):
        sampled(make(), FUSED)
    with pytest.raises(ValueError, match="fraction"):
        sampled(make(), ROWS_ONLY, 1.5)


@needs_gpu
@pytest.mark.parametrize("d", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_head_dims_and_dtypes_on_a_gpu(d: int, dtype: torch.dtype) -> None:
    call = make(q=300, k=377, d=d, dtype=dtype, left=200)
    lse = naive.pattern(call)[1].float()
    for request in (everything(call), FUSED):
        assert_close(triton.run(call, request, lse), naive.sweep(call, request))
        assert_close(triton.run(call, request), naive.sweep(call, request))


@needs_gpu
def test_more_than_two_billion_elements() -> None:
    query = torch.randn(1, 17, 1 << 20, 128, device=DEVICE, dtype=torch.bfloat16)
    call = AttentionCall(query, query[:, :1], query[:, :1], 128**-0.5, Visibility(left=500, right=0))
    found = triton.run(call, Request(rows=frozenset({"entropy"}), columns={"received": ColumnSum()}))
    rows = slice((1 << 20) - 700, 1 << 20)
    tail = replace(call, query=query[:, 16:, rows], key=query[:, :1, rows], value=query[:, :1, rows])
    wanted = naive.sweep(tail, Request(rows=frozenset({"entropy"}), columns={"received": ColumnSum()}))
    for name, keep in (("entropy", slice(500, None)), ("received", slice(500, None))):
        assert torch.allclose(found[name][:, 16:, rows][..., keep].double(), wanted[name][..., keep], rtol=1e-4)


@needs_gpu
@pytest.mark.parametrize(
    "d, dtype", [(128, torch.bfloat16), (72, torch.float16), (256, torch.bfloat16), (64, torch.float32)]
)
@pytest.mark.parametrize("right", [0, None])
def test_fused_forward_returns_its_normaliser(d: int, dtype: torch.dtype, right: int | None) -> None:
    from headscope.kernels.forward import cuda

    call = make(q=300, k=300, d=d, dtype=dtype, right=right)
    out, lse = cuda.forward(call, right == 0)
    p, wanted = naive.pattern(call)
    z = p @ call.value.double().repeat_interleave(call.groups, 1)
    assert (lse.double() - wanted).abs().max() < 1e-4
    assert (out.double() - z).norm() / z.norm() < 5e-3
