"""Both pages in a real Chromium: what only a browser can tell.

Needs the package playwright and a Chromium: of CHROMIUM, or on the PATH.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_runs import publish, report, scores
from shown_report import PROMPT, whole_report

from dirotq.evaluate.comparing.page import write_comparison
from dirotq.evaluate.comparing.runs import read_runs
from dirotq.evaluate.report import write_report
from dirotq.pipeline.store import ArtifactStore

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

PAIRS, SIDE = 8, 1024
BAD = "<so onclick=alert(1)>&amp;</so>"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with eight pairs of 1024 pixels, and a comparison of four runs."""
    folder = tmp_path_factory.mktemp("pages")
    draw = torch.Generator().manual_seed(0)
    coarse = [torch.rand(PAIRS, 3, n, n, generator=draw) for n in (4, 32, 256)]
    smooth = [torch.nn.functional.interpolate(c, SIDE, mode="bilinear") for c in coarse]
    want = (sum(smooth) / 3).clamp(0, 1)  # type: ignore[arg-type,union-attr]
    got = (want + 0.02 * torch.randn(want.shape, generator=draw)).clamp(0, 1)
    content = whole_report()
    content["images"] = [content["images"][0] | {"seed": i, "prompt": PROMPT} for i in range(PAIRS)]
    content["size"] = [SIDE, SIDE]
    spectra = {"block.qkv": torch.logspace(-4, 0, 8).flip(0)}
    files = {"report": folder / "report.html", "compare": folder / "compare.html"}
    write_report(files["report"], content, spectra, range(PAIRS), want, got)
    store = ArtifactStore(folder / "store")
    for rank in (8, 16, 32, 64):
        publish(store, report(scores(30 + rank / 16, rank), model=BAD, method=BAD), rank=rank)
    runs, notes = read_runs(store, [])
    write_comparison([files["compare"].with_suffix(s) for s in (".html", ".csv", ".json")], runs,
                     notes)  # fmt: skip
    return files


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # A sandbox needs rights that containers do not give; the pages are ours.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def shown(browser: Any, pages: dict[str, Path]) -> Open:
    """``with shown("report", ...) as page:``; fails for any request or message of the page."""

    @contextmanager
    def opened(name: str, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
        heard: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        try:
            page = context.new_page()
            page.on("console", lambda message: heard.append(message.text))
            page.on("pageerror", lambda error: heard.append(str(error)))
            page.on("request", lambda request: heard.append(request.url))
            page.goto(pages[name].as_uri())
            yield page
        finally:
            context.close()
        assert [h for h in heard if not h.startswith("data:")] == [pages[name].as_uri()]

    return opened


@pytest.fixture(params=["report", "compare"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_page_opens_at_once_and_is_small(shown, name, pages):
    with shown(name) as page:
        [entry] = page.evaluate("performance.getEntriesByType('navigation').map(e => e.toJSON())")
        print(f"{name}: {pages[name].stat().st_size:,} bytes, {entry['loadEventEnd']:.0f} ms")
    assert 0 < entry["loadEventEnd"] < 3000
    assert pages[name].stat().st_size <= 5_000_000


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways(shown, name, width):
    with shown(name, width) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width


def luminance(page: Any, what: str) -> float:
    color = page.evaluate(f"getComputedStyle(document.body).{what}")
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_dark_mode_is_dark_and_paper_is_white(shown, name):
    with shown(name) as page:
        assert luminance(page, "backgroundColor") == 255
        assert luminance(page, "color") < 60
    with shown(name, scheme="dark") as page:
        assert luminance(page, "backgroundColor") < 40
        assert luminance(page, "color") > 200
        page.emulate_media(media="print")
        assert luminance(page, "backgroundColor") == 255


def test_every_image_is_there_and_described(shown, name):
    with shown(name) as page:
        page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth)")
        said = page.evaluate("[...document.images].map(i => i.alt)")
        charts = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.ariaLabel)")
    assert len(said) == (4 * PAIRS if name == "report" else 0)
    assert charts
    assert all([*said, *charts])


def test_names_are_text(shown, name):
    with shown(name) as page:
        assert page.locator("so").count() == 0
        assert page.locator("script").count() == 1
        assert (PROMPT if name == "report" else BAD) in page.inner_text("body")


def tab_to(page: Any, kind: str) -> None:
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == kind:
            return
    raise AssertionError(f"Tab does not reach {kind}")


def visible(page: Any) -> list[int]:
    figures = "[...document.querySelectorAll('figure.pair')]"
    heights = page.evaluate(f"{figures}.map(f => f.offsetHeight)")
    return [place for place, height in enumerate(heights) if height]


def test_pairs_slider_and_difference_by_keyboard(shown):
    with shown("report") as page:
        assert visible(page) == [0]
        tab_to(page, "radio")
        page.keyboard.press("ArrowRight")
        assert visible(page) == [1]
        over = page.locator("figure.pair .over").nth(1)
        clip = "e => getComputedStyle(e).clipPath"
        assert over.evaluate(clip) == "inset(0px 0px 0px 50%)"
        tab_to(page, "range")
        for _ in range(10):
            page.keyboard.press("ArrowLeft")
        assert over.evaluate(clip) == "inset(0px 0px 0px 40%)"
        apart = page.locator("figure.pair .apart").nth(1)
        assert not apart.is_visible()
        tab_to(page, "checkbox")
        page.keyboard.press("Space")
        assert apart.is_visible()


def test_the_slider_by_pointer(shown):
    with shown("report") as page:
        stage = page.locator(".stage").first
        stage.click(position={"x": 256, "y": 50})
        assert stage.evaluate("e => e.style.getPropertyValue('--at')") == "25%"
        assert stage.bounding_box()["width"] == SIDE  # a pixel of the image is one of the page


def test_paper_has_all_pairs_and_no_knobs(shown):
    with shown("report") as page:
        page.emulate_media(media="print")
        assert visible(page) == list(range(PAIRS))
        assert page.locator(".apart").first.is_visible()
        assert not page.locator(".knobs").first.is_visible()


def test_any_two_runs_by_keyboard(shown):
    with shown("compare") as page:
        answer = page.locator("#answer")
        assert answer.inner_text().startswith("Run 1 is closer to the 16-bit images: 1 minus 2 is")
        tab_to(page, "select-one")
        page.keyboard.press("ArrowDown")
        assert answer.inner_text() == "Choose two runs."
