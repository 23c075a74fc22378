"""The main job: sequences in, a run out. Exact statistics of every head, the probes' findings, a row per token."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from . import mapchoice, nexttoken, storing
from .corpus import Sequence
from .errors import CaptureMismatch, UserError
from .inputs import pad
from .names import COLUMN_NAMES, DEFAULT, DEFINITIONS, expand
from .provenance import model_facts, versions
from .registry import find_probe
from .rundata import SCHEMA_VERSION, RunData
from .sampling import sample_of
from .scope import Scope
from .scores import HeadScores
from .stats import Stats
from .storedmaps import StoredMaps

Progress = Callable[[int, int, str], None]

# Per-token values a scan keeps in memory until the local and global heads are known.
KEPT = ("received_mean", "future")
KEPT_BYTES = 4 << 30
DEFAULT_PROBES = ("sinks", "local_global", "previous_token", "duplicate_token", "induction", "rhythm")
# Pattern probes read the same two forwards of repeated random tokens; they are measured together. Where the model has
# no room for those tokens the scan says so and goes on.
PATTERNS = {"previous_token": "previous", "duplicate_token": "duplicate", "induction": "induction"}
COLUMN_OF = {"retrieval": "retrieval_score"}

TOKEN_DEFINITIONS = {
    "received_mean": "mean over all heads and layers of the attention a token receives, divided by the number of real "
    "queries that may see it",
    "waad": "mean of clipped_distance over the local heads (arXiv:2510.13554 eq. 9, W = 10)",
    "fai": "mean of future over the global heads: attention from tokens 10 to 100 later (arXiv:2510.13554 v2 eq. 10)",
    "entropy_next": "entropy in nats of the model's distribution for the token after this one; null for encoders",
    "label": "preplan: local maximum of waad; anchor: local maximum of fai; both; none",
}
TITLES = {
    "sink_rate": ("Attention sinks", "sink"),
    "hidden_sinks": ("Heads with later sinks", "hidden sink"),
    "repeat_previous": ("Previous-token heads", "previous token"),
    "repeat_duplicate": ("Duplicate-token heads", "duplicate token"),
    "repeat_induction": ("Induction heads", "induction"),
    "retrieval_score": ("Retrieval heads", "retrieval"),
    "echo_mass": ("Echo heads", "echo"),
    "razor": ("Heads that RazorAttention keeps whole", "kept whole"),
    "streaming_gate": ("Heads that need their whole cache", "full cache"),
    "dormant": ("Dormant heads", "dormant"),
    "value_drain": ("Heads with an empty first value", "value drain"),
    "learned_sink": ("Heads that rest on a learned slot", "learned sink"),
    "sink_angle": ("Queries that point at the first key", "sink angle"),
    "positional": ("Positional heads", "positional"),
    "delimiter_excess": ("Delimiter heads", "delimiter"),
    "no_op": ("Heads that do nothing", "no-op"),
    "normalised_entropy": ("Entropy relative to uniform attention", "entropy"),
    "document_score": ("Document heads", "document"),
    "vote_influence": ("Influence on a shared set of tokens", "vote"),
    "ov_copying": ("Copying heads", "copying"),
    "k_composition": ("Composition with earlier heads through keys", "composition"),
    "aggregation": ("Heads under whose columns a text stands", "aggregation"),
}


@dataclass(frozen=True)
class ScanConfig:
    """What a scan measures.

    Attributes:
        stats: Statistic names or groups; the default set is always measured.
        probes: Probe names; ``default`` stands for sinks, local_global, previous_token, duplicate_token, induction
            and rhythm.
        batch_size: Sequences per forward.
        seed: Seed of everything drawn at random.
        rows: Estimate averages from this fraction of the query rows (``1/16``); empty: from all, exactly. What the
            token table needs is exact either way.
        maps: Heads whose maps the run carries: ``L5H1,L2H0-3``, or ``top4:induction_score`` for a column's highest.
        maps_sequences: Of how many sequences, the first ones.
        maps_gib: Most GiB that these may take.
    """

    stats: tuple[str, ...] = ("default",)
    probes: tuple[str, ...] = ("default",)
    batch_size: int = 1
    seed: int = 0
    rows: str = ""
    maps: str = ""
    maps_sequences: int = 1
    maps_gib: float = 2.0

    def probe_names(self) -> list[str]:
        """Probe names with ``default`` written out, without repeats."""
        names = [n for p in self.probes for n in (DEFAULT_PROBES if p == "default" else (p,))]
        return list(dict.fromkeys(names))


def scan(
    scope: Scope,
    sequences: list[Sequence],
    config: ScanConfig = ScanConfig(),
    progress: Progress | None = None,
    measure_with: Callable[..., tuple[Stats, list[Tensor] | None]] | None = None,
) -> RunData:
    """Measure a model on sequences and put everything a run holds together (nothing is written).

    Args:
        scope: The model.
        sequences: Token ids with their source (see ``headscope.corpus``).
        config: What to measure.
        progress: Called as ``progress(done, total, what)``.
        measure_with: What measures the sequences instead of this process (see ``headscope.spread.Spread``).

    Raises:
        UserError: For unknown names, no sequences, or sequences whose per-token values or maps do not fit.
        CaptureMismatch: If a statistic is not a number.
    """
    started = time.perf_counter()
    tell = progress or (lambda done, total, what: None)
    names = tuple(dict.fromkeys([*DEFAULT, *expand(config.stats)]))
    infos = [find_probe(n) for n in config.probe_names()]
    if not sequences:
        raise UserError("There are no sequences to measure.")
    _check_room(scope, sequences)
    storage = (config.maps, config.maps_sequences, config.maps_gib)
    if config.maps:
        mapchoice.check(scope, sequences, *storage, () if infos else (*names, "sink_rate", "local_global"))
    sample = str(sample_of(config.rows)) if config.rows else ""
    timings = {}
    stats, entropy = (measure_with or measure)(scope, sequences, (*names, *KEPT), config.batch_size, tell, sample)
    timings["statistics"] = time.perf_counter() - started

    scores = _text_scores(stats)
    notes: dict[str, Any] = {}
    for i, info in enumerate(infos):
        tell(i, len(infos), f"probe {info.name}")
        if info.name in PATTERNS:
            if not notes.keys() & PATTERNS.keys():
                _run_patterns(scope, [x.name for x in infos if x.name in PATTERNS], scores, notes, config.seed)
        else:
            _run_probe(scope, stats, info, scores, notes, config.seed, tell)
    tell(len(infos), len(infos), "probes")
    tokens = token_table(scope, stats, entropy, scores["local_global"])
    heads, maps, stored = head_table(stats, names, scores), StoredMaps(), {}
    if config.maps:
        begun = time.perf_counter()
        maps, stored = storing.store(scope, sequences, *storage, heads, tell)
        timings["maps"] = time.perf_counter() - begun
    timings["total"] = time.perf_counter() - started
    columns = {n: _mean_of(n, sample if n in stats.errors else "") for n in names if n in stats.sums}
    columns |= {n: str(s.details.get("definition", "")) for n, s in scores.items()} | TOKEN_DEFINITIONS
    return RunData(
        info={
            "schema_version": SCHEMA_VERSION,
            "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": "",
            "config": asdict(config),
            "sampled_rows": sample,
            "seed": config.seed,
            "dtype": str(scope.model.dtype).removeprefix("torch."),
            "device": str(scope.device),
            "versions": versions(),
            "model": model_facts(scope),
            "refused": [
                {"name": n, "reason": "ran, but in a way that cannot be measured"} for n in scope.survey.silent
            ],
            "sequences": [{"source": s.source, "n_tokens": len(s.ids)} for s in sequences],
            "timings": timings,
            "columns": columns,
            "findings": [_finding(n, s) for n, s in scores.items() if n != "local_global"]
            + _local_global_findings(scores["local_global"]),
            "probes": notes,
            "maps": stored,
        },
        heads=heads,
        tokens=tokens,
        arrays=_arrays(stats),
        maps=maps,
    )


def measure(
    scope: Scope, sequences: list[Sequence], names: tuple[str, ...], batch_size: int, tell: Progress, rows: str = ""
) -> tuple[Stats, list[Tensor] | None]:
    """Statistics of all sequences, and the next-token entropy at each position (None where the model has none)."""
    merged = Stats([])
    found: list[Tensor] = []
    slim = nexttoken.can_shorten(scope.model)
    for start in range(0, len(sequences), batch_size):
        tell(start, len(sequences), "sequences")
        part = sequences[start : start + batch_size]
        batch = pad([s.ids for s in part])
        asked = {"keep_rows": ("clipped_distance",), "rows": rows or None, **_no_cache(scope)}
        if not slim:
            _, stats = scope.run_with_stats(batch, names, **asked)
        else:
            with nexttoken.last_logits_only(scope.model) as hidden:
                out, stats = scope.run_with_stats(batch, names, **asked)
            with torch.no_grad():
                values = nexttoken.entropies(scope.model, hidden[0], out.logits)
            if values is None:
                slim, found = False, []
            else:
                found += [values[i, : len(s.ids)] for i, s in enumerate(part)]
        merged = merged.merge(stats)
    tell(len(sequences), len(sequences), "sequences")
    return merged, found if slim else None


def _no_cache(scope: Scope) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(scope.model.config, "use_cache") else {}


def _check_room(scope: Scope, sequences: list[Sequence]) -> None:
    tokens = sum(len(s.ids) for s in sequences)
    need = tokens * len(scope.layers) * max(x.heads for x in scope.layers) * 4 * 3
    if need > KEPT_BYTES:
        raise UserError(
            f"{tokens:,} tokens of {len(scope.layers)} layers need {need / 2**30:.1f} GiB for per-token values "
            f"(limit {KEPT_BYTES / 2**30:.0f} GiB). Lower --limit or --seq-len."
        )


def _text_scores(stats: Stats) -> dict[str, HeadScores]:
    """The two scores every run has."""
    focus, sinks = import_module("headscope.probes.focus"), import_module("headscope.probes.sinks")
    return {"sink_rate": sinks.sink_rate(stats), "local_global": focus.local_global(_self_layers(stats)[0])}


def _self_layers(stats: Stats) -> tuple[Stats, list[int]]:
    """Statistics of the layers whose queries and keys are the same (last) sequence, and their numbers."""
    side = [i for i, x in enumerate(stats.layers) if x.kind == "self"]
    decoder = [i for i in side if ".decoder." in f".{stats.layers[i].name}."]
    chosen = decoder or side
    return (stats if len(chosen) == len(stats.layers) else stats.select(chosen)), chosen


def _run_probe(
    scope: Scope,
    stats: Stats,
    info: Any,
    scores: dict[str, HeadScores],
    notes: dict[str, Any],
    seed: int,
    tell: Progress,
) -> None:
    fields = getattr(info.cls, "__dataclass_fields__", {})
    probe = info.cls(**{k: v for k, v in {"seed": seed, "progress": tell}.items() if k in fields})
    missing = [n for n in info.needs if n not in stats.sums and n not in stats.columns]
    if missing:
        raise UserError(f"Probe {info.name!r} needs the statistics {', '.join(missing)}: add them to --stats.")
    found = probe.run(scope, _self_layers(stats)[0] if info.reads_text else None)
    notes[info.name] = {"reference": info.reference, **found.details}
    if isinstance(found, HeadScores):
        scores[COLUMN_OF.get(found.name, found.name)] = found


def _run_patterns(
    scope: Scope, names: list[str], scores: dict[str, HeadScores], notes: dict[str, Any], seed: int
) -> None:
    """Pattern scores from the same forwards; a model without room for repeated tokens gets a note instead."""
    patterns = import_module("headscope.probes.patterns")
    try:
        found = patterns.RepeatedTokens(seed=seed).scores(scope, [PATTERNS[n] for n in names])
    except UserError as error:
        notes.update({n: {"not_measured": str(error)} for n in names})
        return
    for name in names:
        score = found[PATTERNS[name]]
        notes[name] = {"reference": find_probe(name).reference, **score.details}
        scores[COLUMN_OF.get(score.name, score.name)] = score


def token_table(scope: Scope, stats: Stats, entropy: list[Tensor] | None, local_global: HeadScores) -> pd.DataFrame:
    """One row per token: received attention, WAAD, FAI, next-token entropy, preplan and anchor labels."""
    rhythm = import_module("headscope.probes.rhythm")
    focus = import_module("headscope.probes.focus")
    side, _ = _self_layers(stats)
    local, global_ = focus.local_global_heads(side["distance"])[:2]
    frame = rhythm.tokens(side, local, global_, entropy)
    tokenizer = scope.tokenizer
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    ids = frame["token_id"].tolist()
    words = {i: _spell(tokenizer, i) for i in set(ids)}
    frame.insert(3, "token", [words[i] for i in ids])
    frame.insert(4, "is_special", [i in special for i in ids])
    return frame


def _spell(tokenizer: Any, token_id: int) -> str:
    """The token as text; SentencePiece drops a leading blank when it decodes a single token, so it is put back."""
    if tokenizer is None:
        return str(token_id)
    text = tokenizer.decode([token_id])
    piece = tokenizer.convert_ids_to_tokens(token_id)
    starts_word = isinstance(piece, str) and piece.startswith("\u2581")
    return f" {text}" if starts_word and not text.startswith(" ") else text


def head_table(stats: Stats, names: tuple[str, ...], scores: dict[str, HeadScores]) -> pd.DataFrame:
    """One row per layer and head: identity, counts, then each statistic and score with its standard error.

    Raises:
        CaptureMismatch: If a statistic of a head is not finite where it should be.
    """
    rows = [(i, h) for i, x in enumerate(stats.layers) for h in range(x.heads)]
    layer, head = (torch.tensor(v) for v in zip(*rows, strict=True))
    table: dict[str, Any] = {
        "layer": layer.numpy(),
        "head": head.numpy(),
        "head_id": [f"L{i}H{h}" for i, h in rows],
        "n_sequences": stats.n_sequences,
        "n_tokens": stats.counts.sum(0)[layer].long().numpy(),
    }
    for name in names:
        if name not in stats.sums:
            continue
        values = stats[name][layer, head]
        wrong = [rows[i] for i in (~values.isfinite()).nonzero().flatten() if stats.layers[rows[i][0]].kind == "self"]
        if wrong:
            raise CaptureMismatch(
                f"{name} of L{wrong[0][0]}H{wrong[0][1]} is not a number ({len(wrong)} heads in all): the model's "
                "attention overflows in this dtype. Try --dtype float32."
            )
        table[name] = values.numpy()
        table[f"{name}_se"] = stats.se(name)[layer, head].numpy()
    _, numbers = _self_layers(stats)
    for name, score in scores.items():
        table[name] = _spread(score.scores, numbers, stats, layer, head)
        se = score.scores * float("nan") if score.se is None else score.se
        table[f"{name}_se"] = _spread(se, numbers, stats, layer, head)
        if isinstance(score.null, Tensor):
            table[f"{name}_null"] = _spread(score.null, numbers, stats, layer, head)
    return pd.DataFrame(table)


def _spread(values: Tensor, numbers: list[int], stats: Stats, layer: Tensor, head: Tensor) -> Any:
    """A score's values in the rows of the table; NaN for layers it was not measured on."""
    if values.shape[0] == len(stats.layers):
        return values.double()[layer, head].numpy()
    full = torch.full((len(stats.layers), values.shape[1]), float("nan"), dtype=torch.float64)
    full[numbers] = values.double()
    return full[layer, head].numpy()


