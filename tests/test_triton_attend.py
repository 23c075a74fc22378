"""The fused edited attention and its FlexAttention twin against float64: in the interpreter, natively with a GPU."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated, that is on import
pytest.importorskip("triton")

from headscope.kernels import attend as dispatch  # noqa: E402
from headscope.kernels.attend import attend, chunked, flex, naive, triton  # noqa: E402
from headscope.kernels.call import AttentionCall  # noqa: E402
from headscope.kernels.edits import BlockMask, Knockout, PatternEdit, Reset  # noqa: E402
from headscope.kernels.forward import forward  # noqa: E402
from headscope.kernels.plan import Plan  # noqa: E402
from headscope.kernels.visibility import Visibility  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
B, H, HK = 2, 4, 2


def make(
    q: int = 19, k: int = 45, d: int = 20, dv: int | None = None, dtype: torch.dtype = torch.float32,
    padded: bool = False, sinks: Tensor | None = None, softcap: float | None = None, heads_last: bool = False, **rule
) -> AttentionCall:  # fmt: skip
    random = torch.Generator().manual_seed(q + 3 * k + d)

    def tensor(heads: int, n: int, width: int) -> Tensor:
        shape = (B, n, heads, width) if heads_last else (B, heads, n, width)
        x = torch.randn(shape, generator=random).to(dtype)
        return x.transpose(1, 2) if heads_last else x

    keys = None
    if padded:
        keys = torch.ones(B, k, dtype=torch.bool)
        keys[0, :7] = False
        keys[1, k - 5 :] = False
    rule = {"right": 0, "q_offset": k - q, **rule}
    return AttentionCall(
        tensor(H, q, d) * 1.5, tensor(HK, k, d), tensor(HK, k, dv or d), d**-0.5, Visibility(keys=keys, **rule),
        softcap=softcap, sinks=sinks,
    )  # fmt: skip


def only(*heads: int) -> Tensor:
    return torch.tensor([h in heads for h in range(H)])


def plans(call: AttentionCall, size: int = 8) -> dict[str, Plan]:
    """One plan per field; heads 0 to 3 get different values, one of them neutral."""
    q, k = call.shape[3:]
    random = torch.Generator().manual_seed(5)

    def share(p: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=random) < p

    grid = -(-(k + q + 16) // size)
    keep = torch.tensor([0.4, 1.0, 0.0, 0.7])
    early = share(0.2, B, H, k)
    early[:, :, k // 2 :] = False  # tiles without a member are skipped
    scale = torch.tensor([1.0, 0.5, -0.7, 2.0])
    bias = torch.randn(B, H, k, generator=random)
    window = torch.tensor([[2, 5], [-1, -1], [0, 9], [4, 0]])
    blocks = share(0.5, H, grid, grid)
    return {
        "scale": Plan(logit_scale=scale),
        "bias": Plan(logit_bias=bias[0].masked_fill(share(0.1, H, k), -torch.inf)),
        "bias per sequence": Plan(logit_bias=bias),
        "window": Plan(window=window),
        "blocks": Plan(block_mask=(BlockMask(blocks, size), BlockMask(share(0.8, H, grid, grid), size))),
        "knockouts": Plan(
            knockout=(
                Knockout(only(0, 2), share(0.5, B, 1, q), share(0.4, 1, H, k)),
                Knockout(only(2, 3), share(0.3, 1, 1, q), share(0.7, B, 1, k)),
            )
        ),
        "reset": Plan(reset=Reset(early, keep)),
        "reset to receivers in some rows": Plan(reset=Reset(early, keep, share(0.3, B, 1, k), share(0.6, 1, H, q))),
        "all": Plan(
            logit_scale=scale,
            logit_bias=bias[0],
            window=window,
            block_mask=BlockMask(blocks, size),
            knockout=Knockout(only(1), share(0.5, 1, 1, q), share(0.2, 1, H, k)),
            reset=Reset(share(0.3, 1, H, k), keep, rows=share(0.5, B, H, q)),
        ),
    }


def there(x: object) -> object:
    """The same on the device of the kernels."""
    if isinstance(x, Tensor):
        return x.to(DEVICE)
    if isinstance(x, tuple):
        return tuple(map(there, x))
    return replace(x, **{f.name: there(getattr(x, f.name)) for f in fields(x)}) if is_dataclass(x) else x


def assert_equal(call: AttentionCall, plan: Plan, run=triton.attend, tolerance: float = 2e-5) -> None:
    """Output relative to its largest value; the normaliser, -inf where a row sees nothing."""
    out, lse = run(there(call), there(plan))
    want, want_lse = naive.attend(call, plan)
    assert out.dtype == call.query.dtype
    error = (out.cpu().double() - want).abs().max() / want.abs().max().clamp(min=1e-3)
    assert error <= tolerance, f"{error:.1e}"
    blind = want_lse == -torch.inf
    assert torch.equal(lse.cpu() == -torch.inf, blind)
    torch.testing.assert_close(lse.cpu().double()[~blind], want_lse[~blind], atol=3e-5, rtol=3e-5)


CALLS = {
    "cache": {},
    "square": {"q": 45},
    "bidirectional": {"right": None, "q_offset": 9},
    "sliding window": {"q": 45, "left": 11},
    "two-sided window": {"right": 6, "left": 11, "d": 80, "dv": 24},
    "left and right padding": {"padded": True},
    "soft-cap and sinks": {"softcap": 3.0, "sinks": torch.tensor([3.0, -torch.inf, 0.0, -2.0])},
    "sink per row": {"sinks": torch.linspace(-2, 4, B * H * 19).reshape(B, H, 19)},
    "sliding cache": {"q_offset": 30, "kv_offset": 13},
    "half precision, heads last": {"dtype": torch.float16, "heads_last": True, "d": 96, "q": 21},
    "rows that see nothing": {"q": 45, "q_offset": -9},
}


@pytest.mark.parametrize("case", CALLS)
def test_fused_edits_are_the_specification(case: str) -> None:
    call = make(**CALLS[case])
    tolerance = 2e-3 if call.query.dtype == torch.float16 else 2e-5
    every = plans(call)
    few = ("reset to receivers in some rows", "bias per sequence", "all") if call.visible.keys is not None else ("all",)
    for name in every if CUDA or case == "cache" else few:
        assert_equal(call, every[name], tolerance=tolerance)


def test_whole_blocks_are_skipped() -> None:
    """Blocks of whole tiles are read from a list; the same blocks cut finer go pair by pair."""
    call = make(q=80, k=130, q_offset=64, sinks=torch.tensor([1.0, 0.0, 2.0, -1.0]))
    size = 64 if CUDA else 32
    keep = torch.rand(H, 6, 6) < 0.5
    keep[1] = True
    keep[3] = False
    lone = Plan(block_mask=BlockMask(keep, size))
    assert triton._aligned(call, lone, triton.best_tile(there(call)))
    assert_equal(call, lone)
    fine = Plan(block_mask=BlockMask(keep.repeat_interleave(4, 1).repeat_interleave(4, 2), size // 4))
    assert_equal(call, fine)
    mixed = replace(lone, reset=plans(call)["reset"].reset, knockout=plans(call)["knockouts"].knockout)
    assert_equal(call, mixed)


def test_forward_without_a_plan() -> None:
    call = make(softcap=2.0, padded=True, left=20)
    assert_equal(call, Plan())


def test_some_heads_into_the_models_own() -> None:
    call = there(make(q=45))
    plain = forward(call)
    plan = there(plans(call)["window"])
    heads = plan.map_heads(H)
    assert not bool(heads.all())
    out, lse = triton.attend(call, plan, heads.nonzero()[:, 0], tuple(x.clone() for x in plain))
    want = triton.attend(call, plan)
    for found, edited, own in zip((out, lse), want, plain, strict=True):
        assert torch.equal(found[:, ~heads], own[:, ~heads])
        assert torch.equal(found[:, heads], edited[:, heads])


def test_extreme_values_stay_finite() -> None:
    call = make(q=45)
    call = replace(call, query=call.query * 1e3)
    everyone = torch.ones(1, 1, 45, dtype=torch.bool)
    gone = Plan(knockout=Knockout(only(1), everyone, everyone), logit_scale=torch.tensor([0.0, 1.0, 1e4, 1.0]))
    assert_equal(call, gone, tolerance=1e-3)
    nobody = Plan(reset=Reset(everyone.expand(1, H, 45), torch.full((H,), 0.1)))  # no receiver: nothing moves
    assert_equal(call, nobody, tolerance=1e-3)


def test_dispatch_says_why() -> None:
    call, plan = make(), Plan(window=torch.tensor([[1, 4]] * H))
    assert dispatch.choose(call, Plan(output_scale=torch.ones(H)))[0] == "forward"
    backend, why = dispatch.choose(there(call), plan)
    assert backend == "triton" and "fused pass" in why and "FlexAttention" in why
    rows, grid = Plan(pattern_fn=PatternEdit(only(0), lambda r: r.probs)), torch.ones(H, 12, 12, dtype=torch.bool)
    for other, edit, word in (
        (call, rows, "pattern function"),
        (replace(call, bias=torch.zeros(1, 1, 19, 45)), plan, "bias"),
        (replace(call, visible=Visibility(dense=torch.ones(1, 1, 19, 45, dtype=torch.bool))), plan, "band"),
        (replace(call, query=call.query.double()), plan, "dtype"),
        (replace(call, query=call.query.clone().requires_grad_()), plan, "gradients"),
        (call, replace(plan, block_mask=(BlockMask(grid, 4), BlockMask(grid, 8))), "sizes"),
    ):  # fmt: skip
        backend, why = dispatch.choose(there(other), there(edit))
        assert backend == "chunked" and word in why


@pytest.mark.parametrize("case", ["cache", "bidirectional", "left and right padding", "soft-cap and sinks"])
def test_flex_attention_says_the_same(case: str) -> None:
    call = make(**CALLS[case])
    every = plans(call)
    joint = replace(every["all"], reset=None)
    for plan in (every["bias per sequence"], every["knockouts"], every["blocks"], joint):
        assert flex.supports(call, plan)[0]
        assert_equal(call, plan, run=flex.attend, tolerance=1e-4 if CUDA else 2e-5)
    assert "softmax" in flex.supports(call, every["reset"])[1]


@pytest.mark.parametrize("right", [0, None])
def test_blocks_handed_to_flex_attention(right: int | None) -> None:
    """What it skips is hidden, what it does not mask is visible: 128 x 128 blocks against the rule itself."""
    call = make(q=400, k=528, right=right)
    keep = torch.rand(H, 3, 3) < 0.6
    plan = Plan(window=torch.tensor([[3, 200], [-1, -1], [0, 30], [260, 1]]), block_mask=BlockMask(keep, 256))
    s, _ = naive.logits(call, plan)
    seen = torch.nn.functional.pad((s[0] > -torch.inf).float(), (0, 112, 0, 112))
    cells = seen.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).sum((2, 4))
    grid = triton._grid(plan.block_mask, torch.arange(H), torch.device("cpu"))
    some, every = flex._whole_blocks(call, plan, grid, 256)
    assert bool(some.expand_as(cells)[cells > 0].all())
    rows = torch.tensor([128, 128, 128, 16])[:, None].expand_as(cells)  # the last row of blocks is ragged
    assert bool((cells == 128 * rows)[every.expand_as(cells)].all())
    assert bool(every.any()) and not bool(some.all())


def test_on_a_gpu_attend_takes_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused heads, row-block heads and untouched heads in one call (on a CPU the dispatch is called directly)."""
    call = there(make(q=45))
    edit = PatternEdit(only(2), lambda rows: rows.probs.flip(-1) * rows.visible)
    plan = there(Plan(window=torch.tensor([[1, 3], [-1, -1], [-1, -1], [-1, -1]]))) + there(Plan(pattern_fn=edit))
    heads, rows = plan.map_heads(H), dispatch._row_heads(plan, H)
    called = []
    monkeypatch.setattr(
        triton, "attend", lambda *a, run=triton.attend, **k: (called.append(a[2].tolist()), run(*a, **k))[1]
    )
    into = tuple(x.clone() for x in forward(call))
    out, lse = attend(call, plan) if CUDA else dispatch._on_gpu(call, plan, heads, rows, into)
    assert called == [[0]]
    want, want_lse = chunked.attend(call, plan)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=2e-5)


