"""Every statistic of a call on a GPU: which kernels to launch for a request, and what they cannot do."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..broken import blind_rows, broken_rows, mark
from ..call import AttentionCall
from ..request import ColumnSum, KeySet, Request
from ..triton_util import INTERPRET, base2_lse
from .bins import bin_edges
from .triton_columns import FUSED, columns
from .triton_matches import match_mass
from .triton_rows import Sums, narrow_tile, rows
from .triton_rows_kernel import CLIPPED, FIRST, MARKED, RECENT
from .triton_targets import target_mass

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256


def supports(call: AttentionCall, request: Request) -> tuple[bool, str]:
    """Whether the kernels can do this call, and the reason if not."""
    if not (call.query.is_cuda or INTERPRET):
        return False, "no CUDA device: plain torch row blocks instead"
    if call.pattern is not None:
        return False, "the layer hands over its map, not q and k: row blocks instead"
    if call.bias is not None:
        return False, "additive bias: row blocks instead"
    if call.visible.rule is not None or call.visible.dense is not None:
        return False, "a mask that is no band of positions: row blocks instead"
    if call.query.dtype not in DTYPES or call.key.dtype != call.query.dtype:
        return False, f"dtype {call.query.dtype}: row blocks instead"
    if not 0 < call.query.shape[-1] <= WIDEST:
        return False, f"head dim {call.query.shape[-1]} is above {WIDEST}: row blocks instead"
    return True, "triton"


@torch.no_grad()
def run(call: AttentionCall, request: Request, lse: Float[Tensor, "B H Q"] | None = None) -> dict[str, Tensor]:
    """Every tensor that ``request`` asks for, float32; see ``headscope.kernels.sweep``.

    One sweep where lse is given and only sums are asked for besides columns, or no columns are; two otherwise.
    """
    with torch.cuda.device_of(call.query):  # Triton launches on the current device; a no-op on the CPU
        return _run(call, request, lse)


def _run(call: AttentionCall, request: Request, lse: Tensor | None) -> dict[str, Tensor]:
    sums = _sums(call, request)
    names = set(request.rows)
    windows = _windows(request.columns)
    lse2 = None if lse is None else base2_lse(call, lse)
    out: dict[str, Tensor] = {}

    fused: frozenset[str] = frozenset()
    if lse2 is not None and (None, None) in windows and not names - set(FUSED) - {"lse"} and sums.are_local:
        fused = frozenset(names & set(FUSED))
    left = names - fused - ({"lse"} if lse2 is not None else set())
    needs_lse = lse2 is None and (windows or request.targets or request.matches)
    if left or sums.names or needs_lse:
        found = rows(call, frozenset(left), sums, lse2, bins=_bins(call))
        if lse2 is None:
            lse = torch.where(blind_rows(call), -torch.inf, found["lse"])
            lse2 = base2_lse(call, lse) if needs_lse else None
        out |= {n: found[n] for n in (*left, *sums.names)}
    if "lse" in names and "lse" not in out:
        out["lse"] = torch.where(lse2 < 1e29, lse.float(), 0.0)
    for name, index in request.targets.items():
        out[name] = target_mass(call, lse2, index)
    for name, match in request.matches.items():
        out[name] = match_mass(call, lse2, match)
    for (lo, hi), group in windows.items():
        cut = _narrow(call, lo, hi)
        extra = fused if (lo, hi) == (None, None) else frozenset()
        out |= _group(cut, lse2, group, extra)
    for name, column in request.columns.items():
        if column.mean:
            out[name] = out[name] / _counts(call, column)[:, None].clamp(min=1)
    return mark(out, request.columns, broken_rows(call, lse))


@torch.no_grad()
def run_tiles(
    call: AttentionCall, request: Request, runs: list[int], height: int, lse: Float[Tensor, "B H Q"] | None = None
) -> dict[str, Tensor]:
    """Row statistics of runs of ``height`` rows only (their numbers in ``runs``); every other row holds 0."""
    with torch.cuda.device_of(call.query):
        return _run_tiles(call, request, runs, height, lse)


def _run_tiles(
    call: AttentionCall, request: Request, runs: list[int], height: int, lse: Tensor | None
) -> dict[str, Tensor]:
    sums = _sums(call, request)
    lse2 = None if lse is None else base2_lse(call, lse)
    tiles = torch.tensor(runs, dtype=torch.int32, device=call.query.device)
    tile = replace(narrow_tile(call), rows=height)
    names = frozenset(request.rows)
    found = rows(call, names, sums, lse2, tile=tile, tiles=tiles)
    out = {n: found[n] for n in (*names, *sums.names)}
    q = call.shape[3]
    inside = torch.zeros(-(-q // height), dtype=torch.bool, device=tiles.device)
    inside[tiles.long()] = True
    inside = inside.repeat_interleave(height)[:q]
    lse = torch.where(blind_rows(call), -torch.inf, found["lse"]) if lse is None else lse
    if request.targets or request.matches:
        lse2 = base2_lse(call, torch.where(inside, lse, -torch.inf))
        out |= {n: target_mass(call, lse2, index) for n, index in request.targets.items()}
        for name, match in request.matches.items():
            out[name] = match_mass(call, lse2, replace(match, query_labels=match.query_labels.where(inside, -1)))
    return mark(out, (), broken_rows(call, lse) & inside)


def _bins(call: AttentionCall) -> int:
    v = call.visible
    _, _, _, q, k = call.shape
    shift = v.q_offset - v.kv_offset
    return len(bin_edges(q, k, shift))


def _sums(call: AttentionCall, request: Request) -> Sums:
    """The request's weighted row sums in the kernel's terms."""
    entries: list[tuple[str, int, int]] = [(n, CLIPPED, w) for n, w in request.clipped.items()]
    marks: list[Tensor] = []
    for name, keys in request.masses.items():
        entries.append((name, *_key_set(keys, len(marks))))
        if keys.marked is not None:
            marks.append(keys.marked)
    return Sums(
        names=tuple(e[0] for e in entries),
        kinds=tuple(e[1] for e in entries),
        params=tuple(e[2] for e in entries),
        marks=torch.stack(marks).to(call.query.device, torch.int8).contiguous() if marks else None,
    )


def _key_set(keys: KeySet, row: int) -> tuple[int, int]:
    if keys.first is not None:
        return FIRST, keys.first
    if keys.recent is not None:
        return RECENT, keys.recent
    return MARKED, row


def _windows(columns: dict[str, ColumnSum]) -> dict[tuple[int | None, int | None], dict[str, ColumnSum]]:
    """Columns by window: a windowed column sum is a plain one of a narrower band."""
    groups: dict[tuple[int | None, int | None], dict[str, ColumnSum]] = defaultdict(dict)
    for name, column in columns.items():
        groups[column.lo, column.hi][name] = column
    return groups


def _narrow(call: AttentionCall, lo: int | None, hi: int | None) -> AttentionCall:
    """The call with i - hi <= j <= i - lo as a further condition."""
    v = call.visible
    left = v.left if hi is None else hi if v.left is None else min(v.left, hi)
    right = v.right if lo is None else -lo if v.right is None else min(v.right, -lo)
    return replace(call, visible=replace(v, left=left, right=right))


def _group(call: AttentionCall, lse2: Tensor, group: dict[str, ColumnSum], fused: frozenset[str]) -> dict[str, Tensor]:
    """All column sums of one window: a sweep for each weight, the first of which does the plain sum too."""
    plain = [n for n, c in group.items() if c.weights is None]
    weighted = [n for n, c in group.items() if c.weights is not None]
    out: dict[str, Tensor] = {}
    for turn in range(max(1, len(weighted))):
        name = weighted[turn] if weighted else None
        weights = group[name].weights if name else None
        found = columns(call, lse2, bool(plain) and turn == 0, weights, fused if turn == 0 else frozenset())
        if name:
            out[name] = found["weighted"]
        if turn == 0:
            out |= dict.fromkeys(plain, found["plain"]) | {n: found[n] for n in fused}
    return out


def _counts(call: AttentionCall, column: ColumnSum) -> Tensor:
    """Real queries behind each column: those in the window, or without a window those that may see it, [B, K]."""
    v, lo, hi = call.visible, column.lo, column.hi
    if lo is None and hi is None:
        lo, hi = None if v.right is None else -v.right, v.left
    _, _, _, q, k = call.shape
    upto = torch.nn.functional.pad(call.real_rows().long().cumsum(-1), (1, 0))
    j = torch.arange(k, device=upto.device) + v.kv_offset - v.q_offset
    first = torch.zeros_like(j) if lo is None else (j + lo).clamp(0, q)
    end = torch.full_like(j, q) if hi is None else (j + hi + 1).clamp(0, q)
    return (upto[:, end] - upto[:, first]).clamp(min=0)
