"""The token sequence that a page shows: one of the run's, or a text of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import streamlit as st
import torch
from torch import Tensor

from . import state
from .live import Live
from .shelf import Entry

OWN = "own text"
_EMPTY = "The river was cold. Anna found a red key near the river. Anna kept the red key."


@dataclass(frozen=True, eq=False)
class Passage:
    """Tokens as ids and as text, with the run's per-token values where it has them, and its number in the run."""

    label: str
    ids: Tensor
    tokens: list[str]
    special: list[bool]
    frame: pd.DataFrame | None = field(default=None, repr=False)
    sequence: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def choose(entry: Entry, live: Live | None, place: Any = None) -> Passage | None:
    """The sequence that the user picks, with the list in ``place`` (here by default); None if there is none."""
    options = _options(entry) + ([OWN] if live is not None and live.scope.tokenizer is not None else [])
    if not options:
        return None
    names = _names(entry)
    with place or st.container():
        chosen = state.select("Text", "text", options, options[0], format_func=lambda o: names.get(o, o))
    return _own(live) if chosen == OWN else of_run(entry, int(chosen))


def address() -> dict[str, str | None]:
    """The choice as it stands in the address, with a text of the user's own."""
    chosen = state.recall("text", None)
    return {"text": chosen, "words": state.recall("words", None) if chosen == OWN else None}


def of_run(entry: Entry, sequence: int) -> Passage:
    """One sequence of the run."""
    rows = entry.data.tokens
    rows = rows[rows["sequence"] == sequence].sort_values("position")
    ids = torch.tensor(rows["token_id"].astype("int64").tolist())
    words = [str(t) for t in rows["token"]]
    return Passage(_names(entry)[str(sequence)], ids, words, [bool(s) for s in rows["is_special"]], rows, sequence)


def read(live: Live, text: str) -> Passage:
    """A text of the user's own."""
    tokenizer = live.scope.tokenizer
    ids = tokenizer(text)["input_ids"]
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    words = [tokenizer.decode([i]) for i in ids]
    return Passage(OWN, torch.tensor(ids, dtype=torch.long), words, [i in special for i in ids])


def _own(live: Live) -> Passage | None:
    text = state.area("Text to read", "words", _EMPTY, height=90, max_chars=200_000)
    return read(live, text) if text.strip() else None


def _options(entry: Entry) -> list[str]:
    tokens = entry.data.tokens
    return [str(s) for s in sorted(tokens["sequence"].unique())] if len(tokens) else []


def _names(entry: Entry) -> dict[str, str]:
    sources = [str(s.get("source", "")) for s in entry.data.info["sequences"]]
    counts = entry.data.tokens.groupby("sequence").size()
    names = {}
    for sequence, count in counts.items():
        i = int(sequence)
        source = sources[i] if 0 <= i < len(sources) else f"sequence {i}"
        names[str(sequence)] = f"{i + 1}. {source} ({count:,} tokens)"
    return names
