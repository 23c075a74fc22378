"""How quick and how small the dashboard is, in a real Chromium: first paint, zoom, messages, memory.

python benchmarks/dashboard.py [--visits 500] [--stored RUN]

Prints four figures and writes them to benchmarks/results/dashboard.json. Needs playwright and chromium. The 32k map is
drawn from the live model; with ``--stored`` a run made by ``headscope scan --maps`` is zoomed as well, without a model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LIMITS = {
    "first paint, s": 2.0,
    "zoom step at 32k, s": 1.0,
    "largest message, MB": 5.0,
    "growth over visits, MB": 200.0,
}
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking"
PAGES = ("atlas", "head", "text", "map", "intervene", "experiments")
WAIT = 240_000
# A tile may come quicker than anyone looks: count the moments at which the canvas stops being busy.
_COUNT_TILES = """element => {
  const root = element.getRootNode();  // the component lives in a shadow tree
  window.tiles = 0; let busy = false;
  new MutationObserver(() => {
    const now = !!root.querySelector("canvas.busy");
    if (busy && !now) window.tiles += 1;
    busy = now;
  }).observe(root, {subtree: true, childList: true, attributes: true, attributeFilter: ["class"]});
}"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visits", type=int, default=500)
    parser.add_argument("--stored", type=Path, help="a run that carries maps")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    from headscope.cli import serve

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        _runs(Path(folder))
        if options.stored:
            shutil.copytree(options.stored, Path(folder) / "stored")
        with serve.running([Path(folder)]) as (address, pid):
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
            found = _measure(browser, address, pid, options)
    for name, value in found["figures"].items():
        print(f"{name:28} {value:8.2f}   limit {LIMITS[name]:g}")
    path = ROOT / "benchmarks" / "results" / "dashboard.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _measure(browser: Any, address: str, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    messages: list[int] = []
    page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    page.on("websocket", lambda ws: ws.on("framereceived", lambda frame: messages.append(len(frame))))
    paints = _paints(page, address)
    first, zooms = _zooms(page, address, "long", "L0H3")
    stored = _stored(page, address, options.stored) if options.stored else {}
    page.close()
    growth, memory = _visits(browser, address, pid, options.visits)
    values = (statistics.median(paints), max(zooms), max(messages) / 1e6, growth)
    return stored | {
        "figures": dict(zip(LIMITS, [round(v, 3) for v in values], strict=True)),
        "limits": LIMITS,
        "paints_s": paints,
        "first_picture_of_a_32k_map_s": first,
        "zooms_s": zooms,
        "visits": options.visits,
        "memory_mb": memory,
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()},
    }


def _paints(page: Any, address: str) -> list[float]:
    """Seconds from the request to the first cell of the atlas, warm."""
    times = []
    for i in range(7):
        start = time.monotonic()
        page.goto(f"{address}/?run=short")
        page.wait_for_selector(".cell", timeout=WAIT)
        if i > 1:
            times.append(round(time.monotonic() - start, 3))
    return times


def _stored(page: Any, address: str, run: Path) -> dict[str, Any]:
    """The same for the first head whose map a run carries."""
    from headscope.runs import read_run

    data = read_run(run)
    head, tokens = str(data.maps.heads[0]), int((data.tokens["sequence"] == 0).sum())
    first, zooms = _zooms(page, address, "stored", head)
    facts = {"head": head, "tokens": tokens, "first_picture_s": first, "zooms_s": zooms}
    return {"stored_map": facts}


def _zooms(page: Any, address: str, run: str, head: str) -> tuple[float, list[float]]:
    """Seconds to the first picture of a map, and from each press of + to its tile, from all to single tokens."""
    start = time.monotonic()
    page.goto(f"{address}/?run={run}&page=map&head={head}")
    page.wait_for_selector("canvas.over", timeout=WAIT)
    first = round(time.monotonic() - start, 3)
    page.wait_for_selector(".side dl:has-text('exact')", timeout=WAIT)
    page.locator("[data-focus=map]").focus()
    page.locator("canvas.over").evaluate(_COUNT_TILES)
    times = []
    for _ in range(9):
        before = page.evaluate("window.tiles")
        start = time.monotonic()
        page.keyboard.press("+")
        page.wait_for_function("before => window.tiles > before", arg=before, timeout=WAIT)
        times.append(round(time.monotonic() - start, 3))
        page.locator("[data-focus=map]").focus()
    return first, times


def _visits(browser: Any, address: str, pid: int, count: int) -> tuple[float, list[float]]:
    """Growth of the server over so many page visits in fresh tabs, after everything was opened once."""
    memory = []
    for i in range(-2 * len(PAGES), count):
        page = browser.new_context().new_page()
        name = PAGES[i % len(PAGES)]
        page.goto(f"{address}/?run=short&page={name}&head=L{i % 8}H{i % 12}&tokens=1&part=compare")
        page.wait_for_selector("footer.hs-foot", timeout=WAIT)
        page.context.close()
        if i >= 0 and (i % 25 == 0 or i == count - 1):
            memory.append(round(_resident(pid), 1))
            print(f"visit {i}: {memory[-1]} MB", file=sys.stderr, flush=True)
    return max(memory) - memory[0], memory


def _resident(pid: int) -> float:
    """Resident memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _runs(folder: Path) -> None:
    from app_runs import embedded_data, write

    write(embedded_data(tokens=214), folder / "short")
    write(embedded_data(tokens=214, seed=1), folder / "other")
    write(embedded_data(tokens=32_768, sequences=1, seed=1), folder / "long")


if __name__ == "__main__":
    main()
