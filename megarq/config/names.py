"""Names: of configuration files in configs/, and what somebody may have meant who mistyped one."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path

from megarq.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def suggestion(name: str, known: Iterable[str]) -> str:
    """`Did you mean X?` after a space, for the known name nearest to a mistyped one; empty where none is near."""
    originals = {candidate.lower(): candidate for candidate in known}
    near = get_close_matches(name.lower(), originals, n=1, cutoff=0.6)
    return f" Did you mean {originals[near[0]]}?" if near else ""


def key_suggestion(key: str, known: Iterable[str]) -> str:
    """The same for dotted keys, where the last part must be near and the sections decide between equals.

    `lr`, `trian.lr` and `model.lr` all find `train.lr`; `log.every` finds all of `log` that end in `_every`.
    """
    sections, _, last = key.lower().rpartition(".")
    known = list(known)
    ends = [name for name in known if name.startswith(f"{sections}.") and name.endswith(f"_{last}")]
    if ends and key not in known:
        return f" Did you mean {' or '.join(ends)}?"

    def likeness(candidate: str) -> tuple[float, float]:
        there, _, name = candidate.lower().rpartition(".")
        return SequenceMatcher(None, last, name).ratio(), SequenceMatcher(None, sections, there).ratio()

    nearest = max(known, key=lambda candidate: sum(likeness(candidate)) if likeness(candidate)[0] >= 0.6 else 0.0)
    return f" Did you mean {nearest}?" if likeness(nearest)[0] >= 0.6 else ""


def resolve_name(name: str, folder: Path, suffix: str) -> Path:
    """The file that a bare name or a path stands for.

    Args:
        name: a path, or a name looked up in `folder`, with or without `suffix`. An existing path comes first.
        folder: for example CONFIGS / "model".
        suffix: for example ".yaml".

    Raises:
        ConfigError: nothing of that name; it lists the names there are and the nearest.
    """
    if Path(name).is_file():
        return Path(name)
    bare = name.removesuffix(suffix)
    if not folder.is_dir():
        raise ConfigError(
            f"{name}: no such file, and the folder of named configurations {folder} is missing. "
            "Run from a clone of the repository, or give the path of a file."
        )
    known = sorted(path.stem for path in folder.glob(f"*{suffix}"))
    if bare in known:
        return folder / f"{bare}{suffix}"
    raise ConfigError(
        f"{name}: no such file, and no such name in {folder}.{suggestion(bare, known)} Known: {', '.join(known)}."
    )
