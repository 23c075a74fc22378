"""The dashboard opened at an address, without a browser."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import headscope.app.theme

MAIN = Path(headscope.app.theme.__file__).with_name("main.py")


def open_page(monkeypatch: pytest.MonkeyPatch, folder: Path, *extra: str, **query: str) -> AppTest:
    """The page that ``query`` names, drawn once, of the runs in a folder; ``extra`` are arguments of the app."""
    monkeypatch.setattr(sys, "argv", ["main.py", str(folder), "--device", "cpu", *extra])
    test = AppTest.from_file(str(MAIN), default_timeout=120)
    for key, value in query.items():
        test.query_params[key] = value
    return test.run()
