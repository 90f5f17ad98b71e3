"""The web page of a model, served by tools/demo_app.py and used in headless Chromium."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_models import build_models, export_models, write_tokenizer

import megarq
from tests.end_to_end.commands import ON_CPU, ROOT, call, free_port

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 20
SLOW = [24, 24, 3]
"""Codes of a picture that takes a while."""


class Server:
    """A page served by a process of its own."""

    def __init__(self, folder: Path, temporary: Path, *options: object) -> None:
        self.port = free_port()
        self.temporary = temporary
        self.log = temporary.with_suffix(".log")
        command = [sys.executable, "tools/demo_app.py", folder, "--port", self.port, *options]
        nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # of no use, and not asked
        environment = {**os.environ, **ON_CPU, **nowhere, "TMPDIR": str(temporary)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address == f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End it as a service manager does: it has never failed, and leaves no pictures behind."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(SECONDS) == 0
        assert "Traceback" not in self.log.read_text()
        assert list(self.temporary.glob("megarq-page-*")) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = write_tokenizer(folder)
    kinds = {"captions": {}, "slow": {"code_shape": SLOW}, "classes": {"cond_length": 1, "cond_vocab_size": 5}}
    return {
        kind: export_models(build_models(**changes), folder / kind, tokenizer_file=tokenizer)
        for kind, changes in kinds.items()
    }


@pytest.fixture(scope="module")
def serve(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`serve("captions", *options)`: the page of a model; all are ended when the module is done."""
    servers: dict[tuple[object, ...], Server] = {}

    def start(*asked: object) -> Server:
        if asked not in servers:
            servers[asked] = Server(models[str(asked[0])], tmp_path_factory.mktemp("temporary"), *asked[1:])
        return servers[asked]

    yield start
    for server in servers.values():
        server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no chromium: apt-get install --no-install-recommends chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        )
        yield chromium
        chromium.close()


