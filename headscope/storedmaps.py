"""Stored heads: queries and keys of chosen heads inside a run, from which any part of their maps is drawn again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ResultFormatError, UserError
from .heads import HeadId, parse_heads
from .kernels.call import AttentionCall
from .kernels.tile import tile
from .kernels.visibility import Visibility
from .maps import inside

FILE = "maps.safetensors"
FORMAT = 1
_KEY = "headscope"
_MOST = 1 << 31  # no position lies beyond it
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredHead:
    """What the tensors of one head on one sequence mean; the words are those of `AttentionCall` and `Visibility`.

    Attributes:
        sequence: Number of the run's sequence.
        layer: Layer of the head.
        head: Its number in the layer.
        kv: The kv head it reads; its keys are stored once for all heads that do.
        tokens: Queries and keys, N.
        form: ``qk``: queries, keys and the log normaliser of each row; ``pattern``: the map itself.
    """

    sequence: int
    layer: int
    head: int
    kv: int
    tokens: int
    form: str
    scale: float
    softcap: float | None = None
    left: int | None = None
    right: int | None = None
    q_offset: int = 0
    kv_offset: int = 0
    name: str = ""

    @property
    def id(self) -> HeadId:
        """The head's name."""
        return HeadId(self.layer, self.head)

    def tensor(self, part: str) -> str:
        """Name of one of its tensors in the file."""
        owner = {"key": f"L{self.layer}KV{self.kv}", "keys": f"L{self.layer}"}.get(part, str(self.id))
        return f"{self.sequence}/{owner}/{part}"

    def shapes(self) -> dict[str, tuple[list[list[int]], tuple[str, ...], bool]]:
        """Each part it may have: shapes allowed (-1: any width), dtypes allowed, and whether it must be there."""
        n, square = self.tokens, [[self.tokens, self.tokens]]
        shared = {"keys": ([[n]], ("BOOL",), False)}
        if self.form == "pattern":
            return shared | {"pattern": (square, ("F32",), True), "seen": (square, ("BOOL",), False)}
        return shared | {
            "query": ([[n, -1]], _FLOATS, True),
            "key": ([[n, -1]], _FLOATS, True),
            "lse": ([[n]], ("F32",), True),
            "sinks": ([[1], [n]], _FLOATS, False),
        }


