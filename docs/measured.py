"""Tables of pages that come from the raw results of benchmarks, so that no figure is copied by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
_COLUMNS = ((128, 8192), (128, 32768), (128, 131072), (64, 32768), (64, 131072))
_GIVEN, _ALONE = "given lse: ", "no lse: "
_DEFAULT = "the 12 default statistics and attention received"
# What a page calls a line of benchmarks/kernels.py; a name of its own in italics starts a section.
_OPERATORS = {
    "forward: cuDNN SDPA with lse": "attention forward, cuDNN, with its normaliser",
    "forward: flash SDPA": "attention forward, flash",
    "*given the normaliser*": "",
    _GIVEN + "4 row statistics + received, one sweep": "4 row statistics and attention received, one sweep",
    _GIVEN + "the 12 default statistics + received": _DEFAULT,
    _GIVEN + "4 row statistics": "4 row statistics (entropy, clipped distance, 2 masses)",
    _GIVEN + "received": "attention received",
    _GIVEN + "received and weighted received": "attention received, plain and weighted",
    _GIVEN + "future, window 10-100": "future (10 to 100 tokens later)",
    _GIVEN + "target mass": "target mass (previous token and the like)",
    _GIVEN + "duplicate tokens, as frequent as words": "duplicate tokens (induction alike), ids as frequent as words",
    _GIVEN + "duplicate tokens, all alike": "the same if all tokens are alike",
    _GIVEN + "top-1 key and mass": "top-1 key and mass",
    _GIVEN + "distance histogram": "distance histogram",
    _GIVEN + "every row statistic, top-1 and histogram too": "every row statistic, top-1 and histogram too",
    _GIVEN + "block mass and maximum, edge 128": "block mass and maximum, 128 × 128",
    "antidiagonal blocks, edge 128, stride 16": "antidiagonal block scores, stride 16",
    _GIVEN + "tile of one head, last 512 rows, all keys, pooled to 512 x 512": "a piece of one head's map, 512 × 512",
    "*without it*": "",
    _ALONE + "lse": "normaliser alone",
    _ALONE + "4 row statistics": "4 row statistics",
    _ALONE + "every row statistic, top-1 and histogram too": "every row statistic, top-1 and histogram too",
    _ALONE + "4 row statistics + received, two sweeps": "4 row statistics and attention received, two sweeps",
    _ALONE + "4 row statistics from 1/16 of the rows": "4 row statistics from 1/16 of the rows",
    "*for comparison*": "",
    "peer: received by a second FlexAttention call": "attention received by a second FlexAttention call",
    "peer: entropy and received, dense torch": "entropy and received, dense torch",
}
_EDITS = {
    "no edit": "none",
    "temperature": "temperature (`logit_scale`)",
    "key bias": "key bias (`logit_bias`)",
    "window of 4 + 1,024 keys": "window of 4 + 1,024 keys",
    "a quarter of the 128 x 128 blocks": "a quarter of the 128 × 128 blocks",
    "knockout": "knockout",
    "reset of 32 keys": "reset of 32 keys",
    "reset of half the keys": "reset of half the keys",
    "reset of 32 keys to half the keys": "reset of 32 keys, half the keys receive",
}


def capture() -> str:
    """What ``benchmarks/capture.py`` measured last, × over the plain forward of the same length."""
    found = _read("capture-cpu.json")
    plain = found["results"]["sdpa"]
    rows = []
    for name, about in found["what"].items():
        for length, r in found["results"].get(name, {}).items():
            ratio = f"{r['cpu_s'] / plain[length]['cpu_s']:.2f}×"
            rows.append((about, f"{int(length):,}", f"{r['peak_mb']:,} MB", f"{r['cpu_s']:.2f} s", ratio))
    return table(("method", "tokens", "peak memory", "CPU time", "over plain"), rows)


def operators() -> str:
    """Every operator of ``benchmarks/kernels.py``, × over cuDNN's forward of the same length and width."""
    lines = {(x["width"], x["length"], x["name"]): x for x in _read("kernels-nvidia-h200.json")["operators"]}
    rows = []
    for n, (name, label) in enumerate(_OPERATORS.items()):
        if not label:
            rows.append((name, *[""] * len(_COLUMNS)))
            continue
        found = [lines.get((*at, name)) for at in _COLUMNS]
        cells = ["" if x is None else _ms(x["ms"]) if n == 0 else f"{x['over_cudnn']:.2f}×" for x in found]
        rows.append((label, *cells))
    heads = [f"{n:,}" for _, n in _COLUMNS]
    heads[0], heads[3] = f"D = 128: {heads[0]} tokens", f"D = 64: {heads[3]}"
    return table(("operator", *heads), rows)


def edits() -> str:
    """The fused edited forward at 32,768 tokens, and FlexAttention in the same run."""
    found = {x["name"]: x for x in _read("kernels-nvidia-h200.json")["operators"] if x["length"] == 32768}
    rows = []
    for name, label in _EDITS.items():
        ours, flex = found[f"edited forward, {name}"], found.get(f"peer: FlexAttention, {name}")
        other = "cannot" if name.startswith("reset") else "" if flex is None else _ms(flex["ms"])
        rows.append((label, _ms(ours["ms"]), f"{ours['over_cudnn']:.2f}×", other))
    return table(("plan field", "fused kernel", "× cuDNN", "FlexAttention"), rows)


def prefill() -> str:
    """A whole model, × over its plain prefill of the same length."""
    lines = _read("kernels-nvidia-h200.json")["prefill"]
    names = {
        "plain": "plain",
        "4 row statistics + received, kernels only": "4 row statistics and attention received, kernels alone",
        "4 row statistics + received, Scope.run_with_stats": "the same through `run_with_stats`",
        "the 12 default statistics + received, Scope.run_with_stats": _DEFAULT,
    }
    lengths = sorted({x["length"] for x in lines})
    by = {(x["length"], x["name"]): x for x in lines}
    rows = []
    for name, label in names.items():
        found = [by.get((n, name)) for n in lengths]
        unit = "{seconds:.4g} s" if name == "plain" else "{over_plain:.2f}×"
        rows.append((label, *["" if x is None else unit.format(**x) for x in found]))
    most = [max(x["peak_gib"] for x in lines if x["length"] == n) for n in lengths]
    rows.append(("most memory of these", *[f"{x:.1f} GiB" for x in most]))
    return table(("", f"{lengths[0]:,} tokens", *[f"{n:,}" for n in lengths[1:]]), rows)


def table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table between blank lines."""
    lines = [names, tuple("---" for _ in names), *rows]
    return "\n" + "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n\n"


def _ms(x: float) -> str:
    return f"{x:.2f} ms" if x < 1 else f"{x:.1f} ms" if x < 100 else f"{x:.0f} ms"


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))
