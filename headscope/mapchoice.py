"""Which heads' maps a run is to carry, and how many bytes they take; known before anything is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from .errors import HeadscopeError, UserError
from .heads import HeadId
from .kernels.call import AttentionCall
from .runtime import Site

if TYPE_CHECKING:
    from .corpus import Sequence
    from .scope import Scope

GIB = 1 << 30
PATTERN_TOKENS = 2048  # up to this many tokens a map that no queries and keys describe is stored itself
_TOP = re.compile(r"^top(\d+):(\w+)$")
_DRY_TOKENS = 4


@dataclass(frozen=True)
class Choice:
    """Heads to store, in the order they were written: expressions, and the highest ``count`` of a column of the run."""

    parts: tuple[str | tuple[int, str], ...]

    @property
    def ranked(self) -> list[tuple[int, str]]:
        """The rankings among them."""
        return [p for p in self.parts if not isinstance(p, str)]

    @property
    def named(self) -> list[str]:
        """The expressions among them."""
        return [p for p in self.parts if isinstance(p, str)]


def read_choice(text: str) -> Choice:
    """The heads that ``--maps`` names.

    Raises:
        UserError: If a ranking cannot be read, or nothing is named.

    Example:
        >>> read_choice("L5H1,top4:induction_score").parts
        ('L5H1', (4, 'induction_score'))
    """
    found: list[str | tuple[int, str]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = _TOP.match(part)
        if match is None and part.lower().startswith("top"):
            raise UserError(f"Cannot read {part!r} as a ranking of heads. Write top8:retrieval_score.")
        found.append(part if match is None else (int(match[1]), match[2]))
    if not found:
        raise UserError("--maps names no head. Write L5H1, L5H0-3 or top8:retrieval_score.")
    return Choice(tuple(found))


def check(
    scope: Scope, sequences: list[Sequence], text: str, count: int, gib: float, columns: tuple[str, ...] = ()
) -> int:
    """The bytes that storing takes at most, before anything is measured.

    Args:
        scope: The model.
        sequences: The run's sequences.
        text: Heads as ``--maps`` names them.
        count: Of how many sequences, the first ones.
        gib: Most GiB that may be stored.
        columns: The columns that heads can be ranked by, if they are known beforehand.

    Raises:
        UserError: If a head or a column does not exist, or it takes more than that.
    """
    choice = read_choice(text)
    if count < 1 or not gib > 0:
        raise UserError(f"Maps are stored of at least 1 sequence in more than 0 GiB; found {count} and {gib} GiB.")
    if unknown := [c for _, c in choice.ranked if columns and c not in columns]:
        raise UserError(f"The run will have no column {unknown[0]!r}. It will have {', '.join(columns)}.")
    heads = scope.heads(choice.named) if choice.named else []
    need = sum(_bytes_of(scope, heads, choice.ranked, len(s.ids)) for s in sequences[:count])
    _refuse_beyond(need, gib)
    return need


def chosen(scope: Scope, choice: Choice, table: pd.DataFrame) -> tuple[list[HeadId], list[dict[str, str]]]:
    """The heads, without repeats, and the rankings that the run's table of heads has no column for, with a reason."""
    heads: dict[HeadId, None] = {}
    skipped = []
    for part in choice.parts:
        if isinstance(part, str):
            heads |= dict.fromkeys(scope.heads(part))
            continue
        count, column = part
        if column not in table or table[column].dtype.kind not in "iuf":
            skipped.append({"name": f"top{count}:{column}", "reason": f"the run has no column {column!r}"})
            continue
        best = table[table[column].notna()].nlargest(count, column)
        heads |= dict.fromkeys(HeadId(int(x), int(h)) for x, h in zip(best["layer"], best["head"], strict=True))
    return list(heads), skipped


def _refuse_beyond(need: int, gib: float) -> None:
    """Refuse maps of more than this.

    Raises:
        UserError: With the size.
    """
    if need > gib * GIB:
        raise UserError(
            f"Storing these maps takes {need / GIB:.2f} GiB, more than {gib:g} GiB. Name fewer heads, or allow more "
            "with --maps-gib."
        )


@dataclass(frozen=True)
class _Layer:
    """What storing one head of a layer takes: bytes of a query and of a sink logit, query heads per kv head."""

    query: int
    sink: int
    groups: int
    sink_per_row: bool = False

    def head(self, tokens: int) -> int:
        """Bytes of one head without its keys."""
        if not self.query:  # the map itself in four bytes, and perhaps where it may look in one
            return 5 * tokens * tokens if tokens <= PATTERN_TOKENS else 0
        return tokens * (self.query + 4) + self.sink * (tokens if self.sink_per_row else 1)


def _bytes_of(scope: Scope, heads: list[HeadId], ranked: list[tuple[int, str]], tokens: int) -> int:
    """Bytes for these heads, and at most for the ranked ones, on a sequence; from the calls of a dry run."""
    layers = _dry_run(scope)
    known = [h for h in heads if h.layer in layers]
    kv_heads = {(h.layer, h.head // layers[h.layer].groups) for h in known}
    need = sum(layers[h.layer].head(tokens) for h in known) + sum(tokens * layers[x].query for x, _ in kv_heads)
    most = max((x.head(tokens) + tokens * x.query for x in layers.values()), default=0)
    return need + most * sum(min(count, sum(x.heads for x in scope.layers)) for count, _ in ranked)


def _dry_run(scope: Scope) -> dict[int, _Layer]:
    """What each layer's calls look like, on a few made-up tokens."""
    found: dict[int, _Layer] = {}

    class Watch:
        def begin(self, ids: Tensor | None) -> None: ...

        def record(self, call: AttentionCall, lse: Tensor | None, site: Site) -> None:
            width = 0 if needs_map(call) else call.query.shape[-1] * call.query.element_size()
            sinks = call.sinks
            size = 0 if sinks is None else sinks.element_size()
            found[call.layer] = _Layer(width, size, call.groups, sinks is not None and sinks.dim() > 1)

    try:
        batch = scope.dry_inputs(_DRY_TOKENS)
    except HeadscopeError:
        return found  # a model without made-up inputs: what is stored is counted while it is taken
    watch = Watch()
    with torch.no_grad(), scope.attached() as runtime:
        runtime.recorders.append(watch)
        try:
            scope.model(**batch)
        finally:
            runtime.recorders.remove(watch)
    return found


def needs_map(call: AttentionCall) -> bool:
    """True if queries, keys and a band do not say everything about a call, so that the map itself must be stored."""
    rule = call.visible
    return call.pattern is not None or call.bias is not None or rule.rule is not None or rule.dense is not None
