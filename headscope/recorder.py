"""Recorders: they turn attention calls into Stats, one forward pass after another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from .kernels.call import AttentionCall
from .kernels.sweep import sweep
from .names import COLUMN_NAMES, Wanted
from .runtime import Site
from .sampling import estimate, split
from .shards import WHOLE
from .stats import LayerInfo, Stats


@dataclass(eq=False)
class LayerRecord:
    """Statistics of one layer in one forward, on the CPU, and which queries and keys are real.

    Attributes:
        values: Columns [B, H, K], and rows [B, H, Q] of the names that are kept.
        sums: Sums over real rows of every row statistic, [B, H] float64.
        errors: Standard errors of those sums that are estimated from a sample of the rows.
    """

    info: LayerInfo
    values: dict[str, Tensor]
    sums: dict[str, Tensor]
    real: Tensor  # [B, Q]
    keys: Tensor  # [B, K]
    first_key: Tensor  # [B] column of the first real key
    errors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class StatRecorder:
    """Measures what is wanted in every call, and keeps it per forward.

    Attributes:
        wanted: What to measure.
        tiers: Module name -> how its attention is captured.
        forwards: One dict per forward pass of the model: layer -> record.
        ids: Token ids up to the last token of the current forward, those of the cache included.
        encoder_ids: Ids of the encoder's input, for encoder-decoder models.
        keep: Names whose rows are kept, not only summed; True keeps all.
        sample: Fraction of the rows that averages are estimated from; None: all of them, exactly.
    """

    wanted: Wanted
    tiers: dict[str, int] = field(default_factory=dict)
    forwards: list[dict[int, LayerRecord]] = field(default_factory=list)
    ids: Tensor | None = None
    encoder_ids: Tensor | None = None
    keep: bool | Iterable[str] = True
    sample: Fraction | None = None
    _order: Tensor | None = field(default=None, repr=False)
    _matches: dict[tuple, tuple] = field(default_factory=dict, repr=False)  # of this forward, for layers that lie alike
    gathers: ClassVar[bool] = True  # numbers are brought together, not queries and keys

    def begin(self, ids: Tensor | None) -> None:
        """A forward starts. Ids of a continuation are appended when its first call tells where it stands."""
        self.forwards.append({})
        self._new, self._placed, self._all_known = ids, False, None
        self._matches.clear()

    def record(self, call: AttentionCall, lse: Tensor | None, site: Site) -> None:
        """Sweep one call and keep the result."""
        if not self.forwards:
            self.begin(None)
        if not self._placed and site.kind == "self" and not site.encoder and not site.modality:
            self._place(call)
        ids = self._ids_for(call, site)
        first = site.runtime.first_key(call) if site.kind == "self" else call.first_key()
        request = self.wanted.request(call, site.kind, ids, first, self._matches)
        known = lse if call.pattern is None else None
        sums, errors = {}, {}
        if self.sample is not None:
            drawn, request = split(request, call, self._kept)
            sums, errors = estimate(call, drawn, self.sample, known)
        values = sweep(call, request, known)
        if "lse" in values and call.pattern is not None and lse is not None:
            values["lse"] = lse.masked_fill(~call.real_rows()[:, None], 0.0)  # a finished map does not tell it
        b, h, hk, q, k = call.shape
        shard = site.runtime.shards.get(site.name, WHOLE)
        if shard.size > 1:  # in the same order in every process
            values, sums, errors = ({n: shard.gather(x[n]) for n in sorted(x)} for x in (values, sums, errors))
        n = shard.size
        info = LayerInfo(site.name, site.kind, h * n, hk * n, self.tiers.get(site.name, 1), call.number)
        layer = call.layer if call.layer >= 0 else len(self.forwards[-1])
        first = first - call.visible.kv_offset
        if "top1_key" in values:
            values["top1_key"] = values["top1_key"] - first[:, None, None]
        self.forwards[-1][layer] = LayerRecord(
            info,
            {n: fetch(v) for n, v in values.items() if COLUMN_NAMES.match(n) or self._kept(n)},
            _row_sums(values) | {n: fetch(x) for n, x in sums.items()},
            torch.ones(b, q, dtype=torch.bool) if call.real is None else call.real.cpu(),
            _real_keys(call),
            fetch(first),
            {n: fetch(x) for n, x in errors.items()},
        )

    def reorder(self, index: Tensor) -> None:
        """Beam search goes on from other sequences: the next forward's ids stand behind theirs. ``index`` is [B].

        What the last forward measured keeps its order, and so do the ids that go with it.
        """
        self._order = index if self._order is None else self._order[index.to(self._order.device)]

    def _kept(self, name: str) -> bool:
        return self.keep if isinstance(self.keep, bool) else name in self.keep

    def _place(self, call: AttentionCall) -> None:
        """Put this forward's ids behind those of the tokens already in the cache."""
        self._placed = True
        if self._new is None:
            self.ids = None
            return
        start = call.visible.q_offset
        if self.ids is not None and self._order is not None:
            self.ids = self.ids[self._order.to(self.ids.device)]
        self._order = None
        past = self.ids[:, :start] if self.ids is not None and start else self._new[:, :0]
        missing = start - past.shape[1]
        if missing > 0:
            past = torch.nn.functional.pad(past, (0, missing), value=-1)
        self.ids = torch.cat([past.to(self._new.device), self._new], 1) if start else self._new

    def _ids_for(self, call: AttentionCall, site: Site) -> Tensor | None:
        if not self.wanted.needs_ids or site.kind == "cross" or site.modality or self._new is None:
            return None
        if site.encoder:
            return self.encoder_ids
        # Tokens that came into the cache before the recording are not known, so nothing can be said about repeats.
        if self._all_known is None:  # asked once per forward: a GPU would be waited for in every layer
            self._all_known = self.ids is not None and not bool((self.ids < 0).any())
        return self.ids if self._all_known else None

    def stats(self, forward: int = -1) -> Stats:
        """Everything one forward measured, one sequence per batch entry."""
        records = [r for _, r in sorted(self.forwards[forward].items())]
        return collect(records, self.wanted, self.ids, self.keep)


