import json
from types import ModuleType

import pytest
from scripts import load_script

from megarq.config.load import load_config
from megarq.errors import ConfigError
from megarq.planning.description import describe, render


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/describe.py as a module."""
    return load_script("tools/describe.py")


def test_tokens_of_the_text_model() -> None:
    facts = describe("t2i-3.9b", load_config("t2i-3.9b"))
    assert facts["tokens_per_image"] == {"body": 127, "head": 256, "codes": 256}


def test_bytes_of_a_code_stack_and_its_latents() -> None:
    facts = describe("t2i-3.9b", load_config("t2i-3.9b"))
    assert facts["bytes_per_image"] == {"code_stack": 512, "latents": 32768}


def test_parts_add_up_to_the_total() -> None:
    counts = describe("rqvae-8x8x4", load_config("rqvae-8x8x4"))["parameters"]
    assert sum(counts["trainable"].values()) + sum(counts["frozen"].values()) == counts["total"] == 104_402_051


@pytest.mark.parametrize("name", ["cc3m-654m", "imagenet-480m", "ffhq-355m", "rqvae-8x8x4", "demo", "rqvae-demo"])
def test_the_page_holds_parts_shapes_tokens_and_flops(name: str) -> None:
    page = render(describe(name, load_config(name)))
    headings = {line.split(" (")[0] for line in page.splitlines() if line and not line.startswith(" ")}
    wanted = {"parameters", "shapes", "tokens per image", "FLOPs per image", "bytes per image in code shards", "train"}
    assert wanted <= headings


def test_the_tool_prints_json(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tool.main(["--model", "ffhq-355m", "--json"])
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 355_393_536


def test_the_tool_takes_overrides(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tool.main(["--model", "imagenet-480m", "model.body.layers=24", "--json"])
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 820_899_328


def test_the_tool_names_an_unknown_model(tool: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean ffhq-355m\?"):
        tool.main(["--model", "ffhq-355"])
