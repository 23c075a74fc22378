"""What a run holds: the tables, their columns, and the check that they fit together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

from .display import Shown
from .errors import ResultFormatError
from .names import DEFAULT
from .storedmaps import StoredMaps

SCHEMA_VERSION = 1
HEAD_KEYS = ("layer", "head", "head_id", "n_sequences", "n_tokens")
HEAD_COLUMNS = (*DEFAULT, "sink_rate", "local_global")
TOKEN_KEYS = ("sequence", "position", "token_id", "token", "is_special")
TOKEN_COLUMNS = ("received_mean", "waad", "fai", "entropy_next", "label")
LABELS = ("preplan", "anchor", "both", "none")
_KINDS = dict.fromkeys(("columns", "model", "versions", "timings", "maps"), dict)
_KINDS |= dict.fromkeys(("findings", "sequences", "refused", "interventions"), list)


@dataclass(eq=False)
class RunData(Shown):
    """One measurement.

    Attributes:
        info: What ``run.json`` holds: command, config, versions, model, dtype, seed, timings, ``columns`` (the
            definition of each column) and ``findings``.
        heads: One row per layer and head: ``HEAD_KEYS``, then ``<name>`` and ``<name>_se`` of each statistic or score.
        tokens: One row per sequence and position: ``TOKEN_KEYS`` and ``TOKEN_COLUMNS``; may have no rows.
        arrays: Named tensors that fit no table.
        maps: Heads whose maps can be drawn without the model (see `headscope.storedmaps`); often none.
    """

    info: dict[str, Any]
    heads: pd.DataFrame
    tokens: pd.DataFrame
    arrays: dict[str, Tensor] = field(default_factory=dict)
    maps: StoredMaps = field(default_factory=StoredMaps)

    @property
    def scores(self) -> list[str]:
        """Numeric columns of ``heads`` that are statistics or scores, in the order of the table."""
        extra = ("_se", "_null")
        names = [c for c in self.heads.columns if c not in HEAD_KEYS and not c.endswith(extra)]
        return [c for c in names if self.heads[c].dtype.kind in "iuf"]

    def __repr__(self) -> str:
        model = self.info.get("model", {}).get("name", "")
        return f"RunData({model!r}: {len(self.heads)} heads, {len(self.tokens)} tokens; {', '.join(self.scores)})"


def conditions(info: dict[str, Any]) -> list[str]:
    """What sets a run apart from one of the model as it is, a sentence each: edits, and rows left out.

    Example:
        >>> conditions({"interventions": [{"Ablate": {"heads": "L4H9", "how": "zero"}}], "sampled_rows": "1/16"})
        ['Measured under Ablate(heads=L4H9, how=zero).', 'Averages are estimated from 1/16 of the query rows.']
    """
    said = []
    for part in info.get("interventions") or []:
        for name, fields in part.items() if isinstance(part, dict) else ():
            given = fields.items() if isinstance(fields, dict) else ()
            told = ", ".join(f"{k}={v}" for k, v in given if v not in (None, ""))
            said.append(f"Measured under {name}({told}).")
    if info.get("sampled_rows"):
        said.append(f"Averages are estimated from {info['sampled_rows']} of the query rows.")
    return said


def validate(data: RunData, where: str = "The run") -> None:
    """Check a run against the schema.

    Raises:
        ResultFormatError: Naming the column, row or entry that is wrong.
    """

    def refuse(reason: str) -> None:
        raise ResultFormatError(f"{where} does not fit schema {SCHEMA_VERSION}: {reason}.")

    heads, tokens = data.heads, data.tokens
    needed = [*HEAD_KEYS, *HEAD_COLUMNS, *(f"{c}_se" for c in HEAD_COLUMNS)]
    if missing := [c for c in needed if c not in heads]:
        refuse(f"heads.parquet lacks {', '.join(missing)}")
    if missing := [c for c in (*TOKEN_KEYS, *TOKEN_COLUMNS) if c not in tokens]:
        refuse(f"tokens.parquet lacks {', '.join(missing)}")
    if heads.duplicated(["layer", "head"]).any():
        refuse("heads.parquet has two rows for one head")
    ids = "L" + heads["layer"].astype(str) + "H" + heads["head"].astype(str)
    if wrong := [*heads["head_id"][heads["head_id"] != ids]]:
        refuse(f"head_id {wrong[0]!r} contradicts its layer and head")
    if unknown := set(data.maps.heads) - set(ids):
        refuse(f"maps are stored of {sorted(unknown)[0]}, which heads.parquet does not have")
    if strange := set(tokens["label"].unique()) - set(LABELS):
        refuse(f"label {sorted(map(str, strange))[0]!r} is none of {', '.join(LABELS)}")
    for key, kind in _KINDS.items():
        value = data.info.get(key)
        if value is not None and not isinstance(value, kind):
            refuse(f"{key!r} in run.json must be a {kind.__name__}, found {type(value).__name__}")
        if kind is list and not all(isinstance(entry, dict) for entry in value or []):
            refuse(f"{key!r} in run.json must hold records only")
    if undefined := [c for c in data.scores if c not in (data.info.get("columns") or {})]:
        refuse(f"run.json does not define {', '.join(undefined)} in 'columns'")
