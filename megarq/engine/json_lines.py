"""Files of JSON lines that a run appends to, read whatever a kill has torn, and without torch."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"


def json_lines(path: Path, *keys: str, last_bytes: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, its object) for every whole line that has these keys; of the file's last so many bytes, or of all."""
    if not path.exists():
        return
    with path.open("rb") as file:
        if last_bytes is not None:
            file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
        text = file.read().decode(errors="replace")
    for line in text.splitlines(keepends=True):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and isinstance(values, dict) and all(key in values for key in keys):
            yield line, values
