"""The app in a real browser: every page opens, clicks work, nothing leaves the machine, nothing is taken for markup.

Screenshots go to the folder named by HEADSCOPE_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from app_runs import embedded_data, hostile, small_sweep, write  # noqa: E402

from headscope.cli import serve  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
MARKS = ":smile: :material/home: :streamlit: :red[x] $x^2$ http://evil.example/b www.evil.example a@evil.org -> &lt; "
ATTACK = f"{MARKS}![x](http://evil.example/a.png)<script>alert(1)</script><img src=x onerror=alert(2)>"
PAGES = ("atlas", "head", "text", "map", "intervene", "experiments")
FOOT = "footer.hs-foot"
LONG = 60_000

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("runs")
    write(embedded_data(tokens=120), folder / "short")
    write(embedded_data(tokens=32_768, sequences=1, seed=1), folder / "long")
    write(hostile(embedded_data(tokens=40), ATTACK), folder / "wild")
    broken = write(embedded_data(tokens=40), folder / "broken")
    (broken / "tokens.parquet").write_bytes(b"<b>cut</b>")
    small_sweep(folder / "swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with serve.running([folder], folder / "log") as (found, _):
            yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield found
        found.close()


class Visit:
    """One tab, with everything that went wrong or out in it."""

    def __init__(self, browser: Any, address: str, scheme: str = "light") -> None:
        self.address = address
        self.context = browser.new_context(viewport={"width": 1400, "height": 1000}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.messages: list[int] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._request)
        self.page.on("websocket", lambda ws: ws.on("framereceived", lambda f: self.messages.append(len(f))))

    def _dialog(self, dialog: Any) -> None:
        self.wrong.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if request.url.startswith("http") and not request.url.startswith(self.address):
            self.wrong.append(f"request to {request.url}")

    def open(self, query: str = "", until: str = FOOT, patience: int = LONG) -> Any:
        self.page.goto(f"{self.address}/{query}")
        self.page.wait_for_selector(until, timeout=patience)
        return self.page

    def shot(self, name: str) -> None:
        folder = os.environ.get("HEADSCOPE_SCREENSHOTS")
        if folder:
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture
def visit(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    made = Visit(browser, address)
    yield made
    made.shot(f"end-{request.node.name.replace('/', '-')}")
    made.context.close()
    assert made.wrong == []
    assert max(made.messages, default=0) < 5_000_000


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens(page: str, visit: Visit) -> None:
    visit.open(f"?run=short&page={page}&head=L4H9&tokens=4")
    visit.shot(f"{page}-light")


def test_every_page_has_a_dark_side(browser: Any, address: str) -> None:
    visit = Visit(browser, address, "dark")
    try:
        for page in PAGES:
            visit.open(f"?run=short&page={page}&head=L4H9&tokens=4")
            background = visit.page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
            visit.shot(f"{page}-dark")
            assert background == "rgb(16, 19, 23)"
        assert visit.wrong == []
    finally:
        visit.context.close()


def test_every_page_opens_on_a_long_run(visit: Visit) -> None:
    for page in ("atlas", "text", "map", "head", "intervene", "experiments"):
        tab = visit.open(f"?run=long&page={page}&head=L0H3&tokens=2&part=compare", patience=3 * LONG)
        if page == "map":
            tab.wait_for_selector(".side dl:has-text('128 × 128 tokens')", timeout=LONG)
            visit.shot("map-long-preview")
            tab.wait_for_selector(".side dl:has-text('exact')", timeout=2 * LONG)
        visit.shot(f"{page}-long")
    assert max(visit.messages) < 2_000_000


@pytest.mark.parametrize("page", [*PAGES, "experiments&part=compare&other=short"])
def test_words_of_a_run_are_never_markup(page: str, visit: Visit) -> None:
    tab = visit.open(f"?run=wild&page={page}&head=L4H9&tokens=2")
    tab.wait_for_timeout(300)
    assert tab.locator(".stMain :is(img[src=x], img[alt*=Streamlit], a[href*=evil], .katex)").count() == 0
    assert tab.locator(".stMain [translate=no]", has_text="home").count() == 0, "an icon"
    assert not any("\U0001f604" in said or "evil.org →" in said for said in tab.locator(".stMain").all_inner_texts())
    assert tab.locator("script:has-text('alert')").count() == 0
    if page != "experiments":
        assert ATTACK in tab.locator(FOOT).inner_text()
    if page == "text":
        assert ATTACK in tab.locator(".tokens").inner_text()


def test_a_broken_run_names_the_file_and_shows_the_rest(visit: Visit) -> None:
    tab = visit.open("?run=broken&score=entropy", ".cell")
    assert "tokens.parquet" in tab.locator("[data-testid=stAlert]").first.inner_text()
    assert tab.locator(".cell").count() == 96
    visit.shot("atlas-broken")


def test_a_head_is_one_click_or_key_away(visit: Visit) -> None:
    tab = visit.open("?run=short", ".cell")
    tab.locator(".cell[data-i='57']").hover()
    assert "L4H9" in tab.locator(".tip:visible").inner_text()
    tab.locator(".cell[data-i='57']").click()
    tab.wait_for_selector("h1:has-text('L4H9')", timeout=LONG)
    tab.get_by_role("link", name="Atlas", exact=True).click()
    tab.wait_for_selector("[data-focus=grid]", timeout=LONG)
    tab.locator("[data-focus=grid]").focus()
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        tab.keyboard.press(key)
    tab.wait_for_selector("h1:has-text('L5H10')", timeout=LONG)
    assert "head=L5H10" in tab.url


def test_back_and_forward_reopen_what_was_there(visit: Visit) -> None:
    tab = visit.open("?run=short&score=entropy&top=7", ".cell")
    tab.wait_for_function("location.search.includes('second=')")
    tab.locator(".cell[data-i='57']").click()
    tab.wait_for_selector("h1:has-text('L4H9')", timeout=LONG)
    tab.wait_for_function("location.search.includes('text=0')", timeout=LONG)
    for heading, sign in (("headscope-reference", "score=entropy"), ("L4H9", "head=L4H9")):
        for _ in range(4):  # a page may have put its choices into the address in more than one step
            (tab.go_back if heading != "L4H9" else tab.go_forward)()
            tab.wait_for_timeout(700)
            if sign in tab.url:
                break
        tab.wait_for_selector(f"h1:has-text('{heading}')", timeout=LONG)
        assert sign in tab.url
    tab.wait_for_timeout(500)
    assert "head=L4H9" in tab.url


def test_heads_are_chosen_by_brushing_and_by_the_keyboard(visit: Visit) -> None:
    tab = visit.open("?run=short&score=induction_score&second=entropy")
    tab.wait_for_selector(".scatter .frame", timeout=LONG)
    box = tab.locator(".scatter .frame").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 2)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] - 2, steps=4)
    tab.mouse.up()
    tab.wait_for_selector("text=/\\d+ chosen/", timeout=LONG)
    tab.wait_for_function("location.search.includes('picked=')")
    tab.locator("[data-focus=grid]").focus()
    tab.keyboard.press("ArrowLeft")
    before = tab.url
    tab.keyboard.press("Space")
    tab.wait_for_function("old => location.href !== old", arg=before)
    tab.wait_for_function("document.activeElement?.shadowRoot?.activeElement?.dataset.focus === 'grid'")


def test_the_map_zooms_and_its_link_reopens_the_view(visit: Visit) -> None:
    tab = visit.open("?run=short&page=map&head=L4H9", "canvas.over")
    tab.get_by_role("button", name="Zoom in").click()
    tab.wait_for_function("location.search.includes('view=30-90-30-90')", timeout=LONG)
    tab.locator("[data-focus=map]").focus()
    tab.keyboard.press("+")
    tab.wait_for_function("location.search.includes('view=45-75-45-75')", timeout=LONG)
    tab.wait_for_selector(".rowlabel:has-text('river')", timeout=LONG)
    visit.shot("map-words")
    visit.open(tab.url.removeprefix(visit.address + "/"), "canvas.over")
    assert "45–74" in tab.locator(".side dl").inner_text()


def test_lines_follow_a_token_and_the_sink_can_be_hidden(visit: Visit) -> None:
    tab = visit.open("?run=short&page=text&head=L4H9", ".tokens .tok")
    tab.locator(".tokens .tok").nth(12).hover()
    assert tab.locator(".wires path").count() > 0
    tab.get_by_text("Hide sink").click()
    tab.wait_for_selector("text=/sink hidden: \\d+ % of the mass/", timeout=LONG)
    tab.locator(".tokens .tok").nth(12).click()
    tab.wait_for_function("location.search.includes('token=12')")
    visit.shot("text-pinned")


def test_warm_atlas_paints_soon(visit: Visit) -> None:
    visit.open("?run=short", ".cell")
    times = []
    for _ in range(3):
        start = time.monotonic()
        visit.open("?run=short", ".cell")
        times.append(time.monotonic() - start)
    # The aim is 2 s on two free cores; the limit leaves room for a busy machine.
    assert min(times) < 6, times


def test_the_direction_of_a_difference_is_written_not_only_coloured(visit: Visit) -> None:
    tab = visit.open("?run=short&page=experiments&part=compare&other=long&score=induction_score", ".cell")
    signs = set(tab.locator(".sign").all_text_contents())
    assert signs == {"+", "−"}
    visit.shot("experiments-difference")


def test_long_work_shows_progress_and_can_be_cancelled(visit: Visit) -> None:
    tab = visit.open("?run=long&page=head&head=L1H5", ".stProgress")
    tab.get_by_role("button", name="Cancel").click()
    tab.wait_for_selector("text=Cancelled", timeout=LONG)
    tab.reload()
    tab.get_by_role("button", name="Start again").wait_for(timeout=LONG)


def test_curves_of_a_sweep_show_bands_and_speak_to_the_keyboard(visit: Visit) -> None:
    tab = visit.open("?page=experiments&part=sweeps&sweep=swept", ".chart .band")
    assert tab.locator(".chart path.curve").count() == 4, "two curves, two samples in the legend"
    tab.locator("[data-focus=curves-curves-0]").focus()
    for _ in range(2):
        tab.keyboard.press("ArrowRight")
    said = tab.locator(".tip:visible").inner_text()
    assert said.startswith("1 heads removed") and "random others" in said
    tab.get_by_role("button", name="ranked.json, random others").click()
    assert tab.locator(".chart path.band").count() == 1
    assert "Area under each curve" in tab.locator(".stMain").inner_text()
    visit.shot("experiments-sweep")


def test_a_scan_started_here_survives_a_reload_and_opens(visit: Visit) -> None:
    tab = visit.open("?page=experiments&part=new&kind=scan")
    tab.get_by_text("A text of my own").click()
    tab.get_by_label("Text to read").fill("The lamp stood. The lamp stood.")
    tab.get_by_label("Call the run", exact=True).fill("fresh")
    tab.get_by_label("Call the run", exact=True).press("Enter")
    tab.wait_for_selector("code:has-text('-o fresh')", timeout=LONG)
    tab.get_by_role("button", name="Start", exact=True).click()
    tab.wait_for_selector("text=/Scan fresh/", timeout=LONG)
    visit.shot("experiments-running")
    tab.reload()
    tab.get_by_role("button", name="Show the run").click(timeout=3 * LONG)
    tab.wait_for_selector("h1:has-text('headscope-reference')", timeout=LONG)
    tab.wait_for_function("location.search.includes('run=fresh')", timeout=LONG)


def test_a_sweep_started_here_can_be_cancelled(visit: Visit) -> None:
    tab = visit.open("?page=experiments&part=new&kind=leave-one-out")
    tab.get_by_role("button", name="Start", exact=True).click()
    tab.get_by_role("button", name="Cancel").click(timeout=LONG)
    tab.wait_for_selector("text=/Sweep sweep · cancelled/", timeout=2 * LONG)


def test_heads_are_picked_in_the_grid_and_the_edit_scored(visit: Visit) -> None:
    tab = visit.open("?run=short&page=intervene&edit=L4H9&tokens=2&task=repeats", "text=/Scoring with|share of tokens/")
    tab.get_by_text("Pick heads").click()
    tab.locator(".cell[data-i='27']:visible").first.click()
    tab.wait_for_function("decodeURIComponent(location.search).includes('edit=L4H9,L2H3')", timeout=LONG)
    tab.wait_for_selector("td:has-text('share of tokens right')", timeout=LONG)
    tab.get_by_role("tab", name="Command line").click()
    assert "headscope eval --intervene edit.yaml" in tab.locator("[data-testid=stCode]:visible").inner_text()
    visit.shot("intervene-picked")


def test_drawings_can_be_saved(visit: Visit) -> None:
    tab = visit.open("?run=wild&score=entropy", ".cell")
    for kind in ("CSV", "PNG", "SVG"):
        with tab.expect_download(timeout=LONG) as saved:
            tab.locator(".legend .exports button", has_text=kind).click()
        content = Path(saved.value.path()).read_bytes()
        assert saved.value.suggested_filename == f"wild-entropy.{kind.lower()}"
        assert content.startswith({"CSV": b"head,", "PNG": b"\x89PNG", "SVG": b"<svg"}[kind])
        assert b"<script" not in content or kind == "CSV"


def test_the_keyboard_reaches_everything_in_order(visit: Visit) -> None:
    tab = visit.open("?run=short", ".cell")
    read = """() => {
        let e = document.activeElement;
        while (e?.shadowRoot?.activeElement) e = e.shadowRoot.activeElement;
        return e.getAttribute('aria-label') || e.textContent;
    }"""
    seen = []
    for _ in range(28):
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate(read) or "")
    wanted = ["Atlas", "Experiments", "Score", "of every head", "Number of heads outlined"]
    places = [next((i for i, s in enumerate(seen) if w in s and len(s) < 99), None) for w in wanted]
    assert None not in places and places == sorted(places), seen
