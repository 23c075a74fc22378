"""Heads that a run carries: their maps are the model's own, or they are refused; files that do not fit are not read."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_kit import tiny_scope
from fake_run import fake_run
from oracle import dense_maps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from torch import nn

from headscope import cli, mapchoice, runs, storedmaps, storing
from headscope.corpus import Sequence
from headscope.errors import ResultFormatError, UserError
from headscope.interventions.ablate import Ablate
from headscope.interventions.window import Window
from headscope.kernels.sweep import naive
from headscope.loading import load
from headscope.mapchoice import read_choice
from headscope.rundata import RunData
from headscope.runs import read_run, write_run
from headscope.scan import ScanConfig, scan
from headscope.scope import Scope
from headscope.spread import Spread
from headscope.storedmaps import FILE, StoredHead, StoredMaps


def texts(*lengths: int, vocabulary: int = 20) -> list[Sequence]:
    """Made-up sequences."""
    gen = torch.Generator().manual_seed(0)
    return [Sequence(torch.randint(3, vocabulary, (n,), generator=gen), f"made {n}") for n in lengths]


def scanned(scope: Scope, sequences: list[Sequence], **config: Any) -> RunData:
    return scan(scope, sequences, ScanConfig(**{"probes": (), "batch_size": 2} | config))


def written(data: RunData, folder: Path) -> RunData:
    """The run as it is read back."""
    return read_run(write_run(data, folder / "run", report=False))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral", "gpt2", "deepseek_v3", "bloom", "bert"])
def test_stored_maps_are_the_eager_maps(name: str, tiny: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Every head of both sequences of a padded batch, whole and in pieces, against float64 eager maps."""
    scope, sequences = Scope(tiny(name)), texts(41, 17)
    maps = written(scanned(scope, sequences, maps="L*H*", maps_sequences=2), tmp_path).maps
    assert maps.heads == [f"L{i}H{h}" for i, x in enumerate(scope.layers) for h in range(x.heads)]
    assert {e.form for e in maps.entries} == ({"pattern"} if name == "bloom" else {"qk"})
    for number, sequence in enumerate(sequences):
        truth, _ = dense_maps(scope.model, {"input_ids": sequence.ids[None]})
        for layer, found in enumerate(truth):
            for head in range(found.maps.shape[1]):
                want = found.maps[0, head].float()
                got = maps.tile((layer, head), sequence=number)
                torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
                piece = maps.tile((layer, head), range(9, 16), range(3, 12), sequence=number)
                torch.testing.assert_close(piece, want[9:16, 3:12], atol=1e-5, rtol=0)
                pooled = maps.tile((layer, head), size=(3, 1), sequence=number)
                torch.testing.assert_close(pooled.mean(), want.sum(-1).mean(), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["t5", "bart", "falcon_alibi", "xlnet", "mpt", "deepseek_v32"])
def test_odd_families_are_exact_or_left_out(name: str, tiny: Callable[..., nn.Module]) -> None:
    """Encoder-decoder models, position biases and layers that show their map only."""
    scope, (sequence,) = Scope(tiny(name)), texts(23)
    data = scanned(scope, [sequence], maps="L*H*")
    left_out = {x["name"].split(" ")[0] for x in data.info["maps"]["skipped"]}
    heads = {f"L{i}H{h}" for i, x in enumerate(scope.layers) for h in range(x.heads)}
    assert set(data.maps.heads) == heads - left_out and data.maps.heads
    for head in data.maps.heads:
        torch.testing.assert_close(data.maps.tile(head), scope.tile(sequence.ids, head), atol=1e-5, rtol=0)


