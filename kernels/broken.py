"""Rows that see nothing, and rows whose model overflowed: the first hold 0, the second must not look like numbers."""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .call import AttentionCall


def blind_rows(call: AttentionCall) -> Bool[Tensor, "b h Q"]:
    """Rows that see no key, by positions and key padding (a rule or an explicit map is not looked at)."""
    v = call.visible
    _, _, _, q, k = call.shape
    i = torch.arange(q, device=call.query.device) + v.q_offset - v.kv_offset
    first = torch.zeros_like(i) if v.left is None else (i - v.left).clamp(min=0)
    last = torch.full_like(i, k - 1) if v.right is None else (i + v.right).clamp(max=k - 1)
    if v.keys is None:
        return (last < first)[None, None]
    upto = torch.nn.functional.pad(v.keys.long().cumsum(-1), (1, 0))
    seen = upto[:, (last + 1).clamp(0, k)] - upto[:, first.clamp(0, k)]
    return ((seen <= 0) | (last < first))[:, None]


def broken_rows(call: AttentionCall, lse: Float[Tensor, "B H Q"]) -> Bool[Tensor, "B H Q"]:
    """Real rows that see a key and yet have no finite normaliser: there is a NaN or an infinity in q or k."""
    broken = ~lse.isfinite()
    if call.real is not None:
        broken &= call.real[:, None]
    return broken & ~blind_rows(call)


def mark(out: dict[str, Tensor], columns: Collection[str], broken: Bool[Tensor, "B H Q"]) -> dict[str, Tensor]:
    """NaN in broken rows (or blocks of rows), in place; in column sums for the whole head, since they add up its rows.

    Numbers of columns (``top1_key``) stay: there is no NaN among integers.
    """
    heads = broken.any(-1, keepdim=True)
    for name, values in out.items():
        if values.is_floating_point():
            rows = heads if name in columns else broken
            values.masked_fill_(rows if values.dim() == 3 else rows[..., None], torch.nan)  # [B, H, Q] or more axes
    return out
