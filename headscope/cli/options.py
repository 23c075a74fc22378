"""Options that several commands share, spelled as in lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or hub id; the embedded model if left out.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
ShowPython = Annotated[bool, typer.Option("--show-python", help="Print the same as Python and stop.")]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output-path", help="The run directory; runs/<model>-<time> if left out.", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the output folder.")]
Text = Annotated[list[str] | None, typer.Option("--text", help="A text to read; may be given several times.")]
Data = Annotated[Path | None, typer.Option("--data", help="A .txt, .jsonl, .json, .csv or .parquet file to read.")]
Demo = Annotated[bool, typer.Option("--demo", help="Read the text that comes with headscope.")]
Stats = Annotated[str, typer.Option(help="Statistics beside the usual ones, comma-separated.")]
Probes = Annotated[str, typer.Option(help="Probes to run, comma-separated (see headscope probes); empty for none.")]
SeqLen = Annotated[int | None, typer.Option(help="Longest sequence in tokens.", show_default="1024, or the model's")]
Rows = Annotated[
    str, typer.Option("--rows", help="Estimate averages from this fraction of the query rows, such as 1/16.")
]
Limit = Annotated[int | None, typer.Option(help="Read at most this many sequences.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Heads = Annotated[str | None, typer.Option(help="Also print all scores of these heads: L5H1, L5H0-3, L*H0 …")]
Intervene = Annotated[
    Path | None, typer.Option("--intervene", help="A YAML file of interventions under which everything is measured.")
]
Maps = Annotated[
    str,
    typer.Option(
        "--maps",
        metavar="HEADS",
        help="Let the run carry the maps of these heads, to be looked at without the model: L5H1, L5H0-3 or "
        "top4:induction_score (the highest of a score).",
        show_default=False,
    ),
]
MapsSequences = Annotated[int, typer.Option("--maps-sequences", min=1, help="Of how many sequences, the first ones.")]
MapsGib = Annotated[float, typer.Option("--maps-gib", help="Most GiB that --maps may take.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Read the text with this many processes, a model each.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be read and needed, and stop.")]


def names(listed: str) -> tuple[str, ...]:
    """The parts of a comma-separated option.

    Example:
        >>> names("entropy, mass,")
        ('entropy', 'mass')
    """
    return tuple(part.strip() for part in listed.split(",") if part.strip())
