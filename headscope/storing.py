"""Storing heads: one more forward, which hands over the queries and keys of the chosen heads and ends behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from . import mapchoice
from .heads import HeadId
from .inputs import prepare
from .kernels.attend import EditedMap
from .kernels.call import AttentionCall
from .kernels.parts import one_head
from .kernels.request import Request
from .kernels.sweep import sweep
from .kernels.tile import tile
from .mapchoice import chosen, needs_map, read_choice
from .runtime import Site
from .storedmaps import StoredHead, StoredMaps

if TYPE_CHECKING:
    from .corpus import Sequence
    from .scope import Scope


def store(
    scope: Scope,
    sequences: list[Sequence],
    text: str,
    count: int,
    gib: float,
    table: pd.DataFrame,
    tell: Callable[[int, int, str], None],
) -> tuple[StoredMaps, dict[str, Any]]:
    """The chosen heads on the first sequences, by one more forward of each, with what active interventions change.

    A forward ends at the last layer that is wanted. What cannot be stored exactly, or has no room, is left out and
    named.

    Args:
        scope: The model.
        sequences: The run's sequences.
        text: Heads as ``--maps`` names them.
        count: Of how many sequences.
        gib: Most GiB that may be stored.
        table: The run's table of heads, for rankings.
        tell: Told about progress.

    Returns:
        The maps, and for ``run.json`` the heads, sequences, bytes, and ``skipped`` with a reason each.
    """
    heads, skipped = chosen(scope, read_choice(text), table)
    entries: list[StoredHead] = []
    tensors: dict[str, Tensor] = {}
    for number, sequence in enumerate(sequences[:count]):
        taker = _Taker(heads, number, len(sequence.ids), gib, tensors, tell)
        _forward(scope, sequence.ids, taker)
        by_head = {e.id: e for e in taker.entries}
        entries += [by_head[h] for h in heads if h in by_head]
        skipped += [{"name": f"{h} on sequence {number}", "reason": why} for h, why in taker.refusals(scope)]
    maps = StoredMaps(entries, tensors)
    told = {"heads": maps.heads, "sequences": maps.sequences, "bytes": _size(tensors), "skipped": skipped}
    return maps, told


class _Enough(Exception):
    """Every layer that was wanted has been seen; the rest of the forward is not needed."""


class _Taker:
    """A recorder that keeps the chosen heads of each layer and lets go of the rest."""

    def __init__(
        self, heads: list[HeadId], sequence: int, tokens: int, gib: float, tensors: dict[str, Tensor], tell: Any
    ) -> None:
        self.entries: list[StoredHead] = []
        self._heads, self._sequence, self._tokens, self._gib = heads, sequence, tokens, gib
        self._tensors, self._tell = tensors, tell
        self._refused: dict[HeadId, str] = {}
        self._open = {h.layer for h in heads}

    def begin(self, ids: Tensor | None) -> None:
        """A forward starts."""

    def record(self, call: AttentionCall, lse: Tensor | None, site: Site) -> None:
        """Keep what is wanted of one call; ends the forward behind the last one."""
        last = max((h.layer for h in self._heads), default=0) + 1
        self._tell(min(max(call.layer, 0), last), last, f"maps of sequence {self._sequence}")
        for head in (h for h in self._heads if h.layer == call.layer):
            why = _obstacle(call, self._tokens)
            if why:
                self._refused[head] = why
                continue
            entry, parts = _taken(call, lse, head, self._sequence)
            # The keys of a kv head are there already if another of its heads was stored.
            made = {n: make() for n, make in parts.items() if n not in self._tensors}
            if _size(self._tensors) + _size(made) > self._gib * mapchoice.GIB:
                self._refused[head] = f"there is no room for it within {self._gib:g} GiB (--maps-gib)"
                continue
            self.entries.append(entry)
            self._tensors |= made
        self._open.discard(call.layer)
        if not self._open:
            raise _Enough

    def refusals(self, scope: Scope) -> Iterable[tuple[HeadId, str]]:
        """Heads that were left out, and why."""
        for head in self._heads:
            if head in self._refused:
                yield head, self._refused[head]
            elif head.layer in self._open:
                yield head, f"this text does not reach {scope.layers[head.layer].name}"


def _forward(scope: Scope, ids: Tensor, taker: _Taker) -> None:
    """The model on one sequence, as far as it is needed."""
    if not taker._open:
        return
    batch = prepare({"input_ids": ids[None]}, scope)
    if hasattr(scope.model.config, "use_cache"):
        batch["use_cache"] = False
    with torch.no_grad(), scope.attached() as runtime:
        runtime.recorders.append(taker)
        try:
            scope.model(**batch)
        except _Enough:
            pass
        finally:
            runtime.recorders.remove(taker)


def _obstacle(call: AttentionCall, tokens: int) -> str:
    """Why a call cannot be stored exactly; empty if it can."""
    b, _, _, q, k = call.shape
    if (b, q, k) != (1, tokens, tokens):
        return f"its map has {q:,} rows and {k:,} columns, not one of each per token of the text"
    most = mapchoice.PATTERN_TOKENS
    if tokens <= most or not needs_map(call):
        return ""
    if isinstance(call.pattern, EditedMap):
        reason = "its map is edited while it is measured"
    elif call.pattern is not None:
        reason = "its layer shows its map, not queries and keys"
    elif call.bias is not None:
        reason = "its layer adds a bias to the logits, such as ALiBi"
    else:
        reason = "its mask is no band of keys"
    return f"{reason}, and such maps are stored up to {most:,} tokens (found {tokens:,})"


def _taken(
    call: AttentionCall, lse: Tensor | None, head: HeadId, sequence: int
) -> tuple[StoredHead, dict[str, Callable[[], Tensor]]]:
    """One head of a call: its description, and each of its tensors as something that makes a copy on the CPU."""
    one, rule = one_head(call, 0, head.head), call.visible
    # Fused kernels of half precision give a normaliser that is a little off.
    exact = lse is not None and call.query.dtype == torch.float32
    as_map = needs_map(call)
    entry = StoredHead(
        sequence=sequence,
        layer=head.layer,
        head=head.head,
        kv=head.head // call.groups,
        tokens=call.shape[3],
        form="pattern" if as_map else "qk",
        scale=float(call.scale),
        softcap=None if call.softcap is None else float(call.softcap),
        left=_within(rule.left, call),
        right=_within(rule.right, call),
        q_offset=rule.q_offset,
        kv_offset=rule.kv_offset,
        name=call.name,
    )
    n = range(entry.tokens)
    parts: dict[str, Callable[[], Tensor]] = {}
    if rule.keys is not None:
        parts["keys"] = lambda: _kept(rule.keys[0].bool())
    if as_map:
        parts["pattern"] = lambda: _kept(tile(one, None, 0, 0, n, n).float())
        if rule.rule is not None or rule.dense is not None:
            at = torch.zeros(1, dtype=torch.long, device=call.query.device)
            parts["seen"] = lambda: _kept(one.visible.block(at, n, n, at)[0, 0].expand(len(n), len(n)))
    else:
        parts |= {"query": lambda: _kept(one.query[0, 0]), "key": lambda: _kept(one.key[0, 0])}
        parts["lse"] = lambda: _kept((lse[0, head.head] if exact else _normaliser(one)[0, 0]).float())
        if one.sinks is not None:
            parts["sinks"] = lambda: _kept(one.sinks.flatten())
    return entry, {entry.tensor(name): make for name, make in parts.items()}


def _within(reach: int | None, call: AttentionCall) -> int | None:
    """How far a mask reaches; None if that is beyond every key."""
    rule, (_, _, _, q, k) = call.visible, call.shape
    return None if reach is None or reach >= max(rule.q_offset + q, rule.kv_offset + k) else reach


def _normaliser(one: AttentionCall) -> Tensor:
    return sweep(one, Request(rows=frozenset({"lse"})))["lse"]


def _kept(x: Tensor) -> Tensor:
    """A copy of its own on the CPU, so that the layer's memory is free again."""
    return x.detach().to("cpu", copy=True).contiguous()


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())
