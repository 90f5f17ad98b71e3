"""Result files for a report: found, read, checked, named, and what keeps them from being compared.

runs/scores  'scores/*.json'  last.json  ->  [Result(label="step-2000", content={"metrics": ..}), ..]
"""

import glob
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarq.errors import DataError
from megarq.scoring.result import FORMAT, VERSION

_NUMBER, _MAYBE_TEXT, _MAYBE_NUMBER = (int, float), (str, type(None)), (int, float, type(None))
_MAYBE_DICT = (dict, type(None))
_FIELDS: dict[str, tuple[type, ...]] = {
    "metrics": (dict,),
    "protocol": (dict,),
    "images": (dict,),
    "count": (int,),
    "warnings": (list,),
    "weights_sha256": (dict,),
    "reference": _MAYBE_DICT,
    "reference_sha256": _MAYBE_TEXT,
    "model_fingerprint": _MAYBE_TEXT,
    "step": (int, type(None)),
    "seed": (int, type(None)),
    "ema": (bool, type(None)),
    "machine": _MAYBE_DICT,
    "clip_scores": _MAYBE_DICT,
}
"""Types of the fields that a report looks into; those that may be None may be missing."""
_PARTS: dict[tuple[str, str], tuple[type, ...]] = {
    ("protocol", "name"): (str,),
    ("images", "path"): (str,),
    ("images", "sha256"): _MAYBE_TEXT,
    ("images", "size"): (list, type(None)),
    ("images", "sampling"): _MAYBE_DICT,
    ("images", "dtype"): _MAYBE_TEXT,
    ("images", "keep_fraction"): _MAYBE_NUMBER,
    ("images", "ranker"): _MAYBE_DICT,
    ("reference", "path"): (str,),
    ("reference", "kind"): (str,),
    ("reference", "transform"): _MAYBE_TEXT,
    ("clip_scores", "best"): (list,),
    ("clip_scores", "worst"): (list,),
}


@dataclass(frozen=True)
class Result:
    """One result file."""

    path: Path
    """Where it lies."""
    label: str
    """Its short name among the others."""
    content: dict[str, Any]
    """What score.py wrote."""

    def __getitem__(self, name: str) -> Any:
        """A field, None where it is missing."""
        return self.content.get(name)


def load_results(given: Sequence[str]) -> list[Result]:
    """The results that files, folders (all below them) and globs name, in that order; numbers in names count as such.

    Raises: DataError where there is none, and for a file that is no result, damaged or of another version. In a
    folder, JSON files of other kinds are passed over.
    """
    found: dict[Path, dict[str, Any]] = {}
    for name in given:
        in_folder = Path(name).is_dir()
        paths = sorted(Path(name).rglob("*.json"), key=_natural) if in_folder else _files(name)
        contents = {path: _read(path, pass_over=in_folder) for path in paths}
        results = {path: content for path, content in contents.items() if content is not None}
        if not results:
            raise DataError(
                f"{name} holds no result (a .json of score.py). Check the path, or run evaluation/score.py."
            )
        for path, content in results.items():
            found.setdefault(path.resolve(), content)
    labels = _labels(list(found))
    return [Result(path, label, content) for (path, content), label in zip(found.items(), labels, strict=True)]


def _files(name: str) -> list[Path]:
    if Path(name).is_file():
        return [Path(name)]
    paths = [Path(path) for path in glob.glob(name, recursive=True) if Path(path).is_file()]  # noqa: PTH207
    if not paths:
        what = "no file matches" if glob.has_magic(name) else "no such file or folder:"
        raise DataError(f"{what} {name}. Give results of evaluation/score.py: files, folders or globs.")
    return sorted(paths, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]


def _read(path: Path, pass_over: bool) -> dict[str, Any] | None:
    """The content; None for JSON of another kind, where that is passed over."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}). Copy it again, or run score.py again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        if pass_over:
            return None
        raise DataError(f"{path} is no result of evaluation/score.py: its format is not {FORMAT!r}. Give other files.")
    if content.get("version") != VERSION:
        raise DataError(
            f"{path} has version {content.get('version')!r}, but this version of MegaRQ reads version {VERSION}. "
            "Run its score.py again, or use the MegaRQ that wrote it."
        )
    _check(path, content)
    return content


def _check(path: Path, content: dict[str, Any]) -> None:
    """Raise DataError unless everything that the page looks into has its type."""
    _check_types(path, content, "", _FIELDS)
    for (section, name), types in _PARTS.items():
        if content.get(section) is not None:
            _check_types(path, content[section], f"{section}.", {name: types})
    if ranker := content["images"].get("ranker"):
        _check_types(path, ranker, "images.ranker.", {"network": (str,), "sha256": (str,)})
    for name, metric in content["metrics"].items():
        if not isinstance(metric, dict):
            raise _damaged(path, f"metrics.{name}", metric)
        _check_types(path, metric, f"metrics.{name}.", {"value": _NUMBER, "std": _MAYBE_NUMBER})
        _check_list(path, f"metrics.{name}.interval", metric.get("interval") or [0, 0], 2, _NUMBER)
    for note in content["warnings"]:
        if not isinstance(note, str):
            raise _damaged(path, "warnings", note)
    for name in ("best", "worst"):
        for entry in (content.get("clip_scores") or {}).get(name, []):
            _check_list(path, f"clip_scores.{name}", entry, 2, _NUMBER)
            _check_types(path, {"index": entry[0]}, f"clip_scores.{name}.", {"index": (int,)})


def _check_types(path: Path, content: dict[str, Any], prefix: str, types: dict[str, tuple[type, ...]]) -> None:
    for name, allowed in types.items():
        value = content.get(name)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise _damaged(path, prefix + name, value)


def _check_list(path: Path, name: str, value: Any, length: int, types: tuple[type, ...]) -> None:
    if not (isinstance(value, list) and len(value) == length and all(isinstance(part, types) for part in value)):
        raise _damaged(path, name, value)


def _damaged(path: Path, name: str, value: object) -> DataError:
    return DataError(f"{path} is damaged: its {name} is {value!r:.80}. Copy it again, or run score.py again.")


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, without .json."""
    parts = [path.with_suffix("").parts if path.suffix == ".json" else path.parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def in_order(value: object) -> str:
    """A JSON value as text that is equal where the values are."""
    return json.dumps(value, sort_keys=True)


COMPARED: dict[str, Callable[[Result], Any]] = {
    "protocol": lambda result: result["protocol"]["name"],
    "reference": lambda result: result["reference_sha256"],
    "number of pictures": lambda result: result["count"],
    "size of pictures": lambda result: result["images"].get("size"),
}
"""What must be equal for scores to be compared. Networks are compared apart, name by name."""


def differences(results: Sequence[Result]) -> list[str]:
    """Names of what makes these results incomparable, the worst first."""
    told = [name for name, read in COMPARED.items() if len({in_order(read(result)) for result in results}) > 1]
    used: dict[str, set[str]] = {}
    for result in results:
        for network, sha256 in result["weights_sha256"].items():
            used.setdefault(f"weights of {network}", set()).add(in_order(sha256))
        for metric, score in result["metrics"].items():
            used.setdefault(f"network of {metric}", set()).add(in_order([score.get("network"), score.get("layer")]))
    # The layer of the Inception Score is part of the protocol, which has been named.
    skipped = {"network of is"} if "protocol" in told else set()
    return told + [name for name, values in used.items() if len(values) > 1 and name not in skipped]
