"""Speed and exactness of the kernels on one NVIDIA GPU, in one table.

    python benchmarks/kernels.py                          # everything, results under benchmarks/results/
    python benchmarks/kernels.py --lengths 8192 --skip-model --skip-long

Shape: one sequence, 32 query heads, 8 kv heads, bf16, causal. Times are medians (``triton.testing.do_bench``, of three
runs where one takes more than 0.1 s). TFLOP/s counts the products a kernel must do: 2 D per pair of a query and a key
it may see for one look at q k^T, 4 D for a forward pass. On a CPU see
``benchmarks/chunked.py`` (one layer) and ``benchmarks/capture.py`` (a model).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

# transformers looks for a package called kernels and would take this file for it: the root stands in for the folder.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import prefill  # noqa: E402
from benchmarks.exactness import against_float64, million  # noqa: E402
from benchmarks.operators import HEADS, KV_HEADS, edits, operators, peers  # noqa: E402
from benchmarks.operators import MEASURED as FUSED  # noqa: E402
from headscope.kernels.call import AttentionCall  # noqa: E402
from headscope.kernels.forward import forward  # noqa: E402
from headscope.kernels.visibility import Visibility  # noqa: E402

LONG = 100.0  # milliseconds from which three runs must do


@dataclass
class Line:
    """One line of the table; ``error`` says why there is no time."""

    length: int
    width: int
    name: str
    ms: float = float("nan")
    over_cudnn: float = float("nan")
    tflops: float = float("nan")
    peak_mib: float = float("nan")
    error: str = ""


def make(length: int, width: int, dtype: torch.dtype = torch.bfloat16) -> AttentionCall:
    """A causal call of random numbers."""
    random = torch.Generator("cuda").manual_seed(length + width)

    def tensor(heads: int) -> Tensor:
        return torch.randn(1, heads, length, width, device="cuda", dtype=dtype, generator=random)

    return AttentionCall(tensor(HEADS), tensor(KV_HEADS), tensor(KV_HEADS), width**-0.5, Visibility(right=0))


def once(run: Callable[[], object]) -> float:
    """Milliseconds of one run."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def timed(run: Callable[[], object]) -> float:
    """Median milliseconds after a first run."""
    run()
    torch.cuda.synchronize()
    first = once(run)
    if first > 5 * LONG:
        return first
    if first > LONG:
        return sorted((first, once(run), once(run)))[1]
    return triton.testing.do_bench(run, warmup=20, rep=max(60, 5 * first), return_mode="median")


def measure(length: int, width: int, with_peers: bool, with_edits: bool) -> list[Line]:
    """All operators at one length and head dim."""
    call = make(length, width)
    lse = forward(call)[1]
    lines: list[Line] = []
    table = operators(call, lse) | (edits(call) if with_edits else {})
    # FlexAttention compiles for every plan and length: one length must do.
    table |= peers(call, lse, length == 32768) if with_peers else {}
    work = 2.0 * width * HEADS * length * (length + 1) / 2
    for name, (looks, run) in table.items():
        line = Line(length, width, name)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            line.ms = timed(run)
            line.tflops = looks * work / line.ms / 1e9
            line.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as error:  # out of memory included; the other lines stand without it
            line.error = type(error).__name__ + ": " + (str(error).splitlines() or ["?"])[0][:80]
        lines.append(line)
        line.over_cudnn = line.ms / lines[0].ms
    return lines


def precompile(width: int, part: int, parts: int) -> None:
    """Compile every ``parts``-th operator by running it on a short text; the compiled kernels are kept on disk."""
    call = make(2048, width)
    lse = forward(call)[1]
    table = operators(call, lse) | (edits(call) | peers(call, lse, True) if width == 128 else {})
    for n, (_, run) in enumerate(table.values()):
        if n % parts == part:
            try:
                run()
            except Exception as error:  # it is reported when it is measured
                print(f"compiling: {error!r:.120}", flush=True)


