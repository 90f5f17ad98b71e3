"""The report in a real browser: headless Chromium, driven from its command line.

The page runs no scripts, so a page around it, which shows it in frames of several widths, measures it.
"""

import html
import json
import runpy
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from made_up_results import colour, draw_set, made_up_result, plain, write
from PIL import Image

from megarq.data.picture_set import Item
from tests.end_to_end.commands import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60
COUNT, SAMPLES, STEPS = 12, 6, (1000, 2000)
WIDTHS = (320, 400, 1600)
SHOWN = [place * COUNT // SAMPLES for place in range(SAMPLES)]

AROUND = """<!doctype html><title>measuring</title>
<img src="{control}">
{frames}
<pre id="measured"></pre>
<script>
addEventListener("load", () => {{
  const measured = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement, images = [...page.images];
    const inside = element => element.closest(".scroll, caption, svg") !== null;
    return {{
      width: root.clientWidth,
      wanted: root.scrollWidth,
      beyond: [...page.body.querySelectorAll("*")]
        .filter(element => !inside(element) && element.getBoundingClientRect().right > root.clientWidth + 0.5)
        .map(element => element.tagName + ": " + element.textContent.slice(0, 40)),
      decoded: images.filter(image => image.complete && image.naturalWidth > 0).length,
      visible: images.filter(image => image.getBoundingClientRect().width > 30).length,
      names: images.map(image => image.alt),
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name)
        .filter(name => !name.startsWith("data:")),
      elements: [...new Set([...page.querySelectorAll("*")].map(element => element.localName))],
      lines: page.querySelectorAll("svg path").length,
      unnamed: page.querySelectorAll(
        "th:not([scope]), svg:not([aria-label], [aria-hidden]), .scroll:not([aria-label])"
      ).length,
      attacked: "attacked" in frame.contentWindow || "attacked" in window,
    }};
  }});
  document.getElementById("measured").textContent = JSON.stringify(measured);
}});
</script>
"""


class Measured(NamedTuple):
    """What the browser made of the page."""

    frames: dict[int, dict[str, Any]]
    """What was measured at each width."""
    asked: list[str]
    """What the page, and the control beside it, asked a web server for."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`browser(*options, page)`: what it writes to stdout. No host but this one can be reached."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium: apt-get install --no-install-recommends chromium")
    profile = tmp_path_factory.mktemp("profile")

    def run(*options: str) -> str:
        command = [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--hide-scrollbars", f"--user-data-dir={profile}", "--force-device-scale-factor=1"),
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


class Server(BaseHTTPRequestHandler):
    """Writes down what it is asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        """Answer that there is nothing."""
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    """Bound, and served by `measured` alone: forks of other tests should not meet its thread."""
    Server.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as bound:
        yield bound


@pytest.fixture(scope="module")
def report(browser: object, server: ThreadingHTTPServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two results, whose pictures have prompts that would load, run and overflow if they could."""
    folder = tmp_path_factory.mktemp("report")
    address = f"http://127.0.0.1:{server.server_port}"
    evil = f'"><img src="{address}/prompt.png"><script>window.attacked = 1</script><style>@import "{address}/a.css";'
    prompts = [evil, "w" * 300, "an ordinary prompt"]
    items = [Item(prompts[index % len(prompts)], id=500 + index) for index in range(COUNT)]
    (folder / "real").mkdir()
    for index in range(COUNT):
        plain(index, 48).save(folder / "real" / f"real_{500 + index:06d}.png")
    for step in STEPS:
        content = made_up_result(
            draw_set(folder / f"set-{step}", items, side=200),
            COUNT,
            step=step,
            warnings=["fid: 12 pictures are too few.", f"{evil} {'w' * 200}"],
            reference={"path": str(folder / "real"), "kind": "pictures", "count": COUNT, "transform": None},
            clip_scores={"best": [[1, 0.4]], "worst": [[3, 0.1]]},
        )
        content["images"]["sha256"] = f"{step:064d}"
        write(folder / "results" / f"a-rather-long-name-of-a-result-at-step-{step}.json", content)
    made = folder / "report.html"
    main = runpy.run_path(str(ROOT / "evaluation" / "report.py"))["main"]
    main([str(folder / "results"), "--output", str(made), "--samples", str(SAMPLES), "--title", evil])
    return made


@pytest.fixture(scope="module")
def measured(browser: Callable[..., str], report: Path, server: ThreadingHTTPServer) -> Measured:
    """The page at all widths."""
    page = html.escape(report.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>' for width in WIDTHS
    )
    control = f"http://127.0.0.1:{server.server_port}/control"
    around = report.with_name("around.html")
    around.write_text(AROUND.format(frames=frames, control=control), encoding="utf-8")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        seen = browser("--dump-dom", "--window-size=1700,1000", around.as_uri())
    finally:
        server.shutdown()
        thread.join()
    said = seen.partition('<pre id="measured">')[2].partition("</pre>")[0]
    frames_seen = json.loads(html.unescape(said))
    assert [frame["width"] for frame in frames_seen] == list(WIDTHS)
    return Measured(dict(zip(WIDTHS, frames_seen, strict=True)), Server.asked)


@pytest.fixture(scope="module")
def screenshot(browser: Callable[..., str], report: Path) -> Callable[..., Image.Image]:
    """`screenshot(width, height, *options)`: what is seen."""

    def take(width: int, height: int, *options: str) -> Image.Image:
        picture = report.with_suffix(".png")
        browser(f"--screenshot={picture}", f"--window-size={width},{height}", *options, report.as_uri())
        with Image.open(picture) as image:
            assert image.size == (width, height)
            return image.convert("RGB")

    return take


def areas(seen: Image.Image) -> list[int]:
    """Pixels that have the colour of each sample, but for rounding."""
    colours = seen.getcolors(seen.width * seen.height)
    return [
        sum(
            count for count, found in colours if all(abs(a - b) <= 4 for a, b in zip(found, colour(index), strict=True))
        )
        for index in SHOWN
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows(measured: Measured, width: int) -> None:
    frame = measured.frames[width]
    assert frame["wanted"] == width
    assert frame["beyond"] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_is_decoded_and_has_a_place(measured: Measured, width: int) -> None:
    frame = measured.frames[width]
    pictures = len(STEPS) * (2 * SAMPLES + 2)
    assert (frame["decoded"], frame["visible"], len(frame["names"])) == (pictures, pictures, pictures)
    assert all(name.startswith(("generated picture", "reference picture")) for name in frame["names"])


def test_nothing_is_loaded_and_nothing_runs(measured: Measured) -> None:
    assert measured.asked == ["/control"]
    for frame in measured.frames.values():
        assert frame["loaded"] == []
        assert not frame["attacked"]
        assert not {"script", "link", "iframe", "object"} & set(frame["elements"])


def test_tables_charts_and_scrolled_parts_have_names(measured: Measured) -> None:
    frame = measured.frames[400]
    assert {"table", "caption", "svg"} <= set(frame["elements"])
    assert frame["lines"] == 5  # one for each metric
    assert frame["unnamed"] == 0


def test_pictures_are_seen_in_their_colours(screenshot: Callable[..., Image.Image]) -> None:
    seen = screenshot(1600, 2600)
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert min(areas(seen)) > 2 * 120 * 120  # generated and reference, both


def test_the_page_is_dark_where_that_is_preferred(screenshot: Callable[..., Image.Image]) -> None:
    seen = screenshot(1600, 2600, "--blink-settings=preferredColorScheme=0")
    assert max(seen.getpixel((0, 0))) < 40
    assert min(areas(seen)) > 2 * 120 * 120
