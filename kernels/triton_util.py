"""What all Triton kernels here share: the logit formula, visibility of a tile, head-dim splitting and launch facts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from .call import AttentionCall

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Finite stand-ins: exp2(HIDDEN) is 0 and 0 * HIDDEN is 0, where -inf would give NaN. A row with lse DEAD has P = 0.
HIDDEN = -1e30
DEAD = 1e30
# Decided when the kernels are decorated, on import. bf16 is wrong in the interpreter: tiles are upcast there.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Tile:
    """One launch configuration: tile edges, warps, software-pipelining depth and a register cap (None: no cap)."""

    rows: int
    cols: int
    warps: int = 4
    stages: int = 2
    registers: int | None = None

    def options(self) -> dict:
        """Keyword arguments of a launch."""
        # Said because Triton 3.10 turns fused multiply-adds off by default; the kernels count on them for speed.
        found = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return found if self.registers is None or INTERPRET else found | {"maxnreg": self.registers}


def split_width(d: int) -> tuple[int, int]:
    """Head dim as (power of two, rest rounded up to a power of two of at least 16): 80 = 64 + 16, 128 = 128 + 0."""
    first = max(16, 1 << (d.bit_length() - 1))
    rest = d - first
    return (first, 0) if rest <= 0 else (first, max(16, triton.next_power_of_2(rest)))


def base2_lse(call: AttentionCall, lse: Float[Tensor, "B H Q"]) -> Float[Tensor, "B H Q"]:
    """lse in base 2 with DEAD for rows that are not real or see nothing."""
    alive = lse.isfinite() & call.real_rows()[:, None, :]
    return torch.where(alive, lse.float() * LOG2E, DEAD).contiguous()


def logit_constants(call: AttentionCall) -> tuple[float, float]:
    """Factor on q k^T before the cap (or the whole factor) and the cap itself, both in base 2."""
    if call.softcap is None:
        return call.scale * LOG2E, 0.0
    return 2.0 * LOG2E * call.scale / call.softcap, call.softcap * LOG2E


def band(call: AttentionCall) -> tuple[int, int, int, bool, bool]:
    """(shift, left, right, has_left, has_right): row r sees column c iff r + shift - left <= c <= r + shift + right."""
    v = call.visible
    return (
        v.q_offset - v.kv_offset,
        v.left if v.left is not None else 0,
        v.right if v.right is not None else 0,
        v.left is not None,
        v.right is not None,
    )


def key_spans(call: AttentionCall) -> tuple[Int8[Tensor, "B K"], Int32[Tensor, "B 3"]]:
    """Real-key flags, and per sequence the columns (first real key, end of real keys, where "first keys" start)."""
    b, _, _, _, k = call.shape
    device, keys = call.query.device, call.visible.keys
    if keys is None:
        keys = torch.ones(b, k, dtype=torch.bool, device=device)
    column = torch.arange(k, device=device)
    first, end = torch.where(keys, column, k).amin(-1), torch.where(keys, column + 1, 0).amax(-1)
    start = call.first_key() - call.visible.kv_offset
    spans = torch.stack([torch.where(end > 0, first, 0), end, start], -1)
    return keys.to(torch.int8).contiguous(), spans.to(torch.int32).contiguous()


@triton.jit
def scores(
    q1, q2, k1, k2, qs, cap, CAP: tl.constexpr, D2: tl.constexpr, IEEE: tl.constexpr, UPCAST: tl.constexpr
) -> tl.tensor:
    """Base-2 logits of one tile, before masking. Without a cap the factor qs is left to the caller."""
    if UPCAST:
        q1 = q1.to(tl.float32)
        k1 = k1.to(tl.float32)
        q2 = q2.to(tl.float32)
        k2 = k2.to(tl.float32)
    if IEEE:
        s = tl.dot(q1, k1, input_precision="ieee")
        if D2 > 0:
            s = tl.dot(q2, k2, s, input_precision="ieee")
    else:
        s = tl.dot(q1, k1)
        if D2 > 0:
            s = tl.dot(q2, k2, s)
    if CAP:
        e = tl.exp2(s * qs)
        s = cap * (1.0 - 2.0 / (e + 1.0))
    return s


@triton.jit
def visible_tile(rows, cols, shift, left, right, K, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr) -> tl.tensor:
    """True where the band lets row see column; columns beyond K are hidden."""
    at = (rows + shift)[:, None]
    seen = (cols < K)[None, :] & (at > -2147483647)
    if HAS_LEFT:
        seen = seen & (cols[None, :] >= at - left)
    if HAS_RIGHT:
        seen = seen & (cols[None, :] <= at + right)
    return seen


@triton.jit
def floor_to(x, B: tl.constexpr) -> tl.tensor:
    """Largest multiple of B that is <= max(x, 0)."""
    return tl.maximum(x, 0) // B * B


@triton.jit
def ceil_to(x, B: tl.constexpr) -> tl.tensor:
    """Smallest multiple of B that is >= max(x, 0)."""
    return (tl.maximum(x, 0) + B - 1) // B * B