class StoredMaps:
    """Heads whose maps a run carries: ``data.maps.tile("L4H9", size=(256, 256))`` draws one without the model.

    What is read from a run stays on disk; a piece reads the queries and keys of its own rows and columns.

    Example:
        >>> import tempfile, headscope as hs
        >>> from headscope.corpus import Sequence
        >>> from headscope.runs import read_run, write_run
        >>> from headscope.scan import ScanConfig, scan
        >>> scope = hs.load()
        >>> ids = scope.tokenizer("The cat sat on the mat.", return_tensors="pt")["input_ids"][0]
        >>> data = scan(scope, [Sequence(ids, "a cat")], ScanConfig(probes=(), maps="L4H9,L2H3"))
        >>> folder = write_run(data, tempfile.mkdtemp() + "/run", report=False)
        >>> maps = read_run(folder).maps
        >>> maps
        StoredMaps(L4H9, L2H3; sequence 0)
        >>> torch.allclose(maps.tile("L4H9"), scope.tile(ids, "L4H9"), atol=1e-6)
        True
    """

    def __init__(
        self,
        entries: Sequence[StoredHead] = (),
        tensors: Mapping[str, Tensor] | None = None,
        path: Path | None = None,
    ) -> None:
        """Heads with their tensors, in memory or (``path``) in a file that is read when something is drawn."""
        self.entries, self.path, self._tensors = list(entries), path, dict(tensors or {})
        self._at = {(e.sequence, e.id): e for e in self.entries}

    @property
    def heads(self) -> list[str]:
        """Names of the stored heads, in the order they were asked for."""
        return list(dict.fromkeys(str(e.id) for e in self.entries))

    @property
    def sequences(self) -> list[int]:
        """Numbers of the run's sequences that maps are stored of."""
        return sorted({e.sequence for e in self.entries})

    def holds(self, head: object, sequence: int = 0) -> bool:
        """Whether the map of this head on this sequence is there."""
        return (sequence, _one(head)) in self._at

    def call(self, head: object, sequence: int = 0) -> AttentionCall:
        """The attention call of this head alone (B = H = 1), as the model made it; it has no values.

        Raises:
            UserError: If the head is not stored; the message names those that are.
            ResultFormatError: If the file cannot be read any more.
        """
        entry = self._entry(head, sequence)
        return self._cut(entry, range(entry.tokens), range(entry.tokens))

    def lse(self, head: object, sequence: int = 0) -> Float[Tensor, "1 1 Q"] | None:
        """The log normaliser of each row (natural log, learned sinks included); None if the map itself is stored.

        Raises:
            UserError: If the head is not stored.
        """
        entry = self._entry(head, sequence)
        return None if entry.form == "pattern" else self._read(entry.tensor("lse"))[None, None]

    def tile(
        self,
        head: object,
        rows: range | None = None,
        cols: range | None = None,
        size: tuple[int, int] | None = None,
        sequence: int = 0,
    ) -> Float[Tensor, "rows cols"]:
        """An exact piece of a map, at full resolution or pooled to ``size``, like ``Scope.tile`` but without a model.

        Args:
            head: One stored head, in any spelling.
            rows: Query rows; all by default.
            cols: Key columns; all by default.
            size: (rows, columns) of the pooled picture; a cell is the mean over its rows of the mass in its columns.
            sequence: Number of the run's sequence.

        Raises:
            UserError: If the head is not stored, or rows or columns do not exist.
        """
        entry = self._entry(head, sequence)
        rows, cols = inside("rows", rows, entry.tokens), inside("columns", cols, entry.tokens)
        call, lse = self._cut(entry, rows, cols), self.lse(head, sequence)
        known = None if lse is None else lse[..., rows.start : rows.stop]
        return tile(call, known, 0, 0, range(len(rows)), range(len(cols)), size)

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file."""
        if self.path is not None:
            shutil.copyfile(self.path, path)
            return
        facts = json.dumps({"format": FORMAT, "heads": [asdict(e) for e in self.entries]}, allow_nan=False)
        save_file(self._tensors, path, {_KEY: facts})

    def __contains__(self, head: object) -> bool:
        return any(e.id == _one(head) for e in self.entries)

    def __len__(self) -> int:
        return len(self.heads)

    def __repr__(self) -> str:
        if not self.entries:
            return "StoredMaps(none)"
        word = "sequence" if len(self.sequences) == 1 else "sequences"
        return f"StoredMaps({', '.join(self.heads)}; {word} {', '.join(map(str, self.sequences))})"

    def _entry(self, head: object, sequence: int) -> StoredHead:
        wanted = _one(head)
        if (sequence, wanted) not in self._at:
            stored = f"Stored: {', '.join(self.heads)} on sequence {', '.join(map(str, self.sequences))}."
            raise UserError(
                f"The run holds no map of {wanted} on sequence {sequence}. {stored if self.entries else ''} "
                "headscope scan --maps HEADS stores more.".replace("  ", " ")
            )
        return self._at[sequence, wanted]

    def _cut(self, entry: StoredHead, rows: range, cols: range) -> AttentionCall:
        """The call with these rows and columns only; its map is right together with the normaliser of the rows."""
        row, col = slice(rows.start, rows.stop), slice(cols.start, cols.stop)
        names = self._names()
        keys = self._read(entry.tensor("keys"), col) if entry.tensor("keys") in names else None
        seen = self._read(entry.tensor("seen"), row, col)[None, None] if entry.tensor("seen") in names else None
        visible = Visibility(
            entry.left,
            entry.right,
            entry.q_offset + rows.start,
            entry.kv_offset + cols.start,
            None if keys is None else keys[None],
            dense=seen,
        )
        facts: dict[str, Any] = {"visible": visible, "scale": entry.scale, "layer": entry.layer, "name": entry.name}
        if entry.form == "pattern":
            empty = torch.zeros(1, 1, len(rows), 0), torch.zeros(1, 1, len(cols), 0)
            pattern = self._read(entry.tensor("pattern"), row, col)[None, None]
            return AttentionCall(empty[0], empty[1], empty[1], pattern=pattern, **facts)
        sinks = self._read(entry.tensor("sinks")) if entry.tensor("sinks") in names else None
        if sinks is not None and len(sinks) > 1:
            sinks = sinks[None, None, row]
        query = self._read(entry.tensor("query"), row)[None, None]
        key = self._read(entry.tensor("key"), col)[None, None]
        return AttentionCall(query, key, key[..., :0], softcap=entry.softcap, sinks=sinks, **facts)

    def _names(self) -> set[str]:
        if self.path is None:
            return set(self._tensors)
        with _opened(self.path) as file:
            return set(file.keys())

    def _read(self, name: str, *cut: slice) -> Tensor:
        """A tensor or a piece of it; memory of its own, so that nothing depends on the file."""
        if self.path is None:
            return self._tensors[name][cut]
        with _opened(self.path) as file:
            return (file.get_slice(name)[cut] if cut else file.get_tensor(name)).clone()


def read(path: Path, n_heads: Mapping[int, int], lengths: Mapping[int, int]) -> StoredMaps:
    """The stored heads of a run; only the file's header is read.

    Args:
        path: The file.
        n_heads: Layer -> how many heads the run says it has.
        lengths: Sequence -> how many tokens the run says it has.

    Raises:
        ResultFormatError: If the file is damaged, or does not fit the run.
    """
    with _opened(path) as file:
        entries = [_entry_of(path, record) for record in _records(path, file.metadata())]
        found = {n: (list(file.get_slice(n).get_shape()), file.get_slice(n).get_dtype()) for n in file.keys()}  # noqa: SIM118
    used: set[str] = set()
    for entry in entries:
        problem = _misfit(entry, n_heads, lengths) or _tensor_misfit(entry, found, used)
        if problem:
            raise ResultFormatError(f"{path} does not fit its run: {problem}.")
    if len({(e.sequence, e.id) for e in entries}) < len(entries):
        raise ResultFormatError(f"{path} does not fit its run: it holds a head twice.")
    if extra := sorted(set(found) - used):
        raise ResultFormatError(f"{path} does not fit its run: nothing says what {extra[0]!r} is.")
    return StoredMaps(entries, path=path)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ResultFormatError(f"{path} cannot be read as safetensors: {error}.") from error


def _records(path: Path, metadata: dict[str, str] | None) -> list[Any]:
    """The descriptions of the heads in a file's header."""
    try:
        facts = json.loads((metadata or {})[_KEY])
        version, records = facts["format"], facts["heads"]
    except (KeyError, TypeError, ValueError) as error:
        raise ResultFormatError(f"{path} does not say what its tensors are.") from error
    if version != FORMAT or not isinstance(records, list):
        raise ResultFormatError(f"{path} has format {version!r}; this headscope reads {FORMAT}.")
    return records


