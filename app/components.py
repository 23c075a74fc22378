"""The drawings of the app as Streamlit components: data in, choices out. They fetch nothing.

Everything that comes from a model, a text or a run travels as data and is put into the page as text, never as HTML.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st

from ..report import palette

_HERE = Path(__file__).parent
_SHARED = Path(palette.__file__).with_name("shared.js")
_HTML = '<div class="stage"></div><div class="tip" role="tooltip" hidden></div><div class="sentinel"></div>'


def nav(data: dict[str, Any], key: str, **callbacks: Callable[[], None]) -> Any:
    """The bar of pages. Triggers ``go`` (page), ``run`` (run name) and ``went`` (the address gone back to)."""
    return _mount("nav", data, key, callbacks, ("go", "run", "went"))


def grid(data: dict[str, Any], key: str, **callbacks: Callable[[], None]) -> Any:
    """Layer × head grid, ranking and scatter. Triggers ``open`` (head id); states ``top``, ``picked`` and ``log``."""
    return _mount("grid", data, key, callbacks, ("open", "top", "picked", "log"))


def text(data: dict[str, Any], key: str, **callbacks: Callable[[], None]) -> Any:
    """Shaded tokens with hover lines and curves. State ``token`` (position of the pinned token)."""
    return _mount("text", data, key, callbacks, ("token",))


def matrix(data: dict[str, Any], key: str, **callbacks: Callable[[], None]) -> Any:
    """A zoomable map. State ``view``: [first row, last row, first column, last column], ends exclusive."""
    return _mount("map", data, key, callbacks, ("view",))


def plot(data: dict[str, Any], key: str) -> Any:
    """Small charts side by side: bars and lines with a common style."""
    return _mount("plot", data, key, {}, ())


def curves(data: dict[str, Any], key: str) -> Any:
    """Charts of scores over the number of edited heads, with bands."""
    return _mount("curves", data, key, {}, ())


def css() -> str:
    """Variables and palette, for what is drawn outside the components."""
    return asset("colours.css") + palette.css()


def _mount(name: str, data: dict[str, Any], key: str, callbacks: dict[str, Callable[[], None]], states: tuple) -> Any:
    calls = {f"on_{state}_change": callbacks.get(state, _nothing) for state in states}
    return _component(name)(data=data, key=key, **calls)


def _component(name: str) -> Any:
    return st.components.v2.component(f"headscope_{name}", html=_HTML, css=_style(name), js=_script(name))


@cache
def _style(name: str) -> str:
    return css() + asset("base.css") + asset(f"{name}.css")


@cache
def _script(name: str) -> str:
    colours = {"q": [palette.sequential(False), palette.sequential(True)]}
    shared = _SHARED.read_text(encoding="utf-8")
    return f"const PALETTE = {colours!r};\n" + shared + asset("base.js") + asset(f"{name}.js")


def asset(name: str) -> str:
    """The text of a file beside this module."""
    return (_HERE / name).read_text(encoding="utf-8")


def _nothing() -> None:
    pass
