"""Outlines in the grid: seen on every colour of both scales, in both themes, in the dashboard and in the report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("streamlit")

import headscope.app.theme
from headscope.report import palette

APP = Path(headscope.app.theme.__file__).parent
REPORT = Path(palette.__file__).parent
ENOUGH = 3.0  # WCAG 2.2, 1.4.11: contrast of what is no text


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, two: str) -> float:
    """WCAG 2.2, contrast ratio."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def colour(css: str, rule: str, what: str, dark: bool) -> str:
    """The colour that a rule sets, through one variable if it names one."""
    body = re.search(rf"(?:^|\n)\s*{re.escape(rule)} \{{([^}}]*)\}}", css)[1]
    value = re.search(rf"(?:^|[\s;]){what}:\s*([^;]+)", body)[1]
    if name := re.match(r"var\((--\w+)\)", value):
        value = re.search(rf"{name[1]}:\s*(light-dark\([^)]*\))", css)[1]
    found = re.findall(r"#[0-9a-f]{6}", value)
    return found[dark]


def test_the_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("page", ["app", "report"])
def test_outlines_stand_out_from_every_cell(page: str, dark: bool) -> None:
    files = (APP / "colours.css", APP / "grid.css") if page == "app" else (REPORT / "report.css",)
    css = "\n".join(f.read_text() for f in files)
    ring = colour(css, ".ring", "stroke", dark)
    kinds = (".cell.top", ".cell.on", ".cell.picked") if page == "app" else (".cell.top", ".cell.on")
    for kind in kinds:
        assert contrast(colour(css, kind, "stroke", dark), ring) >= ENOUGH, "the line lies between two of the ring's"
    line = colour(css, ".cell.top", "stroke", dark)
    for cell in palette.sequential(dark) + palette.diverging(dark):
        assert max(contrast(cell, line), contrast(cell, ring)) >= ENOUGH, cell
