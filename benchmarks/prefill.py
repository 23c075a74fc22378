"""Whole-model prefill of a 7 B Llama shape with random weights: plain, and with every head's statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

from benchmarks.exactness import zipf
from headscope import Scope
from headscope.kernels.call import AttentionCall
from headscope.kernels.forward import forward
from headscope.kernels.request import ColumnSum, KeySet, Request
from headscope.kernels.sweep import sweep
from headscope.kernels.visibility import Visibility

REQUEST = Request(
    rows=frozenset({"entropy"}),
    clipped={"clipped_distance_64": 64},
    masses={"mass_first4": KeySet(first=4), "mass_recent64": KeySet(recent=64)},
    columns={"received": ColumnSum()},
)
NAMES = ["entropy", "clipped_distance_64", "mass_first4", "mass_recent64", "received"]
# From this length one run must do, after shorter ones have warmed everything up.
LONG = 65536
_means: list[torch.Tensor] = []


def _measured(module, query, key, value, mask, scaling=None, **_):
    """Attention plus all statistics, nothing else: what the kernels alone add to a model."""
    call = AttentionCall(query, key, value, scaling, Visibility(right=0))
    out, lse = forward(call)
    found = sweep(call, REQUEST, lse)
    _means.append(torch.stack([x.mean(-1) for x in found.values()]))
    return out.transpose(1, 2).contiguous(), None


@lru_cache(maxsize=1)
def model() -> LlamaForCausalLM:
    """7.2 B parameters in bf16."""
    AttentionInterface.register("measured", _measured)
    AttentionMaskInterface.register("measured", sdpa_mask)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        net = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return net


def release() -> None:
    """Free the model's memory."""
    model.cache_clear()
    torch.cuda.empty_cache()


@torch.no_grad()
def measure(length: int) -> list[dict]:
    """Seconds of one prefill: plain, kernels only (up to 65,536 tokens), through Scope, and with the default set."""
    net = model()
    ids = zipf(length)

    def plain() -> None:
        _means.clear()
        net(ids, use_cache=False, logits_to_keep=1)

    def through_scope(names: list[str]) -> Callable[[], object]:
        return lambda: scope.run_with_stats(ids, names, use_cache=False, logits_to_keep=1)

    net.set_attn_implementation("sdpa")
    lines = [_line(length, "plain", plain)]
    if length < LONG:
        net.set_attn_implementation("measured")
        lines.append(_line(length, "4 row statistics + received, kernels only", plain))
        if len(_means) != 32 or not bool(torch.stack(_means).isfinite().all()):
            raise RuntimeError(f"Expected finite statistics of 32 layers; found {len(_means)}.")
        net.set_attn_implementation("sdpa")
    scope = Scope(net, check=False)
    lines.append(_line(length, "4 row statistics + received, Scope.run_with_stats", through_scope(NAMES)))
    more = through_scope(["default", "received"])
    lines.append(_line(length, "the 12 default statistics + received, Scope.run_with_stats", more))
    for line in lines:
        line["over_plain"] = line["seconds"] / lines[0]["seconds"]
    return lines


def _line(length: int, name: str, run: Callable[[], object]) -> dict:
    """Best of up to three runs after a first one; of a long prefill one run."""
    try:
        return {"length": length, "name": name, **_timed(run, warm=length < LONG)}
    except Exception as error:  # the other lines stand without it
        return {"length": length, "name": f"{name} failed: {error!r:.150}", "seconds": float("nan")}


def _timed(run: Callable[[], object], warm: bool) -> dict[str, float]:
    if warm:
        run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while not times or (warm and len(times) < 3 and sum(times) < 4):
        begin = time.time()
        run()
        torch.cuda.synchronize()
        times.append(time.time() - begin)
    return {"seconds": min(times), "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def table(lines: list[dict]) -> str:
    """Markdown."""
    out = ["| L | prefill | s | × plain | peak GiB |", "| --- | --- | --- | --- | --- |"]
    for x in lines:
        over, peak = x.get("over_plain", float("nan")), x.get("peak_gib", float("nan"))
        out.append(f"| {x['length']:,} | {x['name']} | {x['seconds']:.3f} | {over:.2f} | {peak:.1f} |")
    return "\n".join(out)
