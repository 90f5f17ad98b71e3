"""From a list of samples to webdataset tars, in parallel, resumable.

    ImageList (folders, zips, tables) or TarList (tars)  -->  write_image_shards  -->  shards.json, 00000.tar ..

Pictures are copied as they are and held one at a time. The bytes of the tars depend on the list, the files and the seed
of the shuffle alone. `shards.json` tells which list and settings the tars are of; a tar under its name is whole.
"""

import json
import tarfile
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megarq.data.batches import batches_in_order
from megarq.data.faults import Fault, Faults
from megarq.data.files import data_file
from megarq.data.order import IntArray, permutation
from megarq.errors import DataError
from megarq.files import write_atomically

FORMAT = "megarq-image-shards"


class Samples(Protocol):
    """A list of samples, each with a key of its own."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name of a sample in the shards."""
        ...

    def packed(self, index: int) -> bytes:
        """A sample as members of a tar, of whole blocks. Raises: OSError where it cannot be read."""
        ...

    def fingerprint(self) -> str:
        """A hash of the list."""
        ...


def write_image_shards(
    samples: Samples,
    output: Path,
    faults: Faults,
    *,
    samples_per_shard: int,
    prefix: str = "",
    shuffle_seed: int | None = 0,
    workers: int = 0,
) -> list[Path]:
    """Write `{prefix}00000.tar` .. with up to `samples_per_shard` samples each, those that are missing, by `workers`
    processes; shuffled unless the seed is None.

    Samples that cannot be read are skipped; a shard that lacks one gets its name only when all are written and the rate
    of faults is accepted. Raises: DataError above that rate, or where the folder holds shards of another list.
    """
    if samples_per_shard < 1:
        raise DataError(f"--samples-per-shard {samples_per_shard}: use 1 or more, such as 1000.")
    plan = {
        "format": FORMAT,
        "version": 1,
        "fingerprint": samples.fingerprint(),
        "samples": len(samples),
        "samples_per_shard": samples_per_shard,
        "shuffle_seed": shuffle_seed,
    }
    _claim(output, prefix, plan)
    order = None if shuffle_seed is None else permutation(len(samples), shuffle_seed)
    pack = _Packing(samples, order, samples_per_shard, output, prefix)
    missing = [number for number in range(pack.shards) if not pack.path(number).exists()]
    lacking: list[Path] = []
    done = len(samples) - sum(len(pack.places(number)) for number in missing)
    with tqdm(total=len(samples), initial=done, unit="image", desc="packing", delay=0.5) as bar:
        at_once = min(workers, len(missing))
        written = batches_in_order(lambda place: pack.write(missing[place]), at_once, len(missing))
        for number, wrong in zip(missing, written, strict=True):
            for key, kind, reason in wrong:
                faults.skip(pack.path(number).name, key, kind, reason)
            if wrong:
                lacking.append(pack.path(number))
            bar.update(len(pack.places(number)))
    faults.finish()
    for path in lacking:
        _pending(path).replace(path)
    return [pack.path(number) for number in range(pack.shards)]


def _claim(output: Path, prefix: str, plan: dict[str, Any]) -> None:
    """Say in `shards.json` what the folder is to hold, unless it holds something else."""
    record = output / f"{prefix}shards.json"
    there = sorted(output.glob(f"{escape(prefix)}[0-9][0-9][0-9][0-9][0-9].tar"))
    saved = None
    if record.exists():
        try:
            saved = json.loads(record.read_bytes())
        except ValueError as error:
            raise DataError(f"{record} is no JSON ({error}). Remove it with the shards beside it.") from error
    if there and saved != plan:
        raise DataError(
            f"{output} already holds {there[0].name} of another list of pictures, shard size or seed. "
            "Remove the old shards, or choose another --output or --prefix."
        )
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps(plan, indent=1) + "\n")


def _pending(path: Path) -> Path:
    return path.with_name(f".{path.name}.pending")


@dataclass(frozen=True)
class _Packing:
    """Which samples go into which shard."""

    samples: Samples
    order: IntArray | None
    size: int
    output: Path
    prefix: str

    @property
    def shards(self) -> int:
        return -(-len(self.samples) // self.size)

    def path(self, number: int) -> Path:
        return self.output / f"{self.prefix}{number:05d}.tar"

    def places(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, len(self.samples)))

    def write(self, number: int) -> list[tuple[str, Fault, str]]:
        """Write a shard and return (key, kind, reason) of the samples that it lacks; where there are some, it waits
        under its pending name."""
        path, wrong = self.path(number), []
        with data_file(_pending(path)) as file:
            for place in self.places(number):
                index = place if self.order is None else int(self.order[place])
                try:
                    packed = self.samples.packed(index)
                except OSError as error:
                    kind = Fault.MISSING_FILE if isinstance(error, FileNotFoundError) else Fault.UNREADABLE_IMAGE
                    wrong.append((self.samples.key(index), kind, str(error)))
                    continue
                file.write(packed)
            end = file.tell() + 2 * tarfile.BLOCKSIZE
            file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        if not wrong:
            _pending(path).replace(path)
        return wrong
