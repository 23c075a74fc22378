"""Make the pictures of the README and the docs from real results of the embedded model.

python docs/pictures.py [atlas] [dashboard]

The dashboard's need playwright and chromium.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "docs" / "assets"
sys.path.insert(0, str(ROOT))

PANELS = (
    ("mass_first", "attention on the first token"),
    ("repeat_induction", "induction score, repeated random tokens"),
    ("distance", "mean look-back distance, tokens"),
)
# Name -> (address, height, what shows that the page is there).
PAGES = {
    "atlas": ("?run=demo", 740, ".scatter"),
    "head": ("?run=demo&page=head&head=L4H9", 1000, ".hs .strip"),
    "text": ("?run=demo&page=text&head=L4H9&token=207", 900, ".wires path"),
    "map": ("?run=demo&page=map&head=L4H9", 860, "canvas.over"),
    "intervene": ("?run=demo&page=intervene&edit=L4H9,L4H10,L4H11,L2H3&tokens=16", 1000, ".hs .generated"),
    "experiments": ("?page=experiments&part=sweeps", 840, ".chart .band"),
}


def atlas(path: Path) -> None:
    """Three scores of every head, from a scan of the demo text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from headscope import viz

    scope, data = _demo(("induction",))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 4.6), constrained_layout=True)
    for (column, title), ax in zip(PANELS, axes, strict=True):
        viz.heads(data.heads, column, kv_heads=scope.layers[0].kv_heads, ax=ax)
        ax.set_title(title, loc="left", fontsize=11)
    figure.savefig(path, dpi=110)


def dashboard(folder: Path) -> None:
    """A picture of each page of the dashboard, light, and of the atlas dark."""
    from playwright.sync_api import sync_playwright

    from headscope.cli import serve

    with tempfile.TemporaryDirectory() as runs, sync_playwright() as play:
        _runs(Path(runs))
        with serve.running([Path(runs)]) as (address, _):
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, (query, height, sign) in PAGES.items():
                _picture(browser, f"{address}/{query}", folder / f"dashboard-{name}.png", height, sign, "light")
            query, height, sign = PAGES["atlas"]
            _picture(browser, f"{address}/{query}", folder / "dashboard-dark.png", height, sign, "dark")


def _demo(probes: tuple[str, ...]) -> tuple[Any, Any]:
    """The embedded model, and a scan of the demo text."""
    import headscope as hs
    from headscope.corpus import read_sequences
    from headscope.scan import ScanConfig, scan

    scope = hs.load(device="cpu")
    config = ScanConfig(probes=probes, batch_size=4)
    return scope, scan(scope, read_sequences(scope.tokenizer, demo=True), config)


def _runs(folder: Path) -> None:
    """A scan of the demo text, and a sweep over its induction heads."""
    from headscope.experiments import PruneSweep, run_sweep
    from headscope.runs import write_run

    scope, data = _demo(("default",))
    data.info["command"] = "headscope scan --demo -o demo"
    write_run(data, folder / "demo", report=False)
    sweep = PruneSweep(rank_by=("induction",), k=(0, 1, 2, 4, 8), seeds=5, tasks=("repeats{n: 4}",))
    run_sweep(sweep, scope, folder / "induction-heads")


def _picture(browser: Any, address: str, path: Path, height: int, sign: str, scheme: str) -> None:
    """One page as a small PNG: a palette is enough for it."""
    from io import BytesIO

    from PIL import Image

    page = browser.new_context(viewport={"width": 1280, "height": height}, color_scheme=scheme).new_page()
    page.goto(address)
    page.wait_for_selector(sign, timeout=120_000)
    page.add_style_tag(content=".hs-foot { visibility: hidden }")  # it names folders of this machine
    page.wait_for_timeout(1500)
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
    page.context.close()


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["atlas", "dashboard"]
    if "atlas" in wanted:
        atlas(ASSETS / "atlas.png")
    if "dashboard" in wanted:
        dashboard(ASSETS)
