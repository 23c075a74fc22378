"""The live model behind a run: loaded once, and its attention calls captured one layer and sequence at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import streamlit as st
import torch
from torch import Tensor

from ..errors import HeadscopeError, UserError
from ..inputs import prepare
from ..kernels.call import AttentionCall
from ..loading import load
from ..provenance import weights_hash
from ..scope import Scope
from ..taps import SOFTMAX
from . import jobs
from .arguments import Arguments
from .settle import settle
from .shelf import Entry

EMBEDDED = "headscope-reference"
_HASHED = 2_000_000_000
KEPT_BYTES = 400_000_000  # of captured queries and keys; beyond that the oldest layers are forgotten


@dataclass(eq=False)
class Live:
    """A loaded model. One lock: two pages must not run (and edit) it at the same time."""

    scope: Scope
    hash: str | None
    lock: threading.RLock = field(default_factory=threading.RLock)
    captures: dict[tuple, AttentionCall] = field(default_factory=dict)
    unedited: dict[tuple, Any] = field(default_factory=dict)

    @cached_property
    def heads(self) -> list[int]:
        """Heads of each layer. The first to ask surveys the model, which nobody else must run meanwhile."""
        with self.lock:
            return [layer.heads for layer in self.scope.layers]

    def without_edit(self, key: tuple, measure: Callable[[], Any]) -> Any:
        """What the model does without an edit, measured once; the last few are kept. The lock must be held."""
        if key not in self.unedited:
            while len(self.unedited) >= 8:
                del self.unedited[next(iter(self.unedited))]
            self.unedited[key] = measure()
        return self.unedited[key]


class _Enough(Exception):
    """The layer that was wanted has been seen; the rest of the forward is not needed."""


def reference(entry: Entry, arguments: Arguments) -> str | None:
    """Which model to load for a run: as the command line says, else as the run says; None is the embedded one."""
    if arguments.model is not None:
        return arguments.model
    name = entry.data.info["model"].get("name") if entry.data else None
    return None if name in (None, EMBEDDED) else str(name)


def open_model(entry: Entry, arguments: Arguments) -> Live | str:
    """The live model of a run, or in a sentence why there is none. Nothing is ever downloaded."""
    name = reference(entry, arguments)
    if name is not None and not _is_folder(name):
        return f"The model {name} is not a folder on this machine, so nothing live can be drawn. Use --model FOLDER."
    try:
        return _load(name, arguments.device)
    except HeadscopeError as error:
        return str(error)


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # a name that no file system takes, such as one that is too long
        return False


def lacking(live: Live, layer: int, head: int = 0) -> str | None:
    """In a sentence that the live model, another than the run's, lacks this head; None if it has it."""
    name, hint = live.scope.name, "use --model FOLDER with the run's own model."
    if not 0 <= layer < len(live.heads):
        return f"Layer {layer} is wanted, but the live model {name} has layers 0 to {len(live.heads) - 1}: {hint}"
    if not 0 <= head < live.heads[layer]:
        has = f"in layer {layer} the live model {name} has heads 0 to {live.heads[layer] - 1}"
        return f"Head {head} is wanted, but {has}: {hint}"
    return None


def mismatch(entry: Entry, live: Live) -> str | None:
    """A warning if the live model is not the one that the run was measured on."""
    said = entry.data.info["model"].get("hash") if entry.data else None
    if live.hash is None or not said or live.hash == said:
        return None
    return "The live model has other weights than the run: what is drawn live need not fit the run's scores."


@st.cache_resource(max_entries=1, show_spinner="Loading the model …")
def _load(name: str | None, device: str) -> Live:
    scope = load(name, device=device)
    small = sum(p.numel() for p in scope.model.parameters()) * 4 < _HASHED
    live = Live(scope, weights_hash(scope.model) if small else None)
    settle()
    return live


def capture(live: Live, ids: Tensor, layer: int, tell: jobs.Tell) -> AttentionCall:
    """The attention call of one layer on one sequence: a forward that ends as soon as the layer is reached.

    The layers below are kept too, as far as there is room: what took seconds to reach is not computed twice.

    Raises:
        UserError: If the model has no such layer.
    """
    with live.lock:
        if why := lacking(live, layer):
            raise UserError(why)
        if key_of(ids, layer) not in live.captures:
            for call in _capture(live.scope, ids, layer, tell):
                live.captures[key_of(ids, call.layer)] = call
            _forget(live.captures, key_of(ids, layer))
        return live.captures[key_of(ids, layer)]


def _forget(captures: dict[tuple, AttentionCall], wanted: tuple) -> None:
    """Drop the oldest captures beyond the room there is; the wanted one stays."""
    sizes = {k: sum(x.nbytes for x in (c.query, c.key, c.pattern) if x is not None) for k, c in captures.items()}
    for key in list(captures):
        if sum(sizes[k] for k in captures) > KEPT_BYTES and key != wanted:
            del captures[key]


def _capture(scope: Scope, ids: Tensor, layer: int, tell: jobs.Tell) -> list[AttentionCall]:
    """The calls of the layers up to this one, of the kind of this one."""
    found: list[AttentionCall] = []

    def seen(call: AttentionCall, site: object = None) -> None:
        tell(call.layer, layer + 1, f"Running the model, layer {call.layer}")
        if call.layer == layer or scope.layers[call.layer].kind == scope.layers[layer].kind:
            found.append(replace(call, value=call.value[..., :0].clone()))
        if call.layer == layer:
            raise _Enough

    class Watch:
        def begin(self, ids: Tensor | None) -> None: ...

        def record(self, call: AttentionCall, lse: Tensor | None, site: object) -> None:
            seen(call)

    batch = prepare({"input_ids": ids[None]}, scope)
    if hasattr(scope.model.config, "use_cache"):
        batch["use_cache"] = False
    only_read = scope.layers[layer].tier == SOFTMAX
    with torch.no_grad(), scope.attached() as runtime:
        # An editor costs no log normalisers of layers that nobody looks at; maps that are only read have no editor.
        before, watch = runtime.editor, Watch()
        if only_read:
            runtime.recorders.append(watch)
        else:
            runtime.editor = seen
        try:
            scope.model(**batch)
        except _Enough:
            pass
        finally:
            runtime.editor = before
            if only_read:
                runtime.recorders.remove(watch)
    return found


def key_of(ids: Tensor, layer: int) -> tuple:
    """What stands for a sequence and a layer among the captures."""
    return (len(ids), hash(ids.cpu().numpy().tobytes())), layer