def table(lines: list[Line]) -> str:
    """Markdown."""
    out = ["| L | D | operator | ms | × cuDNN | TFLOP/s | extra MiB |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for x in lines:
        rate = f"{x.tflops:.0f}" if x.tflops else "–"
        numbers = f"{x.ms:.3f} | {x.over_cudnn:.2f} | {rate} | {x.peak_mib:.0f}"
        out.append(f"| {x.length:,} | {x.width} | {x.name} | {x.error or numbers}{' | | |' if x.error else ''} |")
    return "\n".join(out)


def hardware() -> dict[str, str]:
    """Names and versions behind the numbers."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--skip-model", action="store_true", help="no whole-model prefill")
    parser.add_argument("--skip-long", action="store_true", help="no 1 M tokens")
    parser.add_argument("--skip-peers", action="store_true", help="no FlexAttention and dense torch")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile kernels beforehand (0: none)")
    parser.add_argument("--only-compile", action="store_true", help="fill the cache of compiled kernels and stop")
    parser.add_argument("--output-path", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


class Run:
    """What has been measured so far, written to disk after every step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin, self.lines = options, time.time(), []
        self.results: dict = {"hardware": hardware(), "operators": [], "exactness": [], "million": {}, "prefill": []}
        options.output_path.mkdir(parents=True, exist_ok=True)

    def save(self, *shown: object) -> None:
        """Write both files and print what is new."""
        self.results["operators"] = [asdict(x) for x in self.lines]
        name = self.results["hardware"]["gpu"].lower().replace(" ", "-")
        (self.options.output_path / f"kernels-{name}.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.options.output_path / f"kernels-{name}.md").write_text(report(self.results, self.lines))
        print(*shown, f"[{time.time() - self.begin:.0f} s]", flush=True)

    def compile(self) -> None:
        """Compile every kernel, several at a time."""
        jobs = self.options.jobs
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            turns = [(w, n) for w in self.options.widths for n in range(2 * jobs)]
            for job in [pool.submit(precompile, w, n, 2 * jobs) for w, n in turns]:
                job.result()
        self.save("compiled")

    def operators(self, width: int) -> None:
        """All lengths of one head dim."""
        for length in self.options.lengths:
            peers_too = not self.options.skip_peers and width == 128 and length <= 32768
            self.lines += measure(length, width, peers_too, with_edits=width == 128 and length <= 32768)
            self.save(table([x for x in self.lines if (x.length, x.width) == (length, width)]))
        self.results["exactness"].append(against_float64(make(min(self.options.lengths[-1], 32768), width)))
        self.save(self.results["exactness"][-1])

    def model(self) -> None:
        """Whole prefills."""
        for length in self.options.lengths:
            self.results["prefill"] += prefill.measure(length)
            self.save(prefill.table(self.results["prefill"]))
        prefill.release()

    def long(self) -> None:
        """A million tokens of one layer."""
        self.results["million"] = million(make(1 << 20, 128), FUSED)
        self.save(self.results["million"])


def main() -> None:
    """Everything that the options leave in."""
    run = Run(arguments())
    if run.options.jobs:
        run.compile()
    if run.options.only_compile:
        return
    run.operators(run.options.widths[0])
    if not run.options.skip_model:
        run.model()
    for width in run.options.widths[1:]:
        run.operators(width)
    if not run.options.skip_long:
        run.long()


def report(results: dict, lines: list[Line]) -> str:
    """The committed Markdown page."""
    facts = ", ".join(f"{k} {v}" for k, v in results["hardware"].items())
    exact = "\n".join(
        f"- L = {x['length']:,}, D = {x['width']}: " + ", ".join(f"{n} {e:.1e}" for n, e in x["errors"].items())
        for x in results["exactness"]
    )
    return (
        f"# Kernels on {results['hardware']['gpu']}\n\n{facts}\n\nOne sequence, 32 query heads, 8 kv heads, bf16, "
        "causal; written by `python benchmarks/kernels.py`.\n\n"
        f"{table(lines)}\n\n## Relative error (norm) against float64, lse from cuDNN\n\n{exact}\n\n"
        f"## Prefill of a 7 B Llama shape, random weights\n\n{prefill.table(results['prefill'])}\n\n"
        f"## One layer at 1,048,576 tokens\n\n```json\n{json.dumps(results['million'], indent=1)}\n```\n"
    )


if __name__ == "__main__":
    main()
