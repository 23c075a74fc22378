"""headscope: exact statistics and edits of attention heads under the model's own fast attention."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a source checkout the sub-packages stand beside this folder (probes/, kernels/, ...), in a wheel inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))
del _root

from importlib import import_module as _import_module  # noqa: E402
from typing import TYPE_CHECKING as _TYPE_CHECKING  # noqa: E402

# Where each public name lives; imported when first used, so that the command line starts without torch.
_EXPORTS = {
    "CaptureMismatch": "errors",
    "HeadId": "heads",
    "HeadScores": "scores",
    "HeadscopeError": "errors",
    "LayerInfo": "stats",
    "ResultFormatError": "errors",
    "Scope": "scope",
    "Stats": "stats",
    "TokenScores": "scores",
    "UnsupportedModel": "errors",
    "UserError": "errors",
    "load": "loading",
    "parse_heads": "heads",
    "read_run": "runs",
}

if _TYPE_CHECKING:
    from .errors import CaptureMismatch, HeadscopeError, ResultFormatError, UnsupportedModel, UserError
    from .heads import HeadId, parse_heads
    from .loading import load
    from .runs import read_run
    from .scope import Scope
    from .scores import HeadScores, TokenScores
    from .stats import LayerInfo, Stats

__all__ = [
    "CaptureMismatch",
    "HeadId",
    "HeadScores",
    "HeadscopeError",
    "LayerInfo",
    "ResultFormatError",
    "Scope",
    "Stats",
    "TokenScores",
    "UnsupportedModel",
    "UserError",
    "__version__",
    "load",
    "parse_heads",
    "read_run",
]


def __getattr__(name: str) -> object:
    """Public names, and interventions by class name (``hs.Ablate``, ``hs.ACT`` ...), imported when first used."""
    if name in _EXPORTS:
        value = getattr(_import_module(f"{__name__}.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    if name[:1].isupper():
        from .interventions.base import known_interventions

        known = known_interventions()
        if name in known:
            return known[name]
    raise AttributeError(f"module 'headscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
