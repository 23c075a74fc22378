"""The page of the report: template, styles, scripts and data put together into one document."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..rundata import RunData, conditions
from . import palette
from .columns import Column, columns, number, with_error
from .findings import findings, roles
from .grid import grid, legend
from .payload import MAX_TOKENS, embed, payload, shown_tokens

_FIRST = ("repeat_induction", "induction_score", "retrieval_score", "sink_rate", "entropy")
_MAX_ROWS = 512
_SCRIPTS = ("shared.js", "base.js", "grid.js", "text.js", "table.js", "start.js")
_HERE = Path(__file__).parent


def render(data: RunData) -> str:
    """The report of a run as one HTML document.

    It fetches nothing (a content security policy forbids it), runs no script but its own (the policy names its
    hash), and shows grid, findings, table and definitions also without scripts. Everything that comes from a model,
    a text or a command is escaped or inserted as text. Longer texts are cut after ``MAX_TOKENS`` tokens, and the page
    says so.
    """
    cols = columns(data)
    found = findings(data, cols)
    given = roles(data, found)
    first = _first(cols)
    script = "(() => {\n'use strict';\n" + "".join(_asset(name) for name in _SCRIPTS) + "})();\n"
    return _template().render(
        info=data.info,
        columns=cols,
        findings=found,
        first=first,
        grid=grid(data, first, given),
        legend=legend(first),
        rows=_rows(data, cols, given),
        n_heads=len(data.heads),
        facts=_facts(data),
        provenance=_provenance(data.info),
        conditions=conditions(data.info),
        refused=[r for r in data.info.get("refused") or [] if isinstance(r, dict)],
        shown_tokens=shown_tokens(data),
        n_tokens=len(data.tokens),
        max_tokens=MAX_TOKENS,
        number=number,
        css=Markup(_asset("report.css") + palette.css()),
        data=embed(payload(data, cols, given)),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(_HERE),
    )
    return environment.get_template("page.html")


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _first(cols: list[Column]) -> Column:
    """The score that the grid opens with."""
    by_name = {c.name: c for c in cols if c.known}
    return next((by_name[n] for n in _FIRST if n in by_name), cols[0])


def _rows(data: RunData, cols: list[Column], given: list[list[str]]) -> list[dict[str, Any]]:
    ids = data.heads["head_id"].tolist()[:_MAX_ROWS]
    return [
        {"id": name, "roles": given[i], "cells": [with_error(c.values[i], c.se[i]) for c in cols]}
        for i, name in enumerate(ids)
    ]


def _facts(data: RunData) -> list[tuple[str, str]]:
    """What stands under the title: number and unit."""
    heads = data.heads
    per_layer = sorted({int(n) for n in heads.groupby("layer").size()})
    modules = data.info.get("model", {}).get("layers") or []
    groups = sorted({int(m.get("kv_heads") or 0) for m in modules if isinstance(m, dict)} - {0})
    facts = [(f"{heads['layer'].nunique():,}", "layers"), ("–".join(map(str, per_layer)), "heads each")]
    if groups and groups != per_layer:
        facts.append(("–".join(map(str, groups)), "kv heads"))
    for key, word in (("n_sequences", "sequence"), ("n_tokens", "token")):
        count = int(heads[key].max()) if len(heads) else 0
        facts.append((f"{count:,}", word if count == 1 else f"{word}s"))
    return facts


def _provenance(info: dict[str, Any]) -> list[tuple[str, str]]:
    model = info.get("model", {})
    sources = [str(s.get("source", "")) for s in info.get("sequences") or []]
    more = f" and {len(sources) - 6} more" if len(sources) > 6 else ""
    pairs = [
        ("Model", model.get("name")),
        ("Class", model.get("class")),
        ("Weights SHA-256", model.get("hash")),
        ("dtype, device", ", ".join(str(info[k]) for k in ("dtype", "device") if info.get(k))),
        ("Text", " · ".join(sources[:6]) + more),
        ("Seed", info.get("seed")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in sorted((info.get("versions") or {}).items()))),
        ("Time", ", ".join(f"{k} {_seconds(v)}" for k, v in (info.get("timings") or {}).items())),
        ("Written", info.get("created")),
        ("Command", info.get("command")),
    ]
    return [(k, str(v)) for k, v in pairs if v not in (None, "")]


def _seconds(value: Any) -> str:
    return f"{value:.1f} s" if isinstance(value, int | float) else str(value)
