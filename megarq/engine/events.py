"""What happens to a run beside its steps: one JSON line an event in RUN/events.jsonl, which no restart takes back.

| event        | when                                                    | beside `time`, `event`, `step`             |
|--------------|---------------------------------------------------------|--------------------------------------------|
| started      | a job's ranks have joined the run, new or going on      | steps, ranks, hosts, launcher, job         |
| preflight    | its ranks were found fit to train                       | seconds, ranks, hosts, all_reduce_gbs, ... |
| checkpoint   | a step's checkpoint can be seen                         | seconds of writing it                      |
| skipped      | a step's loss or gradient was not finite                | reason                                     |
| rolled back  | the run went back to a checkpoint                       | to, reason                                 |
| warning      | something that a person should look at                  | text                                       |
| stopped      | it was asked to stop, and saved                         | reason                                     |
| failed       | it ended by an error                                    | text                                       |
| finished     | the last step is saved                                  |                                            |

A start without one of the last three before it follows a death: of a rank, a node or the whole job.
"""

import json
import time
from pathlib import Path
from typing import Any

from megarq.engine.json_lines import EVENTS_FILE, json_lines


def add_event(run: Path, event: str, step: int, **values: Any) -> None:
    """Append one line. `time` is in seconds since 1970; a line is written in one piece."""
    line = json.dumps({"time": time.time(), "event": event, "step": step, **values})
    with (run / EVENTS_FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_events(run: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; a line that was torn is left out."""
    return [event for _, event in json_lines(run / EVENTS_FILE, "time", "event", "step")]
