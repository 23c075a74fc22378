"""Commands that measure: scan and demo."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from . import options as opt

DEMO_FOLDER = Path("headscope-demo")


@dataclass(frozen=True)
class Source:
    """Where the text of a scan comes from."""

    text: tuple[str, ...] = ()
    data: Path | None = None
    demo: bool = False
    seq_len: int | None = None
    limit: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``read_sequences``, without what is left at its default."""
        given = {"text": list(self.text), "path": self.data, "demo": self.demo, "limit": self.limit}
        return {k: str(v) if isinstance(v, Path) else v for k, v in given.items() if v}


def scan(
    context: typer.Context,
    model: opt.Model = None,
    text: opt.Text = None,
    data: opt.Data = None,
    demo: opt.Demo = False,
    stats: opt.Stats = "default",
    probes: opt.Probes = "default",
    seq_len: opt.SeqLen = None,
    limit: opt.Limit = None,
    batch_size: opt.BatchSize = 1,
    rows: opt.Rows = "",
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    output: opt.Output = None,
    overwrite: opt.Overwrite = False,
    heads: opt.Heads = None,
    intervene: opt.Intervene = None,
    workers: opt.Workers = None,
    maps: opt.Maps = "",
    maps_sequences: opt.MapsSequences = 1,
    maps_gib: opt.MapsGib = 2.0,
    as_json: opt.Json = False,
    dry_run: opt.DryRun = False,
    show_python: opt.ShowPython = False,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Measure every attention head on a text and write a run directory with its report."""
    from ..corpus import check_source
    from ..runs import check_output
    from ..scan import ScanConfig
    from .output import load_model

    source = Source(tuple(text or ()), data, demo, seq_len, limit)
    check_source(source.text, data, demo)
    config = ScanConfig(
        stats=opt.names(stats), probes=opt.names(probes), batch_size=batch_size, seed=seed, rows=rows,
        maps=maps, maps_sequences=maps_sequences, maps_gib=maps_gib,
    )  # fmt: skip
    _check_names(config)
    edits = _edits(intervene)
    spread = _spread({"model": model, "device": device, "dtype": dtype}, trust_remote_code, workers, edits)
    folder = output or _default_folder(model)
    loading = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if show_python:
        _print_python(model, loading, source, config, folder, intervene)
        return
    if not dry_run:
        check_output(folder, overwrite)
    scope = load_model(model, loading)
    sequences = read(scope, source)
    chosen = [] if heads is None else [str(h) for h in scope.heads(heads)]
    if dry_run:
        _print_estimate(scope, sequences, config, as_json)
        return
    run, path = _measure(context, scope, sequences, config, folder, overwrite, edits, spread)
    _show(run, path, chosen, as_json)


def demo(context: typer.Context) -> None:
    """Measure the embedded model on the demo text, into ./headscope-demo."""
    from ..runs import check_output
    from ..scan import ScanConfig
    from .output import load_model

    check_output(DEMO_FOLDER, overwrite=True)
    scope = load_model(None, {"device": "cpu", "dtype": "auto"})
    sequences = read(scope, Source(demo=True))
    run, path = _measure(context, scope, sequences, ScanConfig(), DEMO_FOLDER, overwrite=True)
    _show(run, path, [], as_json=False)


def _check_names(config: Any) -> None:
    """Refuse unknown statistics and probes before a model is loaded."""
    from ..mapchoice import read_choice
    from ..names import expand
    from ..registry import find_probe
    from ..sampling import sample_of

    expand(config.stats)
    if config.maps:
        read_choice(config.maps)
    if config.rows:
        sample_of(config.rows)
    for name in config.probe_names():
        find_probe(name)


def _edits(path: Path | None) -> Any:
    """The interventions of a YAML file; None without one.

    Raises:
        UserError: If it cannot be read, or holds none.
    """
    from ..errors import UserError
    from ..interventions.base import from_yaml

    if path is None:
        return None
    found = from_yaml(path.expanduser())
    if not found.parts:
        raise UserError(f"{path} holds no intervention; leave --intervene out to measure the model as it is.")
    return found


def _spread(loading: dict[str, Any], trust: bool, workers: int | None, edits: Any) -> Any:
    """Who measures instead of this process; None without ``--workers``."""
    from ..spread import Spread

    how = loading | {"trust_remote_code": trust}
    return None if workers is None else Spread(how, workers, "" if edits is None else edits.to_yaml())


def _measure(
    context: typer.Context,
    scope: Any,
    sequences: list[Any],
    config: Any,
    folder: Path,
    overwrite: bool,
    edits: Any = None,
    spread: Any = None,
) -> tuple[Any, Path]:
    """Scan (under edits, if there are any) and write; the run and its folder."""
    from ..runs import write_run
    from ..scan import scan as measure
    from .output import progress

    with progress("Measuring") as report, nullcontext() if edits is None else scope.intervene(edits):
        data = measure(scope, sequences, config, progress=report, measure_with=spread)
    if edits is not None:
        data.info["interventions"] = [part.to_dict() for part in edits]
    data.info["command"] = shlex.join(["headscope", *context.obj])
    with progress("Writing the run"):
        return data, write_run(data, folder, overwrite)


def _show(data: Any, path: Path, heads: list[str], as_json: bool) -> None:
    from ..runs import REPORT
    from .output import print_json, print_line, print_table
    from .summary import finding_rows, head_rows, summary

    if as_json:
        rows = data.heads[data.heads["head_id"].isin(heads)].to_dict("records")
        more = ({"heads": rows} if heads else {}) | ({"maps": data.info["maps"]} if data.info.get("maps") else {})
        print_json({"run": path, "report": path / REPORT, **summary(data), **more})
        return
    titles = ["finding", "heads", "threshold", "null", "clearest heads"]
    print_table(titles, finding_rows(data), right=("heads", "null"))
    if heads:
        print_line("")
        print_table(["score", *heads], head_rows(data, heads), right=tuple(heads))
    if sampled := data.info.get("sampled_rows"):
        print_line(f"\nSampled: averages are estimated from {sampled} of the query rows; *_se holds their error.")
    _show_maps(data.info.get("maps") or {})
    print_line(f"\nRun:    {path}\nReport: {path / REPORT}")


def _show_maps(stored: dict[str, Any]) -> None:
    """Which heads' maps the run carries, and why others are not among them."""
    from .output import print_line

    if stored:
        print_line(f"\nMaps:   {', '.join(stored['heads']) or 'none'} ({stored['bytes'] / 2**20:,.1f} MiB)")
    for left_out in stored.get("skipped", []):
        print_line(f"Not stored: {left_out['name']}: {left_out['reason']}.")


def read(scope: Any, source: Source) -> list[Any]:
    """The sequences of a source, no longer than the model can take."""
    from ..corpus import SEQ_LEN, read_sequences
    from .output import progress

    most = getattr(scope.model.config, "max_position_embeddings", None)
    seq_len = source.seq_len or min(SEQ_LEN, most or SEQ_LEN)
    if most and seq_len > most:
        _beyond_training(scope.model, seq_len, most)
    with progress("Reading the text"):
        return read_sequences(scope.tokenizer, **source.arguments(), seq_len=seq_len)


def _beyond_training(model: Any, seq_len: int, most: int) -> None:
    """Refuse sequences for which the model has no positions; only say so where positions are computed."""
    from torch import nn

    from ..errors import UserError

    embeddings = [(name, m.num_embeddings) for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    if any(most <= rows < seq_len and ("pos" in name or name.endswith("wpe")) for name, rows in embeddings):
        raise UserError(f"The model has {most} positions; found --seq-len {seq_len}. Use --seq-len {most} or less.")
    print(f"Note: the model was made for {most} tokens, --seq-len is {seq_len}.", file=sys.stderr)


def _default_folder(model: str | None) -> Path:
    name = "headscope-reference" if model is None else Path(model).name if Path(model).exists() else model
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip(".-") or "model"
    return Path("runs") / f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}"


def _print_estimate(scope: Any, sequences: list[Any], config: Any, as_json: bool) -> None:
    from ..mapchoice import check
    from .look import print_facts
    from .output import print_json

    lengths = [len(s.ids) for s in sequences]
    facts = {
        "sequences": len(lengths),
        "tokens": sum(lengths),
        "longest_sequence": max(lengths),
        **{k: v for k, v in scope.inspect().items() if "memory" in k or "estimate" in k},
    }
    if config.maps:
        facts["maps_bytes"] = check(scope, sequences, config.maps, config.maps_sequences, config.maps_gib)
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)


def _print_python(
    model: str | None, loading: dict[str, Any], source: Source, config: Any, folder: Path, intervene: Path | None = None
) -> None:
    from .output import print_line

    changed = {k: v for k, v in loading.items() if v not in ("auto", False)}
    asked = {**source.arguments(), **({"seq_len": source.seq_len} if source.seq_len else {})}
    print_line("import headscope as hs")
    print_line("from headscope import corpus, runs, scan\n")
    print_line(f"scope = hs.load({_call(*([model] if model else []), **changed)})")
    print_line(f"sequences = corpus.read_sequences(scope.tokenizer, {_call(**asked)})")
    if intervene is None:
        print_line(f"runs.write_run(scan.scan(scope, sequences, scan.{config!r}), {str(folder)!r})")
        return
    print_line("from pathlib import Path\n\nfrom headscope.interventions.base import from_yaml\n")
    print_line(f"with scope.intervene(from_yaml(Path({str(intervene)!r}))):")
    print_line(f"    data = scan.scan(scope, sequences, scan.{config!r})")
    print_line(f"runs.write_run(data, {str(folder)!r})")


def _call(*args: Any, **named: Any) -> str:
    return ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in named.items())])
