"""Maps pooled to square blocks: exact mass, exact maximum, and the antidiagonal estimate that sparse methods use."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from ..broken import broken_rows, mark
from ..call import AttentionCall
from ..request import Request
from ..sweep import choose, sweep
from . import chunked
from .antidiagonal import antidiagonal

OUTPUTS = ("block_mass", "block_max", "antidiagonal")


@torch.no_grad()
def blocks(
    call: AttentionCall,
    edge: int = 128,
    outputs: Iterable[str] = OUTPUTS,
    lse: Float[Tensor, "B H Q"] | None = None,
    stride: int = 16,
) -> dict[str, Float[Tensor, "B H Qb Kb"]]:
    """Block maps of one call in float32: block (m, n) holds rows m edge .. and columns n edge .. of the call.

    Args:
        call: The call.
        edge: Edge of a block in tokens (the last block of a row or column may be smaller).
        outputs: ``block_mass`` Σ P, ``block_max`` max P, ``antidiagonal`` (XAttention's estimate; see there).
        lse: Natural-log normaliser, if known; otherwise one more sweep computes it.
        stride: Stride of the antidiagonal estimate; divides ``edge``.

    Raises:
        ValueError: For an edge below 1, a stride that does not divide it, or an unknown output.
    """
    wanted = frozenset(outputs)
    if edge < 1 or ("antidiagonal" in wanted and edge % stride):
        raise ValueError(f"Expected edge >= 1 and a multiple of the stride; found edge {edge}, stride {stride}.")
    if unknown := wanted - set(OUTPUTS):
        raise ValueError(f"Unknown block outputs {sorted(unknown)}; choose from {', '.join(OUTPUTS)}.")
    out: dict[str, Tensor] = {}
    exact = wanted - {"antidiagonal"}
    if exact:
        out |= _exact(call, edge, exact, lse)
    if "antidiagonal" in wanted:
        out["antidiagonal"] = antidiagonal(call, edge, stride)
    return out


def _exact(call: AttentionCall, edge: int, wanted: frozenset[str], lse: Tensor | None) -> dict[str, Tensor]:
    ask = Request(rows=frozenset({"lse"}))
    if call.query.is_cuda and choose(call, ask)[0] == "triton":
        from ..triton_util import base2_lse
        from . import triton

        if edge in triton.EDGES:
            lse = sweep(call, ask)["lse"] if lse is None else lse
            with torch.cuda.device_of(call.query):
                out = triton.block_maps(call, edge, wanted, base2_lse(call, lse))
            broken = torch.nn.functional.pad(broken_rows(call, lse), (0, -call.shape[3] % edge))
            return mark(out, (), broken.unflatten(-1, (-1, edge)).any(-1))
    return chunked.block_maps(call, edge, wanted, lse)
