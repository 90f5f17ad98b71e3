"""A tiny model of captions, and the commands that draw with it."""

import json
from pathlib import Path

from tiny_models import build_models, export_models, write_tokenizer

COUNT, TARS = 48, 12
PROMPTS = ["a seven", "two", "a small red two", "blue seven"]


def drawing_command(folder: Path) -> tuple[str, ...]:
    """What is typed, but for --output, to draw COUNT pictures in TARS tars with a model made in this folder."""
    model = _model(folder)
    items = folder / "items.json"
    items.write_text(json.dumps(PROMPTS * (COUNT // len(PROMPTS))))
    size = ("--pictures-per-tar", str(COUNT // TARS), "--batch-size", "1", "--seed", "5")
    return ("evaluation/coco.py", "--model", str(model), "--items", str(items), *size)


def prompts_command(folder: Path) -> tuple[str, ...]:
    """The same for COUNT pictures that are files of their own, in batches of two."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    size = ("--count", str(COUNT // len(PROMPTS)), "--batch-size", "2", "--seed", "5")
    return ("tools/sample.py", str(_model(folder)), "--prompts-file", str(prompts), *size)


def _model(folder: Path) -> Path:
    return export_models(build_models(), folder / "model", tokenizer_file=write_tokenizer(folder))