@needs_gpu
@pytest.mark.parametrize("d", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_head_dims_and_dtypes_on_a_gpu(d: int, dtype: torch.dtype) -> None:
    call = make(q=300, k=377, d=d, dtype=dtype, left=250)
    tolerance = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 2e-5}[dtype]
    for name in ("window", "reset to receivers in some rows", "all"):
        assert_equal(call, plans(call, 64)[name], tolerance=tolerance)


@needs_gpu
def test_more_than_two_billion_elements_on_a_gpu() -> None:
    n = 1 << 20
    x = torch.randn(1, 17, n, 128, device=DEVICE, dtype=torch.bfloat16)
    call = AttentionCall(x, x[:, :1], x[:, :1], 128**-0.5, Visibility(right=0))
    window = torch.tensor([[4, 500]] * 17)
    out, lse = triton.attend(call, Plan(window=window))
    rows = slice(n - 600, n)
    short = torch.cat([x[:, :1, :4], x[:, :1, n - 1200 :]], 2)
    near = AttentionCall(x[:, 16:, rows].cpu(), short.cpu(), short.cpu(), call.scale, Visibility(right=0, q_offset=604))
    want, want_lse = naive.attend(near, Plan(window=window[:1]))
    assert (lse[:, 16:, rows].cpu().double() - want_lse).abs().max() < 1e-4
    assert (out[:, 16:, rows].cpu().double() - want).abs().max() / want.abs().max() < 1.2e-2


@pytest.mark.parametrize("name", ["scale", "reset to receivers in some rows"])
def test_a_nan_stays_one(name: str) -> None:
    """A row whose query overflowed must not pass for a row that sees nothing."""
    call = make()
    query = call.query.clone()
    query[0, 1, 7] = float("nan")
    out, lse = triton.attend(there(replace(call, query=query)), there(plans(call)[name]))
    assert bool(out[0, 1, 7].isnan().all()) and bool(lse[0, 1, 7].isnan())
    assert int(out.isnan().any(-1).sum()) == 1
