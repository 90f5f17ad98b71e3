"""What README.md, CONTRIBUTING.md, benchmarks/README.md and docs/ tell a reader to type exists and is accepted."""

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from scripts import load_script

from megarq.config.deepspeed import read_ds_config
from megarq.config.load import load_config
from megarq.config.names import CONFIGS, resolve_name
from megarq.config.run import RQTransformerRunConfig, RQVAERunConfig
from megarq.config.schema import known_keys
from tests.end_to_end.conftest import Walk

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HALF_A_PAGE = 40
"""Columns: the diagram of the walk has commands on its left and on its right half."""
SCRIPT = re.compile(r"(megarq|tools|evaluation|benchmarks)/[\w/]+\.py")
KEYS = {*known_keys(RQTransformerRunConfig), *known_keys(RQVAERunConfig)}
SECTIONS = {key.partition(".")[0] for key in KEYS}


class Command(NamedTuple):
    page: str
    words: list[str]

    @property
    def script(self) -> int:
        """Place of the script among the words."""
        return next(place for place, word in enumerate(self.words) if SCRIPT.fullmatch(word))

    @property
    def arguments(self) -> list[str]:
        return self.words[self.script + 1 :]


def typed_lines(block: str) -> Iterator[str]:
    """Lines of a code block with their continuations; bars of a diagram separate columns."""
    open_lines: dict[int, str] = {}
    for line in block.splitlines():
        parts = [(match.start(), match[1]) for match in re.finditer(r"│([^│▼┐┘◄]*)", line)] or [(-HALF_A_PAGE, line)]
        for start, text in parts:
            column = start // HALF_A_PAGE
            whole = f"{open_lines.pop(column, '')} {text.strip()}"
            if whole.endswith("\\"):
                open_lines[column] = whole[:-1]
            else:
                yield whole.strip().removeprefix("$ ")


def commands() -> Iterator[Command]:
    """Every command of every page that runs one of our scripts, in blocks and in running text."""
    for page, text in TEXTS.items():
        blocks = [content for language, content in FENCE.findall(text) if language in ("", "bash", "sh")]
        lines = [line for block in blocks for line in typed_lines(block)]
        lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
        for line in lines:
            if re.match(r"(python|deepspeed|torchrun|srun|mpirun)\s", line) and SCRIPT.search(line):
                yield Command(page, shlex.split(line))


COMMANDS = list(commands())
LINKS = [(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
INLINE = [(page, word) for page, text in TEXTS.items() for word in re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]
SNIPPETS = [
    (page, code) for page, text in TEXTS.items() for language, code in FENCE.findall(text) if language == "python"
]


class ParsedError(Exception):
    """Carries what a script's own parser made of its arguments, and ends the script there."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`parse(script, arguments)`: what a script's command line makes of them, without running anything."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def stop(parser: Any, *given: Any, original: Any = original) -> None:
            raise ParsedError(original(parser, *given))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)

    def parsed(script: str, arguments: list[str]) -> argparse.Namespace:
        monkeypatch.syspath_prepend((ROOT / script).parent)  # as Python does for a script
        try:
            load_script(script).main(arguments)
        except ParsedError as stopped:
            return stopped.args[0]
        except SystemExit as stopped:
            pytest.fail(f"{script} refuses {shlex.join(arguments)} ({stopped})")
        raise AssertionError(f"{script} parses nothing")

    return parsed


def test_the_arrows_of_the_walk_are_found():
    scripts = {command.words[command.script] for command in COMMANDS if command.page == "README.md"}
    evaluation = {f"evaluation/{name}.py" for name in ("coco", "score", "report")}
    tools = {f"tools/{name}.py" for name in ("make_shards", "train_text_tokenizer", "pretokenize", "export", "sample")}
    assert tools | evaluation | {"megarq/train.py", "megarq/train_rqvae.py"} <= scripts


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page} {shlex.join(command.words)[:60]}")
def test_command_is_accepted(command, parse):
    script = command.words[command.script]
    assert (ROOT / script).is_file()
    args = parse(script, command.arguments)
    if getattr(args, "ds_config", None):
        read_ds_config(resolve_name(args.ds_config, CONFIGS / "deepspeed", ".json"))
    if script == "benchmarks/sampling.py":
        assert args.from_json or load_script(script).configurations(args)  # it has sizes with names of their own
    elif isinstance(getattr(args, "model", None), str):  # a Path is an exported folder
        kind = {"megarq/train.py": "rq-transformer", "megarq/train_rqvae.py": "rq-vae"}.get(script)
        load_config(args.model, getattr(args, "overrides", []), kind)


@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS if command.words[0] == "deepspeed"],
    ids=lambda command: shlex.join(command.words)[:60],
)
def test_options_before_the_script_are_the_deepspeed_launchers(command):
    from deepspeed.launcher.runner import parse_args

    assert parse_args(command.words[1:]).user_script == command.words[command.script]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_linked_file_exists(page, link):
    if "://" not in link and not link.startswith("#"):
        assert (ROOT / page).parent.joinpath(link.partition("#")[0]).exists()


@pytest.mark.parametrize("page", TEXTS)
def test_named_files_exist(page):
    """Of words in back quotes, those that are paths into this repository."""
    named = {
        word for where, word in INLINE if where == page and re.match(r"(megarq|tools|tests|benchmarks|configs)/", word)
    }
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_named_keys_exist(page):
    """Of words in back quotes, those that are keys of a configuration, such as `train.lr=1e-3`."""
    named = {
        word.partition("=")[0] for where, word in INLINE if where == page and re.match(r"[a-z]+\.[a-z_]+(=|$)", word)
    }
    keys = {key for key in named if key.partition(".")[0] in SECTIONS and not key.endswith((".md", ".json", ".jsonl"))}
    files = {"model.safetensors", "model.pt", "data.mdb"}
    assert keys - files <= KEYS


def test_every_configuration_is_named_in_the_readme():
    names = {path.stem for path in (CONFIGS / "model").glob("*.yaml")}
    quoted = {word for page, word in INLINE if page == "README.md"}
    assert names <= quoted


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for text in TEXTS.values() for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize(
    "script", sorted(path for folder in ("tools", "evaluation") for path in (ROOT / folder).glob("*.py"))
)
def test_a_command_ends_with_the_exit_status_of_its_errors(script):
    last = ast.parse(script.read_text(encoding="utf-8")).body[-1]
    assert ast.unparse(last) == "if __name__ == '__main__':\n    sys.exit(cli.run(main))"


def test_python_snippets_run(walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All of them, in order, where the folders that they name are those of the walk."""
    for name, target in (("model", "model"), ("codes", "codes"), ("runs/t2i", "run")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(walk / target)
    monkeypatch.chdir(tmp_path)
    names = {"pictures": torch.zeros(1, 3, 16, 16), "cond": torch.zeros(1, 6, dtype=torch.int64)}
    assert len(SNIPPETS) >= 3
    for page, code in SNIPPETS:
        exec(compile(code, page, "exec"), names)
    assert len(names["images"]) == 4 and all(isinstance(image, Image.Image) for image in names["images"])
    assert names["logits"].shape == (1, 4, 4, 2, 64)
