"""A PNG that tells how it was drawn."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from megarq.files import write_atomically


def write_png(path: Path, picture: Image.Image, facts: dict[str, Any]) -> None:
    """Write a PNG with one text chunk for each fact that is not None, in JSON but for strings."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in {"Software": "MegaRQ", **facts}.items():
        if value is not None:
            chunks.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    content = BytesIO()
    picture.save(content, "PNG", pnginfo=chunks)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