def test_bfloat16_is_kept_and_keys_are_stored_once(tmp_path: Path) -> None:
    """Two heads of one kv group share their keys; numbers are the model's own, in its own dtype."""
    from families import family

    scope = Scope(family("llama").build().to(torch.bfloat16))
    data = scanned(scope, texts(30), maps="L1H2,L1H3")
    folder = write_run(data, tmp_path / "run", report=False)
    held = load_file(folder / FILE)
    names = {"0/L1H2/query", "0/L1H3/query", "0/L1KV1/key", "0/L1H2/lse", "0/L1H3/lse"}
    assert set(held) == names and held["0/L1KV1/key"].dtype == torch.bfloat16
    assert data.info["maps"]["bytes"] == sum(t.nbytes for t in held.values())
    call = read_run(folder).maps.call("L1H3")
    assert call.shape == (1, 1, 1, 30, 30) and call.scale == pytest.approx(8**-0.5)
    found = read_run(folder).maps.tile("L1H3")
    torch.testing.assert_close(found, naive.pattern(call)[0][0, 0].float(), atol=1e-6, rtol=0)
    # The normaliser that a fused kernel gives in bfloat16 is a little off; the stored one is not.
    torch.testing.assert_close(found, scope.tile(texts(30)[0].ids, "L1H3"), atol=1e-3, rtol=0)