class Visitor:
    """Somebody in front of the page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.asked: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.set_default_timeout(SECONDS * 1000)

    def field(self, label: str) -> Any:
        return self.page.locator("label").filter(has_text=label).locator("input, textarea").first

    def fill(self, **fields: object) -> None:
        for label, value in fields.items():
            self.field(label.replace("_", "-")).fill(str(value))

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).click()

    def pictures(self, gallery: str, count: int) -> list[str]:
        """Addresses of the pictures of a gallery, when there are so many and all are loaded."""
        self.page.wait_for_function(
            """([gallery, count]) => {
                const images = [...document.querySelectorAll(`#${gallery} button img`)];
                return images.length === count && images.every(image => image.complete && image.naturalWidth > 0);
            }""",
            arg=[gallery, count],
        )
        return [image.get_attribute("src") for image in self.page.locator(f"#{gallery} button img").all()]

    def choose(self, gallery: str, place: int) -> None:
        self.page.locator(f"#{gallery} button img").nth(place).click()

    def message(self, words: str) -> None:
        """Read a message, and close all."""
        self.page.locator("[data-testid=toast-body]").filter(has_text=words).first.wait_for()
        for cross in self.page.get_by_test_id("toast-close").all():
            cross.click()
        self.page.wait_for_function("document.querySelectorAll('[data-testid=toast-body]').length === 0")

    def draw(self, count: int, **fields: object) -> list[str]:
        """Ask for pictures and wait for them."""
        before = self.page.locator("#grid").inner_text()
        self.fill(Pictures=count, **fields)
        self.press("Draw")
        self.page.wait_for_function("before => document.querySelector('#grid').innerText !== before", arg=before)
        return self.pictures("grid", count)

    def seed(self) -> int:
        return int(self.field("Seed").input_value())


@pytest.fixture
def visit(browser: Any, serve: Callable[..., Server]) -> Iterator[Callable[..., Visitor]]:
    """`visit("captions", *options)`: open the page of a model."""
    contexts = []

    def open_page(*asked: object) -> Visitor:
        context = browser.new_context(viewport={"width": 1200, "height": 1000})
        contexts.append(context)
        visitor = Visitor(context.new_page())
        visitor.page.goto(serve(*asked).address)
        visitor.page.get_by_role("button", name="Draw").wait_for()
        return visitor

    yield open_page
    for context in contexts:
        context.close()


def save(visitor: Visitor, folder: Path) -> Path:
    """Download the chosen picture."""
    button = visitor.page.locator("a, button").filter(has_text="Download the chosen picture").last
    sync_api.expect(button).to_be_enabled(timeout=SECONDS * 1000)
    with visitor.page.expect_download() as download:
        button.click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_a_visitor_draws_refines_downloads_and_looks_back(
    visit: Callable[..., Visitor], models: dict[str, Path], tmp_path: Path
) -> None:
    visitor = visit("captions")
    first = visitor.draw(3, Prompt="a seven", Top_k=5, Guidance=2)
    first_seed = visitor.seed()
    second = visitor.draw(2, Prompt="two")
    assert len(set(first)) == 3 and visitor.seed() != first_seed and not set(first) & set(second)

    visitor.choose("history", 1)  # the older one
    again = visitor.pictures("grid", 3)
    assert visitor.seed() == first_seed
    assert visitor.field("Prompt").input_value() == "a seven"
    visitor.choose("grid", 1)
    assert len(set(visitor.pictures("refined", 3))) == 3

    saved = save(visitor, tmp_path)
    generator = megarq.ImageGenerator.from_pretrained(models["captions"])
    drawn = generator.generate(prompts="a seven", count=3, top_k=5, guidance=2, seed=first_seed)
    with Image.open(saved) as picture:
        assert picture.tobytes() == drawn[1].tobytes()
        facts = {name: json.loads(picture.info[name]) for name in ("prompts", "top_k", "guidance", "seed", "index")}
    assert facts == {"prompts": ["a seven"], "top_k": 5, "guidance": 2.0, "seed": first_seed, "index": 1}
    assert len(again) == 3 and all(address.startswith("http://127.0.0.1:") for address in visitor.asked), visitor.asked


def test_a_seed_that_is_given_draws_the_same_pictures_again(
    visit: Callable[..., Visitor], models: dict[str, Path], tmp_path: Path
) -> None:
    visitor = visit("classes")
    visitor.page.get_by_label("Random").uncheck()
    visitor.draw(1, Class=3, Seed=77)
    visitor.choose("grid", 0)
    visitor.pictures("refined", 3)
    with Image.open(save(visitor, tmp_path)) as picture:
        generator = megarq.ImageGenerator.from_pretrained(models["classes"])
        assert picture.tobytes() == generator.generate(classes=3, seed=77)[0].tobytes()


def test_a_drawing_shows_how_far_it_is_and_can_be_stopped(visit: Callable[..., Visitor]) -> None:
    visitor = visit("slow")
    total = 16 * SLOW[0] * SLOW[1]
    visitor.fill(Prompt="two", Pictures=16)
    visitor.press("Draw")
    status = visitor.page.locator("#grid [data-testid=status-tracker]")
    status.filter(has_text=f"/{total / 1000:.1f}k stacks").wait_for()
    assert visitor.page.get_by_role("button", name="Draw").is_disabled()
    visitor.press("Stop")
    visitor.message("Stopped. Nothing was drawn.")
    assert visitor.page.locator("#grid button img").count() == 0
    sync_api.expect(visitor.page.get_by_role("button", name="Draw")).to_be_enabled()
    visitor.draw(2)


def test_one_drawing_waits_for_another(visit: Callable[..., Visitor]) -> None:
    first, second = visit("slow"), visit("slow")
    for visitor in (first, second):
        visitor.fill(Prompt="two", Pictures=16)
    first.press("Draw")
    first.page.locator("#grid").filter(has_text="stacks").wait_for()
    second.press("Draw")
    second.page.locator("#grid").filter(has_text="queue: 1/1").wait_for()
    first.press("Stop")
    second.page.locator("#grid").filter(has_text="stacks").wait_for()
    second.press("Stop")
    second.message("Stopped.")


WRONG = {
    "no prompt": ({"Prompt": "  "}, "give a caption of at least one word"),
    "a prompt that is too long": ({"Prompt": "a " * 501}, "1002 characters: give at most 1000"),
    "top-k 0": ({"Top_k": 0}, "top_k=0: give a whole number from 1"),
    "markup": ({"Top_k": "<b>1</b>"}, "top_k='<b>1</b>': give a number"),
    "a temperature that is none": ({"Temperature": "nan"}, "temperature=nan: give a number"),
    "a share above 1": ({"Top_p": 1.5}, "top_p=1.5: give a share"),
    "too few depths": ({"Top_p": "0.5,0.6"}, "2 values for 3 depths"),
    "guidance below 0": ({"Guidance": -1}, "guidance=-1.0: give a number from 0 to 1000"),
    "a billion pictures": ({"Pictures": 10**9}, "count=1000000000: give 1 to 16 pictures"),
    "a part of a picture": ({"Pictures": "1.5"}, "count='1.5': give a whole number"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_drawn_is_said_on_the_page(visit: Callable[..., Visitor], wrong: str) -> None:
    fields, words = WRONG[wrong]
    visitor = visit("captions")
    visitor.fill(**{"Prompt": "two"} | fields)
    visitor.press("Draw")
    visitor.message(words)
    assert visitor.page.locator("#grid button img").count() == 0
    sync_api.expect(visitor.page.get_by_role("button", name="Draw")).to_be_enabled()


def test_a_class_that_does_not_exist_is_said_on_the_page(visit: Callable[..., Visitor]) -> None:
    visitor = visit("classes")
    visitor.fill(Class=5)
    visitor.press("Draw")
    visitor.message("class=5: this model knows classes 0 to 4")


def test_a_password_is_asked_for(
    browser: Any, serve: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> None:
    passwords = tmp_path_factory.mktemp("secret") / "passwords"
    passwords.write_text("ada:one two\nbob:three\n")
    address = serve("captions", "--password-file", passwords).address
    for path in ("/config", "/gradio_api/info"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(address + path, timeout=SECONDS)
        assert error.value.code == 401
    for password, answer in (("three", "Incorrect"), ("one two", "Drawn before")):
        page = browser.new_context().new_page()
        page.goto(address)
        page.get_by_label("username").fill("ada")
        page.get_by_label("password").fill(password)
        page.get_by_role("button", name="Login").click()
        page.get_by_text(answer).first.wait_for()
        page.context.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines"),
        (["--max-count", 0], "--max-count 0: give 1 to 64"),
        (["--password-file", "nowhere"], "nowhere"),
        (["--port", 1_000_000], "--port 1000000"),
    ],
)
def test_a_page_that_cannot_be_served_is_said_on_the_command_line(
    models: dict[str, Path], options: list[object], words: str
) -> None:
    outcome = call("tools/demo_app.py", models["captions"], *options)
    assert outcome.status == 2 and words in outcome.errors, outcome


def test_two_pages_on_one_port_are_one_too_many(serve: Callable[..., Server], models: dict[str, Path]) -> None:
    port = serve("captions").port
    start = time.monotonic()
    outcome = call("tools/demo_app.py", models["captions"], "--port", port)
    assert outcome.status == 2 and f"--port {port} of 127.0.0.1 cannot be used" in outcome.errors
    assert time.monotonic() - start < SECONDS
