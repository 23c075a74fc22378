"""Experiments: sweeps with their curves, two runs side by side, and new scans and sweeps."""

from __future__ import annotations

from . import begin, compare, progress, state, sweeps, theme

PARTS = {"sweeps": "Sweeps", "compare": "Compare runs", "new": "Start a scan or sweep"}
_DRAW = {"sweeps": sweeps.draw, "compare": compare.draw, "new": begin.draw}


def draw() -> None:
    """The page."""
    theme.title("Experiments", [])
    first = "sweeps" if sweeps.paths() else "compare"
    part = state.segmented(
        "Part", "part", list(PARTS), first, format_func=PARTS.get, label_visibility="collapsed"
    )  # fmt: skip
    progress.strip()
    _DRAW[part]()
