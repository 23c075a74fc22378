"""Start a scan or a sweep from the app."""

from __future__ import annotations

import shlex
from typing import Any

import streamlit as st

from ..errors import HeadscopeError, UserError
from ..experiments.sweep import ORDERS, Sweep, make_sweep
from ..mapchoice import read_choice
from . import common, launch, live, state, theme

_KINDS = {"scan": "Scan a text", "prune": "Remove heads step by step", "leave-one-out": "Remove each head alone"}
_TEXTS = {"demo": "The demo text", "own": "A text of my own", "file": "A file"}
_PROBES = {"default": "The usual ones", "default,retrieval": "The usual ones and retrieval heads (slower)"}
_TASKS = ("niah{lengths: [256], needles: 1}", "passkey", "repeats", "capitals", "ppl")
_MAPS = "L5H1, L5H0-3 or top4:induction_score"
_FIELDS = {
    "scan": ("source", "sample", "probes", "seqlen", "limit", "maps", "newrun"),
    "prune": ("tasks", "rank", "k", "order", "seeds", "batch", "newsweep"),
    "leave-one-out": ("tasks", "heads", "batch", "newsweep"),
}
_RANKINGS = ("retrieval", "induction", "sink", "importance")


def draw() -> None:
    """This part of the Experiments page."""
    st.caption(
        "The work runs beside the app as a process of its own: it goes on if this page is closed or the app stopped, "
        "and what a cancelled sweep has measured is kept."
    )
    if not common.parse().jobs:
        st.info("This app is open to the network, so jobs cannot be started here: start it with --allow-jobs.")
    kind = state.select("What", "kind", list(_KINDS), "scan", format_func=_KINDS.get)
    model = model_name()
    try:
        job, files = _scan_form(model) if kind == "scan" else (_sweep_form(model, kind), {})
    except HeadscopeError as error:
        st.error(common.plain(str(error)))
    else:
        st.code(job["command"], language="sh", wrap_lines=True)
        if st.button("Start", type="primary", icon=":material/play_arrow:", disabled=not common.parse().jobs):
            _start(job, files)
    state.show(part="new", kind=kind, **_address(kind))
    root = theme.short_path(launch.home(common.parse()))
    common.facts_footer([("Model", model or live.EMBEDDED), ("Device", common.parse().device), ("Runs go to", root)])


def _address(kind: str) -> dict[str, Any]:
    """The fields of the form as the page's link holds them; an uploaded file stays out of it."""
    said = {name: state.recall(name, None) for name in _FIELDS[kind]}
    return {k: state.joined(v) if isinstance(v, list) else v for k, v in said.items()}


def model_name() -> str | None:
    """The model that new work is about: as the command line says, else that of the run shown; None: the embedded."""
    arguments = common.parse()
    entry = common.shown()
    return arguments.model if entry is None else live.reference(entry, arguments)


def demo_job(output: str = "demo") -> dict[str, Any]:
    """A scan of the demo text by the embedded model."""
    return _scan_job(None, {"demo": True, "probes": ["default"]}, output)


def start(job: dict[str, Any], files: dict[str, bytes] | None = None) -> None:
    """Start a job into a new folder of the runs.

    Raises:
        UserError: As `launch.start` and `launch.free_name`.
    """
    root = launch.home(common.parse())
    path = launch.free_name(root, job["output"]) if not job.get("resume") else root / job["output"]
    before, _, after = job["command"].rpartition(f"-o {shlex.quote(job['output'])}")
    command = f"{before}-o {shlex.quote(str(path))}{after}"
    launch.start(root, job | {"output": str(path), "command": command}, files)


def _start(job: dict[str, Any], files: dict[str, bytes]) -> None:
    try:
        start(job, files)
    except UserError as error:
        st.error(common.plain(str(error)))
        return
    st.rerun()


