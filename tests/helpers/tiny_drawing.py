"""A tiny model of captions, and the command that draws with it."""

import json
from pathlib import Path

from tiny_models import build_models, export_models, write_tokenizer

COUNT, TARS = 48, 12
PROMPTS = ["a seven", "two", "a small red two", "blue seven"]


def drawing_command(folder: Path) -> tuple[str, ...]:
    """What is typed, but for --output, to draw COUNT pictures in TARS tars with a model made in this folder."""
    model = export_models(build_models(), folder / "model", tokenizer_file=write_tokenizer(folder))
    items = folder / "items.json"
    items.write_text(json.dumps(PROMPTS * (COUNT // len(PROMPTS))))
    size = ("--pictures-per-tar", str(COUNT // TARS), "--batch-size", "1", "--seed", "5")
    return ("evaluation/coco.py", "--model", str(model), "--items", str(items), *size)