def test_heads_by_rank_and_by_name(tiny: Callable[..., nn.Module]) -> None:
    data = scanned(Scope(tiny("llama")), texts(30), maps="L1H0, top2:entropy,top1:sink_rate", stats=("entropy",))
    best = data.heads.nlargest(2, "entropy")["head_id"].tolist()
    assert data.maps.heads[:1] == ["L1H0"] and set(best) <= set(data.maps.heads) and not data.info["maps"]["skipped"]
    assert read_choice("top3:x,L0H1").parts == ((3, "x"), "L0H1")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("L9H0", "does not exist"),
        ("top:entropy", "top8:retrieval_score"),
        ("top2:nothing", "no column 'nothing'"),
        (" , ", "names no head"),
    ],
)
def test_wrong_heads_are_refused_before_anything_is_measured(
    spec: str, said: str, tiny: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headscope.scan.measure", lambda *a: pytest.fail("measured"))
    with pytest.raises(UserError, match=said):
        scanned(Scope(tiny("llama")), texts(20), maps=spec)


def test_a_ranking_without_a_column_does_not_cost_the_run(tiny: Callable[..., nn.Module]) -> None:
    """With probes the columns are known at the end only."""
    data = scanned(Scope(tiny("llama")), texts(20), maps="top2:nothing,L0H1", probes=("sinks",))
    assert data.maps.heads == ["L0H1"]
    assert data.info["maps"]["skipped"] == [{"name": "top2:nothing", "reason": "the run has no column 'nothing'"}]


def test_the_limit_is_known_before_anything_is_measured(
    tiny: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted beforehand is what is stored; a ranking counts as its worst case."""
    scope, sequences = Scope(tiny("llama")), texts(40, 30)
    data = scanned(scope, sequences, maps="L0H0,L0H1,L1H3", maps_sequences=2)
    need = data.info["maps"]["bytes"]
    assert mapchoice.check(scope, sequences, "L0H0,L0H1,L1H3", 2, 1.0) == need
    assert mapchoice.check(scope, sequences, "top3:entropy", 2, 1.0) >= need
    monkeypatch.setattr("headscope.scan.measure", lambda *a: pytest.fail("measured"))
    with pytest.raises(UserError, match="--maps-gib"):
        scanned(scope, sequences, maps="L0H0,L0H1,L1H3", maps_sequences=2, maps_gib=(need - 1) / mapchoice.GIB)


@pytest.mark.parametrize(("name", "why"), [("bloom", "map, not queries"), ("t5", "bias to the logits")])
def test_long_maps_without_queries_and_keys_are_left_out_and_named(
    name: str, why: str, tiny: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mapchoice, "PATTERN_TOKENS", 20)
    scope = Scope(tiny(name))
    data = scanned(scope, texts(21), maps="L0H1")
    (left_out,) = data.info["maps"]["skipped"]
    assert left_out["name"].startswith("L0H1") and ("bias" in left_out["reason"] or why in left_out["reason"])
    assert not len(data.maps) and mapchoice.check(scope, texts(21), "L0H1", 1, 1e-9) == 0
    back = written(data, tmp_path)
    assert not (tmp_path / "run" / FILE).exists() and not len(back.maps)
    with pytest.raises(UserError, match="headscope scan --maps"):
        back.maps.call("L0H1")


def test_under_an_edit_the_edited_map_is_stored(
    tiny: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edited map itself, a map behind an ablated head, and a refusal where an edited map would be too large."""
    scope, (sequence,) = Scope(tiny("llama")), texts(33)
    plain = scope.tile(sequence.ids, "L1H1")
    for edit, form in ((Window(sinks=1, recent=4, heads="L1H1"), "pattern"), (Ablate("L0H0"), "qk")):
        with scope.intervene(edit):
            data = scanned(scope, [sequence], maps="L1H1")
            want = scope.tile(sequence.ids, "L1H1")
        assert data.maps.entries[0].form == form and not torch.allclose(want, plain, atol=1e-3)
        torch.testing.assert_close(data.maps.tile("L1H1"), want, atol=1e-5, rtol=0)
    monkeypatch.setattr(mapchoice, "PATTERN_TOKENS", 20)
    with scope.intervene(Window(sinks=1, recent=4, heads="L1H1")):
        data = scanned(scope, [sequence], maps="L1H1,L0H1")
    assert data.maps.heads == ["L0H1"] and "edited" in data.info["maps"]["skipped"][0]["reason"]


def test_workers_and_edits_store_the_same(tmp_path: Path) -> None:
    tiny_scope().model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    loading = {"model": str(tmp_path / "tiny"), "device": "cpu"}
    scope, edit = load(**loading), Ablate("L0H0")
    config = ScanConfig(probes=(), maps="top1:entropy,L1H1")
    sequences = texts(9, 12)
    with scope.intervene(edit):
        one = scan(scope, sequences, config)
        two = scan(scope, sequences, config, measure_with=Spread(loading, 1, edit.to_yaml(), threads=1))
    assert one.maps.heads == two.maps.heads and len(one.maps) == 2
    for head in one.maps.heads:
        assert torch.equal(one.maps.tile(head), two.maps.tile(head))


def test_the_model_is_left_as_it_was_and_the_rest_of_the_forward_is_not_run(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("llama")
    ran = []
    hook = model.lm_head.register_forward_hook(lambda *a: ran.append(1))
    try:
        maps, _ = storing.store(Scope(model, check=False), texts(20), "L0H1", 1, 1.0, fake_run(2, 4).heads, quiet)
    finally:
        hook.remove()
    assert maps.heads == ["L0H1"] and len(ran) == 1  # the dry run that numbers the layers
    assert model.__dict__.get("_headscope") is None


def test_edited_maps_beyond_the_room_are_left_out(tiny: Callable[..., nn.Module]) -> None:
    """An edit makes whole maps of what was counted as queries and keys; the run is not lost over it."""
    scope, sequences = Scope(tiny("llama")), texts(300)
    room = mapchoice.check(scope, sequences, "L0H0,L1H1", 1, 1.0) + 4 * 300 * 300
    with scope.intervene(Window(sinks=1, recent=4, heads="L0H0,L1H1")):
        data = scanned(scope, sequences, maps="L0H0,L1H1", maps_gib=room / mapchoice.GIB)
    assert data.maps.heads == ["L0H0"] and data.info["maps"]["bytes"] <= room
    assert "no room" in data.info["maps"]["skipped"][0]["reason"]


def quiet(done: int, total: int, what: str) -> None:
    """Nobody listens."""


def test_a_piece_reads_its_own_rows_and_columns_only(tmp_path: Path) -> None:
    """A file of 1 GiB (of zeros that take no disk): looking at it takes next to no memory."""
    n, d = 1 << 21, 64
    entry = StoredHead(0, 0, 0, 0, n, "qk", 0.125, right=0)
    sizes = {"0/L0H0/query": (n, d), "0/L0KV0/key": (n, d), "0/L0H0/lse": (n,)}
    header: dict[str, Any] = {"__metadata__": {"headscope": _facts([entry.__dict__])}}
    at = 0
    for name, shape in sizes.items():
        end = at + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    path = tmp_path / FILE
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + at)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    maps = storedmaps.read(path, {0: 1}, {0: n})
    piece = maps.tile("L0H0", range(n - 5, n), range(7))
    torch.testing.assert_close(piece, torch.ones(5, 7))  # exp(0 - 0): zeros are no real normaliser
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def _facts(entries: list[dict[str, Any]], **more: Any) -> str:
    return json.dumps({"format": 1, "heads": entries} | more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that carries two heads of one kv group on 20 tokens."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    scope = tiny_scope()
    return write_run(scanned(scope, texts(20), maps="L1H0,L1H1"), folder, report=False)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def _forge(folder: Path, change: Callable[[list[dict], dict[str, torch.Tensor]], str | None]) -> None:
    """Change the file and let run.json vouch for it."""
    tensors = load_file(folder / FILE)
    with safe_open(folder / FILE, "pt") as file:
        entries = json.loads(file.metadata()["headscope"])["heads"]
    facts = change(entries, tensors)
    save_file(tensors, folder / FILE, {"headscope": _facts(entries) if facts is None else facts})
    info = json.loads((folder / "run.json").read_text())
    info["files"][FILE] = runs._facts(folder / FILE)
    (folder / "run.json").write_text(json.dumps(info))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", True, None])
def test_a_scale_that_is_no_number_is_refused(value: Any, copy: Path) -> None:
    _forge(copy, lambda entries, tensors: entries[0].update(scale=value))
    with pytest.raises(ResultFormatError, match=f"{FILE} does not fit its run: L1H0 has scale"):
        read_run(copy)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": -20}, {"tokens": 19}, {"tokens": 2.0}, {"head": 99}, {"head": -1}, {"layer": 7}, {"sequence": 1},
        {"kv": 5}, {"kv": True}, {"softcap": -1.0}, {"left": "3"}, {"q_offset": -1}, {"kv_offset": 1 << 70},
        {"right": 1 << 70}, {"form": "pickle"}, {"name": 3}, {"form": "pattern"}, {"extra": 1}, {"head": 1},
    ],
    ids=str,
)  # fmt: skip
def test_descriptions_that_do_not_fit_the_run_are_refused(wrong: dict[str, Any], copy: Path) -> None:
    _forge(copy, lambda entries, tensors: entries[0].update(wrong))
    with pytest.raises(ResultFormatError, match=FILE):
        read_run(copy)


@pytest.mark.parametrize("name", ["0/L1H0/query", "0/L1KV0/key", "0/L1H1/lse"])
@pytest.mark.parametrize("how", ["gone", "longer", "integers", "flat"])
def test_tensors_that_do_not_fit_the_run_are_refused(name: str, how: str, copy: Path) -> None:
    def change(entries: list[dict], tensors: dict[str, torch.Tensor]) -> None:
        old = tensors.pop(name)
        new = {"longer": torch.cat([old, old]), "integers": old.int(), "flat": old.flatten()[None], "gone": None}[how]
        if new is not None:
            tensors[name] = new

    _forge(copy, change)
    with pytest.raises(ResultFormatError, match=FILE):
        read_run(copy)


@pytest.mark.parametrize("facts", ["", "{}", "[]", '{"format": 2, "heads": []}', '{"format": 1, "heads": [3]}'])
def test_headers_that_say_nothing_are_refused(facts: str, copy: Path) -> None:
    _forge(copy, lambda entries, tensors: facts)
    with pytest.raises(ResultFormatError, match=FILE):
        read_run(copy)


def test_a_tensor_that_nothing_describes_is_refused(copy: Path) -> None:
    _forge(copy, lambda entries, tensors: tensors.update(more=torch.zeros(3)))
    with pytest.raises(ResultFormatError, match="'more'"):
        read_run(copy)


def test_damaged_missing_and_foreign_files_are_named(copy: Path, tmp_path: Path) -> None:
    path = copy / FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ResultFormatError, match=f"{FILE} is not the file that was written"):
        read_run(copy)
    path.unlink()
    with pytest.raises(ResultFormatError, match=f"{FILE} is missing"):
        read_run(copy)
    (tmp_path / "elsewhere").write_bytes(content)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResultFormatError, match="outside the run"):
        read_run(copy)
    path.unlink()
    path.write_bytes(content[:100])
    with pytest.raises(ResultFormatError, match=f"{FILE} cannot be read as safetensors"):
        storedmaps.read(path, {1: 4}, {0: 20})