def _mean_of(name: str, sample: str = "") -> str:
    definition = DEFINITIONS.get(name) or next(v for k, v in DEFINITIONS.items() if name.startswith(k))
    note = f" (sampled: estimated from {sample} of the rows)" if sample else ""
    return f"mean over real query tokens i of all sequences of: {definition}{note}"


def _finding(column: str, score: HeadScores) -> dict[str, Any]:
    title, role = TITLES.get(column, (column.replace("_", " ").capitalize(), column.replace("_", " ")))
    null = score.null.nanmean().item() if isinstance(score.null, Tensor) else score.null
    return {
        "column": column,
        "title": title,
        "role": role,
        "threshold": score.threshold,
        "null": null,
        "n": score.n,
        "heads": None if score.threshold is None else [str(h) for h in score.named()],
        "note": score.details.get("definition", ""),
    }


def _local_global_findings(score: HeadScores) -> list[dict[str, Any]]:
    shared = {"column": "local_global", "n": score.n}
    return [
        {**shared, "title": "Global heads", "role": "global", "heads": score.details["global"], "note": "longest 30 %"},
        {**shared, "title": "Local heads", "role": "local", "heads": score.details["local"], "note": "shortest 30 %"},
    ]


def _arrays(stats: Stats) -> dict[str, Tensor]:
    """Attention received by position, per head, of the first sequence, and distance histograms where measured."""
    arrays = {}
    for name, columns in stats.columns.items():
        if COLUMN_NAMES.match(name) and columns:
            arrays[f"{name}.sequence0"] = columns[0].float().contiguous()
    return arrays
