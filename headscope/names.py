"""Names of statistics: what a user may ask for, what each is exactly, and the sweep request it becomes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .errors import unknown_name
from .kernels.call import AttentionCall
from .kernels.request import ROW_NAMES, ColumnSum, KeySet, Match, Request

W = 10  # clip of clipped_distance and WAAD (arXiv:2510.13554 eq. 9)
FUTURE = (10, 100)  # window of future (FAI, arXiv:2510.13554 v2 eq. 10)
SHARED = 4  # sets of label matches kept for the layers to come

# Statistics of `scan` and of every heads.parquet, in column order.
DEFAULT = (
    "entropy",
    "distance",
    "clipped_distance",
    "mass_first",
    "mass_first4",
    "mass_recent64",
    "sum_sq",
    "top1_mass",
    "self_attention_score",
    "prev_token_score",
    "duplicate_token_score",
    "induction_score",
)
GROUPS = {"default": DEFAULT, "mass": ("mass_first", "mass_first4", "mass_recent64"), "top1": ("top1_mass", "top1_key")}

DEFINITIONS = {
    "lse": "natural log of the softmax normaliser, learned sink logits included",
    "entropy": "-sum_j P[i,j] ln P[i,j], in nats",
    "distance": "sum_j P[i,j] |i-j|, in tokens",
    "clipped_distance": f"sum_j P[i,j] min(|i-j|, {W}); clipped_distance_N clips at N",
    "mass_first": "P on the sequence's first real token; mass_firstN: on its first N",
    "mass_first4": "P on the sequence's first 4 real tokens",
    "mass_recent64": "P on keys with |i-j| < 64, the query itself included; mass_recentN: |i-j| < N",
    "sum_sq": "sum_j P[i,j]^2; its inverse is the effective number of keys",
    "top1_mass": "max_j P[i,j]",
    "top1_key": "arg max_j P[i,j], counted from the sequence's first real token (lowest on ties)",
    "distance_histogram": "P by distance in bins 0, 1, 2-3, 4-7, 8-15 ...",
    "self_attention_score": "P[i,i]",
    "prev_token_score": "P[i,i-1]; the first row has no previous token and counts as 0",
    "duplicate_token_score": "sum of P[i,j] over j < i with the same token id as i",
    "induction_score": "sum of P[i,j] over 1 <= j <= i whose preceding token has the same id as token i",
    "received": "sum over real queries i of P[i,j]",
    "received_mean": "received divided by the number of real queries that may see j",
    "future": f"mean of P[i,j] over real queries i with j+{FUTURE[0]} <= i <= j+{FUTURE[1]} (0 if there is none); "
    "future_LO_HI, HI may be `end`",
}
_PATTERNS = {
    "clipped_distance": re.compile(r"clipped_distance(?:_(\d+))?$"),
    "mass_first": re.compile(r"mass_first(\d*)$"),
    "mass_recent": re.compile(r"mass_recent(\d+)$"),
    "future": re.compile(r"future(?:_(\d+)_(\d+|end))?$"),
}
# Meaningless between two different sequences (queries of one, keys of another).
_POSITIONAL = re.compile(
    r"distance|clipped|mass_recent|self_att|prev_token|duplicate|induction|future",
)
COLUMN_NAMES = re.compile(r"received$|received_mean$|future")


@dataclass(frozen=True, eq=False)
class Wanted:
    """What one recording measures: checked names, plus key sets and targets of the caller's own.

    Attributes:
        names: Statistic names, groups expanded, without repeats.
        masses: name -> True for keys whose mass is wanted, in the columns of the padded input.
        targets: name -> key column whose probability is wanted for each row (-1: none).
    """

    names: tuple[str, ...]
    masses: dict[str, Bool[Tensor, "B N"]] = field(default_factory=dict)
    targets: dict[str, Int[Tensor, "B N"]] = field(default_factory=dict)

    @property
    def needs_ids(self) -> bool:
        """True if token ids are compared."""
        return any(n in ("duplicate_token_score", "induction_score") for n in self.names)

    def applies(self, name: str, kind: str) -> bool:
        """False for positional statistics of cross attention, whose queries and keys are different sequences."""
        return kind == "self" or not _POSITIONAL.match(name)

    def request(
        self,
        call: AttentionCall,
        kind: str,
        ids: Tensor | None,
        first: Tensor | None = None,
        known: dict[tuple, tuple] | None = None,
    ) -> Request:
        """The sweep request for one call.

        Args:
            call: The call.
            kind: ``self`` or ``cross``.
            ids: All token ids up to the last key, [B, N]; None if they are not known.
            first: Absolute position of each sequence's first real key, [B], where the call itself does not tell it.
            known: Matches that earlier calls of the same forward asked for; layers that lie alike share them.
        """
        first = call.first_key() if first is None else first
        names = [n for n in self.names if self.applies(n, kind)]
        b, _, _, q, k = call.shape
        device = call.query.device
        row = torch.arange(q, device=device) + call.visible.q_offset - call.visible.kv_offset
        diagonal = row.expand(b, q)
        targets = {}
        if "self_attention_score" in names:
            targets["self_attention_score"] = diagonal
        if "prev_token_score" in names:
            start = (first - call.visible.kv_offset)[:, None]
            targets["prev_token_score"] = torch.where(diagonal - 1 >= start.clamp(min=0), diagonal - 1, -1)
        for name, target in self.targets.items():
            targets[name] = target[:, call.visible.q_offset :][:, :q].to(device)
        return Request(
            rows=frozenset(n for n in names if n in ROW_NAMES),
            clipped={n: int(m[1] or W) for n in names if (m := _PATTERNS["clipped_distance"].match(n))},
            masses=self._key_sets(names, call, first),
            targets=targets,
            matches={} if ids is None else _shared_matches(names, ids, call, {} if known is None else known),
            columns={n: c for n in names if (c := _column(n)) is not None},
        )

    def _key_sets(self, names: list[str], call: AttentionCall, first: Tensor) -> dict[str, KeySet]:
        sets: dict[str, KeySet] = {}
        k, start = call.shape[4], call.visible.kv_offset
        for n in names:
            if m := _PATTERNS["mass_first"].match(n):
                sets[n] = KeySet(first=int(m[1] or 1))
                if start > 0:  # a sliding cache may have dropped the first keys
                    column = torch.arange(start, start + k, device=first.device)
                    sets[n] = KeySet(marked=(column >= first[:, None]) & (column < first[:, None] + int(m[1] or 1)))
            elif m := _PATTERNS["mass_recent"].match(n):
                sets[n] = KeySet(recent=int(m[1]))
        for n, marked in self.masses.items():
            sets[n] = KeySet(marked=torch.nn.functional.pad(marked, (0, max(0, k - marked.shape[1])))[:, :k])
        return sets


def expand(names: Iterable[str] | str) -> tuple[str, ...]:
    """Checked statistic names with groups (``default``, ``mass``, ``top1``) written out.

    Raises:
        UserError: For a name that is none; the message lists near matches.

    Example:
        >>> expand(["mass", "entropy"])
        ('mass_first', 'mass_first4', 'mass_recent64', 'entropy')
    """
    listed = [names] if isinstance(names, str) else list(names)
    flat: dict[str, None] = {}
    for name in listed:
        for n in GROUPS.get(name, (name,)):
            if n not in DEFINITIONS and not any(p.match(n) for p in _PATTERNS.values()):
                raise unknown_name("statistic", n, [*DEFINITIONS, *GROUPS])
            flat[n] = None
    return tuple(flat)


def _column(name: str) -> ColumnSum | None:
    if name == "received":
        return ColumnSum()
    if name == "received_mean":
        return ColumnSum(mean=True)
    if m := _PATTERNS["future"].match(name):
        lo, hi = (int(m[1]), None if m[2] == "end" else int(m[2])) if m[1] else FUTURE
        return ColumnSum(lo=lo, hi=hi, mean=True)
    return None


def _shared_matches(names: list[str], ids: Tensor, call: AttentionCall, known: dict) -> dict[str, Match]:
    """The label matches of a call: those of an earlier one with the same ids, padding and offsets, where there is."""
    keys, (_, _, _, q, k) = call.visible.keys, call.shape
    padding = None if keys is None else keys.data_ptr()
    at = (ids.data_ptr(), padding, call.visible.q_offset, call.visible.kv_offset, q, k, tuple(names))
    if at not in known:
        if len(known) >= SHARED:
            known.clear()
        found = _matches(names, ids.to(call.query.device), call)
        known[at] = (found, ids, keys)  # kept with them, so that no other tensor comes to their address
    return known[at][0]


def _matches(names: list[str], ids: Tensor, call: AttentionCall) -> dict[str, Match]:
    """Label matches of duplicate and induction; padding has label -1, as has the token before the first."""
    q0, k0 = call.visible.q_offset, call.visible.kv_offset
    b, _, _, q, k = call.shape
    keys = torch.nn.functional.pad(ids[:, k0 : k0 + k], (0, max(0, k - ids[:, k0 : k0 + k].shape[1])), value=-1)
    queries = torch.nn.functional.pad(ids[:, q0 : q0 + q], (0, max(0, q - ids[:, q0 : q0 + q].shape[1])), value=-1)
    if call.visible.keys is not None:
        keys = keys.masked_fill(~call.visible.keys, -1)
    before = torch.nn.functional.pad(keys[:, :-1], (1, 0), value=-1)
    if k0 > 0:
        before[:, 0] = ids[:, k0 - 1]
    found: dict[str, Match] = {}
    if "duplicate_token_score" in names:
        found["duplicate_token_score"] = Match(queries, keys, lag=1)
    if "induction_score" in names:
        found["induction_score"] = Match(queries, before, lag=0)
    return found