def fetch(value: Tensor) -> Tensor:
    """A copy on the CPU. From a GPU it may still be under way, so that the model does not wait: see ``settle``.

    Any shape: [*].
    """
    if not value.is_cuda:
        return value.cpu()
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def settle() -> None:
    """Wait until every copy that ``fetch`` began has arrived."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def collect(records: list[LayerRecord], wanted: Wanted, ids: Tensor | None, keep: bool | Iterable[str] = True) -> Stats:
    """Stats of one forward from its layer records; NaN where a layer has no such head or could not be measured."""
    settle()
    if not records:
        return Stats([])
    b = records[0].real.shape[0]
    width = max(r.info.heads for r in records)
    counts = torch.stack([r.real.sum(-1).double() for r in records], 1)  # [B, L]
    names = [*wanted.names, *wanted.masses, *wanted.targets]
    stats = Stats([r.info for r in records], counts=counts)
    for name in names:
        if COLUMN_NAMES.match(name):
            stats.columns[name] = [_stack([_column(r, name, i) for r in records], width) for i in range(b)]
            continue
        if name != "distance_histogram":
            stats.sums[name] = torch.stack([_widened(r.sums.get(name), b, width) for r in records], 1)
            if any(name in r.errors for r in records):
                stats.errors[name] = torch.stack([_widened(r.errors.get(name), b, width) for r in records], 1)
        if keep is True or (keep and name in keep):
            stats.rows[name] = [_stack([_rows(r, name, i) for r in records], width) for i in range(b)]
    decoder = next((r for r in records if ".encoder." not in f".{r.info.name}."), records[0])
    if ids is not None and ids.shape[1] >= decoder.real.shape[1]:
        last = ids[:, -decoder.real.shape[1] :].cpu()
        stats.tokens = [last[i][decoder.real[i]] for i in range(b)]
    return stats


def _real_keys(call: AttentionCall) -> Tensor:
    """Keys that hold a token, [B, K]: neither padding nor the room that a static cache keeps for tokens to come."""
    b, _, _, q, k = call.shape
    keys = torch.ones(b, k, dtype=torch.bool) if call.visible.keys is None else call.visible.keys.cpu()
    if call.visible.right == 0:
        end = call.visible.q_offset + q - call.visible.kv_offset
        keys = keys & (torch.arange(k) < end)
    return keys


def _row_sums(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over rows, added up in float64 where the values are and brought to the CPU in one piece."""
    rows = {n: v for n, v in values.items() if v.dim() == 3 and not COLUMN_NAMES.match(n)}
    if not rows:
        return {}
    together = fetch(torch.stack([v.sum(-1, dtype=torch.float64) for v in rows.values()]))
    return dict(zip(rows, together, strict=True))


def _widened(sums: Tensor | None, b: int, width: int) -> Tensor:
    """[B, width] with NaN where the layer has no such head or the name does not apply."""
    out = torch.full((b, width), float("nan"), dtype=torch.float64)
    if sums is not None:
        out[:, : sums.shape[1]] = sums
    return out


def _rows(record: LayerRecord, name: str, i: int) -> Tensor:
    value = record.values.get(name)
    if value is None:
        return torch.full((record.info.heads, int(record.real[i].sum())), float("nan"))
    return value[i][:, record.real[i]]


def _column(record: LayerRecord, name: str, i: int) -> Tensor:
    value = record.values.get(name)
    if value is None:
        return torch.full((record.info.heads, int(record.keys[i].sum())), float("nan"))
    return value[i][:, record.keys[i]]


def _stack(parts: list[Tensor], width: int) -> Tensor:
    """[L, width, N, ...] with NaN where a layer has fewer heads or fewer tokens."""
    longest = max(p.shape[1] for p in parts)
    tail = parts[0].shape[2:]
    if all(p.shape == (width, longest, *tail) for p in parts):
        return torch.stack(parts)
    out = torch.full((len(parts), width, longest, *tail), float("nan"))
    for layer, part in enumerate(parts):
        out[layer, : part.shape[0], : part.shape[1]] = part
    return out
