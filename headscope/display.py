"""How results show themselves in notebooks: by the pictures of ``headscope.viz``, loaded when the first is shown."""

from __future__ import annotations

from importlib import import_module


class Shown:
    """A result with a picture: ``headscope.viz.show`` knows how to draw each kind."""

    def _repr_html_(self) -> str:
        return import_module("headscope.viz.show").picture(self)