def test_a_file_that_vanishes_later_is_named(copy: Path) -> None:
    maps = read_run(copy).maps
    (copy / FILE).unlink()
    with pytest.raises(ResultFormatError, match=FILE):
        maps.tile("L1H0")


def test_runs_without_maps_and_runs_that_are_replaced(copy: Path, tmp_path: Path) -> None:
    """A run without the file is read as before; one with it is copied and replaced like any other."""
    plain = read_run(write_run(fake_run(), tmp_path / "plain", report=False))
    assert not len(plain.maps) and plain.maps.heads == [] and repr(plain.maps) == "StoredMaps(none)"
    data = read_run(copy)
    other = read_run(write_run(data, tmp_path / "other", report=False))
    assert repr(other.maps) == "StoredMaps(L1H0, L1H1; sequence 0)"
    assert torch.equal(other.maps.tile("L1H0"), data.maps.tile("L1H0"))
    again = read_run(write_run(data, copy, overwrite=True, report=False))
    assert "L1H1" in again.maps and torch.equal(again.maps.tile("L1H1"), other.maps.tile("L1H1"))
    write_run(plain, copy, overwrite=True, report=False)
    assert not (copy / FILE).exists()


@pytest.mark.parametrize("wrong", [{"rows": range(5, 30)}, {"cols": range(0)}, {"head": "L0H0"}, {"sequence": 3}])
def test_what_is_not_there_is_named(wrong: dict[str, Any], copy: Path) -> None:
    with pytest.raises(UserError, match="within 0..20|Stored: L1H0, L1H1"):
        read_run(copy).maps.tile(**{"head": "L1H0"} | wrong)
    with pytest.raises(UserError, match="names 2"):
        read_run(copy).maps.tile("L1H0-1")