def _entry_of(path: Path, record: Any) -> StoredHead:
    names = {f.name for f in fields(StoredHead)}
    if not isinstance(record, dict) or set(record) != names:
        raise ResultFormatError(f"{path} does not fit its run: a head is described by {', '.join(sorted(names))}.")
    return StoredHead(**record)


def _misfit(entry: StoredHead, n_heads: Mapping[int, int], lengths: Mapping[int, int]) -> str:
    """What is wrong with the description of one head; empty if nothing is."""
    whole = ("sequence", "layer", "head", "kv", "tokens", "q_offset", "kv_offset")
    for name in whole:
        if not _whole(getattr(entry, name), 0):
            return f"{name} must be a whole number of at least 0, found {getattr(entry, name)!r}"
    for name in ("left", "right"):
        if getattr(entry, name) is not None and not _whole(getattr(entry, name), -_MOST):
            return f"{name} must be a whole number or null, found {getattr(entry, name)!r}"
    if not _finite(entry.scale) or not (entry.softcap is None or (_finite(entry.softcap) and entry.softcap > 0)):
        return f"{entry.id} has scale {entry.scale!r} and soft-cap {entry.softcap!r}"
    if entry.form not in ("qk", "pattern") or not isinstance(entry.name, str):
        return f"{entry.id} has form {entry.form!r}"
    if not (entry.head < n_heads.get(entry.layer, 0) and entry.kv <= entry.head):
        return f"there is no head {entry.id} with kv head {entry.kv}"
    if lengths.get(entry.sequence) != entry.tokens or not entry.tokens:
        return f"{entry.id} has {entry.tokens} tokens, its sequence {lengths.get(entry.sequence)}"
    return ""


def _tensor_misfit(entry: StoredHead, found: Mapping[str, tuple[list[int], str]], used: set[str]) -> str:
    """What is wrong with the tensors of one head; those it has are added to ``used``."""
    for part, (shapes, dtypes, needed) in entry.shapes().items():
        name = entry.tensor(part)
        if name not in found:
            if needed:
                return f"{name} is missing"
            continue
        shape, dtype = found[name]
        fits = any(len(s) == len(shape) and all(a in (b, -1) for a, b in zip(s, shape, strict=True)) for s in shapes)
        if not fits or 0 in shape or dtype not in dtypes:
            return f"{name} has shape {shape} and dtype {dtype}"
        used.add(name)
    if entry.form == "qk" and found[entry.tensor("query")][0] != found[entry.tensor("key")][0]:
        return f"queries and keys of {entry.id} have different widths"
    return ""


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _MOST


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one(head: object) -> HeadId:
    """The head named by any spelling of one head.

    Raises:
        UserError: If it cannot be read, or names several.
    """
    found = [head] if isinstance(head, HeadId) else parse_heads(head, [1000] * 1000)
    if len(found) != 1:
        raise UserError(f"A stored map is of one head; {head!r} names {len(found)}.")
    return found[0]