def _scan_form(model: str | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    left, right = st.columns(2, gap="large")
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    with left:
        source = state.segmented("Text", "source", list(_TEXTS), "demo", format_func=_TEXTS.get)
        if source == "own":
            fields["text"] = state.area("Text to read", "sample", "", height=120, max_chars=500_000)
        elif source == "file":
            given = st.file_uploader("A .txt, .jsonl, .json or .csv file", type=["txt", "md", "jsonl", "json", "csv"])
            if given is not None:
                fields["file"] = f"text.{given.name.rsplit('.', 1)[-1]}"
                files[fields["file"]] = given.getvalue()
        else:
            fields["demo"] = True
        fields["maps"] = _maps()
    with right:
        probes = state.select("Probes", "probes", list(_PROBES), "default", format_func=_PROBES.get)
        fields["probes"] = probes.split(",")
        a, b = st.columns(2)
        with a:
            fields["seq_len"] = state.count("Longest sequence, tokens", "seqlen", 8, 1 << 20, 1024)
        with b:
            fields["limit"] = state.count("At most so many sequences", "limit", 1, 10_000, 16)
    name = _name("Call the run", "run", "scan")
    if not any(fields.get(k) for k in ("text", "file", "demo")):
        raise UserError("Write a text, or choose a file.")
    return _scan_job(model, fields, name), files


def _scan_job(model: str | None, fields: dict[str, Any], name: str) -> dict[str, Any]:
    said = ["headscope", "scan", *([model] if model else [])]
    said += ["--demo"] if fields.get("demo") else []
    said += ["--text", fields["text"]] if fields.get("text") else []
    said += ["--data", fields["file"]] if fields.get("file") else []
    said += ["--probes", ",".join(fields["probes"])] if fields["probes"] != ["default"] else []
    for key, flag in (("seq_len", "--seq-len"), ("limit", "--limit"), ("maps", "--maps")):
        said += [flag, str(fields[key])] if fields.get(key) else []
    command = shlex.join([*said, "-o", name])
    return _job("scan", model, fields, name, command)


def _sweep_form(model: str | None, kind: str) -> dict[str, Any]:
    left, right = st.columns(2, gap="large")
    fields: dict[str, Any] = {"sweep": kind}
    with left:
        fields["tasks"] = state.several(
            "Tasks", "tasks", list(_TASKS), list(_TASKS[:1]),
            help="niah, passkey, capitals, repeats, ppl; with parameters as niah{lengths: [512], needles: 4}",
        )  # fmt: skip
        if kind == "prune":
            fields["rank_by"] = state.several("Rankings", "rank", list(_RANKINGS), ["retrieval"])
        else:
            fields["heads"] = state.line("Heads", "heads", "L*H*", help="L5H1, L5H0-3, L5H*, L5KV1", max_chars=2_000)
    with right:
        if kind == "prune":
            help_ = "Counts, or start:stop:step"
            fields["k"] = state.line("How many heads", "k", "0,1,2,4,8", help=help_, max_chars=2_000)
            fields["order"] = state.several("Order", "order", list(ORDERS), ["desc", "random"], new=False)
            fields["seeds"] = state.count("Random draws", "seeds", 1, 100, 10)
    with left if kind == "prune" else right:
        fields["batch_size"] = state.count("Sequences per forward", "batch", 1, 256, 8)
    name = _name("Call the sweep", "sweep", "sweep")
    return sweep_job(model, make_sweep(fields), name)


def sweep_job(model: str | None, sweep: Sweep, name: str, resume: bool = False) -> dict[str, Any]:
    """A sweep as a job, with the command that does the same."""
    said = ["headscope", "sweep", sweep.kind, *([model] if model else [])]
    plain, usual = sweep.to_dict(), type(sweep)().to_dict()
    for field, value in plain.items():
        if field == "sweep" or (field != "tasks" and value == usual[field]):
            continue
        value = [t.label for t in sweep.tasks] if field == "tasks" else value
        said += [f"--{field.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    command = shlex.join([*said, "-o", name, *(["--resume"] if resume else [])])
    return _job("sweep", model, plain, name, command) | {"resume": resume}


def _job(kind: str, model: str | None, fields: dict[str, Any], name: str, command: str) -> dict[str, Any]:
    device = common.parse().device
    return {"kind": kind, "model": model, "device": device, "fields": fields, "output": name, "command": command}


def _maps() -> str:
    """Heads whose queries and keys the run is to hold."""
    note = "Stores their queries and keys, so that these maps can be drawn later without the model. Empty: none."
    said = state.line("Store the maps of heads", "maps", "", help=note, placeholder=_MAPS, max_chars=500).strip()
    if said:
        read_choice(said)
    return said


def _name(label: str, what: str, usual: str) -> str:
    root = launch.home(common.parse())
    note = f"A folder in {common.plain(theme.short_path(root))}"
    return launch.free_name(root, state.line(label, f"new{what}", usual, max_chars=80, help=note)).name