def test_maps_must_be_of_heads_in_the_table(tmp_path: Path) -> None:
    data = fake_run(2, 2)
    data.maps = StoredMaps([StoredHead(0, 5, 0, 0, 90, "qk", 1.0)], {"0/L5H0/query": torch.zeros(90, 2)})
    with pytest.raises(ResultFormatError, match="L5H0"):
        write_run(data, tmp_path / "run")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of a dry run, the program that does the same, and what a scan says."""
    monkeypatch.chdir(tmp_path)
    tiny_scope().model.save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")

    def run(*more: str) -> str:
        text = " ".join(f"w{i % 9}" for i in range(30))
        with pytest.raises(SystemExit) as left:
            cli.main(["scan", "tiny", "--text", text, "--probes", "", "--maps", "L1H1,top1:entropy", *more])
        assert not left.value.code
        return capsys.readouterr().out

    assert json.loads(run("--dry-run", "--json"))["maps_bytes"] > 0
    assert "maps='L1H1,top1:entropy'" in run("--show-python", "-o", "made")
    said = json.loads(run("--json", "-o", "made"))
    stored = read_run("made")
    assert said["maps"]["heads"] == stored.maps.heads and "L1H1" in stored.maps and said["maps"]["skipped"] == []
    assert stored.info["files"][FILE]["bytes"] > said["maps"]["bytes"] == stored.info["maps"]["bytes"]
    assert "Maps:   L1H1" in run("-o", "made", "--overwrite")
