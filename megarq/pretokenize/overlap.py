"""Finding an evaluation set's captions and pictures among training samples, to leave those out of training.

    captions = CaptionIndex(read_captions(["captions_val2014.json"]), min_words=4)
    pictures = PictureIndex(*read_pictures(["val.tar"]), share=0.9)
    found = list(find_overlap(Path("codes"), captions, pictures, ["shards/00000.tar"]))
    write_exclusions(Path("exclude.txt"), found, header=["..."])

Captions match when they are equal after NFKC, case folding and turning everything but letters and digits into single
spaces. Pictures are looked for in the image shards of the codes, before any crop by chance: the centre square of each
becomes 9x9 grey levels, and T = 128 bits say where the level rises to the right and downwards. Pictures match when at
least a share of their bits are equal: if no more than m of T may differ, then of m + 1 bands of bits one at least is
equal as a whole, so hashes of bands find every candidate and only candidates are compared. Plain pictures match by
chance and are left out, and so are captions of few words.

Memory: the evaluation set and one training shard's bits; the training set streams by once.
"""

import csv
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from tqdm import tqdm

from megarq.data.batches import batches_in_order
from megarq.data.code_shards import CodeShards
from megarq.data.faults import Fault, Faults
from megarq.data.files import data_file, expand_shards
from megarq.data.image_shards import read_samples
from megarq.data.manifest import Manifest
from megarq.data.order import IntArray, UInt64Array, mix
from megarq.data.sources import source_name
from megarq.data.transforms import decode_rgb
from megarq.errors import DataError
from megarq.pretokenize.pictures import by_source_name

SIDE = 9
"""Width and height of the grey levels that are compared."""
STEP = 1.0
"""Grey levels, of 255, by which neighbours differ where it is no noise."""
PLAIN = 0.5
"""A picture in which a smaller share of neighbours differ is plain."""
JUDGED = 0.999
"""Rate of bad training pictures that is accepted here: pretokenize has judged them."""
PAIRS = 2**18
"""Pairs of pictures compared at once."""

Steps = npt.NDArray[np.float32]
"""Differences of neighbouring grey levels [n, T]."""
Bits = npt.NDArray[np.bool_]
"""Where the grey level rises [n, T]."""


@dataclass(frozen=True)
class Match:
    """A training sample that stands in the evaluation set."""

    sample: str
    """`000017.tar/KEY`."""
    kind: str
    """"caption" or "picture"."""
    reason: str
    """What it equals."""


def normalized(caption: str) -> str:
    """The words of a caption alone, in one case and one Unicode form, single spaces between them."""
    if not caption.isascii():
        caption = unicodedata.normalize("NFKC", caption)
    return re.sub(r"[\W_]+", " ", caption.casefold()).strip()


class CaptionIndex:
    """Normalized captions of the evaluation set."""

    def __init__(self, captions: Iterable[str], min_words: int = 4) -> None:
        """Captions of fewer words are left out: they match by chance."""
        self._captions, self.too_short = set[str](), 0
        for caption in captions:
            words = normalized(caption)
            if words.count(" ") + 1 < min_words or not words:
                self.too_short += 1
            else:
                self._captions.add(words)

    def __len__(self) -> int:
        return len(self._captions)

    def find(self, captions: Sequence[str]) -> str | None:
        """The first of a sample's captions that is in the evaluation set, normalized."""
        return next((words for words in map(normalized, captions) if words in self._captions), None)


def grey_steps(picture: Image.Image) -> Steps:
    """Differences of neighbouring grey levels [T] of the centre square: to the right, then downwards."""
    levels = np.asarray(ImageOps.fit(picture.convert("F"), (SIDE, SIDE), Image.Resampling.BOX))
    return np.concatenate([np.diff(levels, axis=1)[:-1].ravel(), np.diff(levels, axis=0)[:, :-1].ravel()])


class PictureIndex:
    """Bits of the evaluation set's pictures."""

    def __init__(self, names: Sequence[str], steps: Steps, share: float = 0.9) -> None:
        """steps: `grey_steps` [m, T]; share: of equal bits, from which pictures are the same.

        Raises: DataError for a share outside 0.8 .. 1.
        """
        if not 0.8 <= share <= 1:
            raise DataError(f"--share {share}: use a share of equal bits from 0.8 to 1, such as 0.9.")
        places = steps.shape[1]
        kept = np.flatnonzero((np.abs(steps) > STEP).mean(1) >= PLAIN)
        self.plain = len(steps) - len(kept)
        self._names = [names[number] for number in kept.tolist()]
        self._bits = steps[kept] > STEP
        self._most_different = int(places * (1 - share) + 1e-9)
        self._bands = np.array_split(np.arange(places), self._most_different + 1)
        hashed = [_band_hash(self._bits[:, band]) for band in self._bands]
        self._order = [np.argsort(values, kind="stable") for values in hashed]
        self._sorted = [values[order] for values, order in zip(hashed, self._order, strict=True)]

    def __len__(self) -> int:
        return len(self._names)

    def find(self, steps: Steps) -> dict[int, str]:
        """Steps [n, T] -> for each row that matches, the nearest picture and its share of equal bits."""
        best: dict[int, tuple[int, int]] = {}
        for row, picture, equal in self._matches(steps > STEP):
            best[row] = max(best.get(row, (0, 0)), (equal, -picture))
        places = steps.shape[1]
        return {
            row: f"{self._names[-picture]} ({equal / places:.0%})" for row, (equal, picture) in sorted(best.items())
        }

    def _matches(self, bits: Bits) -> Iterator[tuple[int, int, int]]:
        """(row, picture, equal bits) of all that match; some more than once."""
        for band, order, values in zip(self._bands, self._order, self._sorted, strict=True):
            asked = _band_hash(bits[:, band])
            starts = np.searchsorted(values, asked, "left")
            counts = np.searchsorted(values, asked, "right") - starts
            hits = np.flatnonzero(counts)
            for part in _parts(hits, counts, PAIRS):
                rows = np.repeat(part, counts[part])
                within = np.arange(len(rows)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
                pictures = order[starts[rows] + within]
                equal = (bits[rows] == self._bits[pictures]).sum(1)
                for pair in np.flatnonzero(equal >= bits.shape[1] - self._most_different):
                    yield int(rows[pair]), int(pictures[pair]), int(equal[pair])


def _parts(hits: IntArray, counts: IntArray, limit: int) -> list[IntArray]:
    """Split `hits` into runs whose counts sum to `limit` or little more."""
    steps = np.cumsum(counts[hits]) // limit
    return [part for part in np.split(hits, np.flatnonzero(np.diff(steps)) + 1) if len(part)]


def _band_hash(band: Bits) -> UInt64Array:
    """[n, places] -> uint64 [n]."""
    state = np.zeros(len(band), np.uint64)
    for column in band.T:
        state = mix(state ^ column.astype(np.uint64))
    return state


def find_overlap(
    folder: Path,
    captions: CaptionIndex | None,
    pictures: PictureIndex | None,
    images: Sequence[str] = (),
    *,
    workers: int = 0,
    progress: bool = True,
) -> Iterator[Match]:
    """The training samples of a code folder that are in either index, in order.

    images: the image shards that the codes were made from, to look for pictures.
    Raises: DataError for a missing or damaged folder or shard, or a source that is not among `images`.
    """
    manifest, sources = Manifest.load(folder), by_source_name(images)
    wanted = [record.source for record in manifest.shards if record.samples and pictures is not None]
    lacking = [source for source in wanted if source not in sources]
    if lacking:
        raise DataError(
            f"{len(lacking)} of the {len(wanted)} image shards of {folder}, such as {lacking[0]!r}, are not among "
            "--training-images. Give all that were pretokenized."
        )
    scan = _Scan(folder, manifest, captions, pictures, sources)
    shards = len(manifest.shards)
    with tqdm(total=manifest.samples, unit="sample", unit_scale=True, desc="overlap", disable=not progress) as bar:
        for number, matches in enumerate(batches_in_order(scan, min(workers, shards), stop=shards)):
            bar.update(manifest.shards[number].samples)
            yield from matches


@dataclass(frozen=True)
class _Scan:
    """One shard against both indices."""

    folder: Path
    manifest: Manifest
    captions: CaptionIndex | None
    pictures: PictureIndex | None
    sources: Mapping[str, str]

    def __call__(self, number: int) -> list[Match]:
        record, found = self.manifest.shards[number], []
        shard, near = CodeShards(self.folder, self.manifest, [number]), dict[str, str]()
        if self.pictures is not None and record.samples:
            keys, steps = _shard_pictures(self.sources[record.source], JUDGED, shard.settings.caption_field)
            near = {keys[row]: reason for row, reason in self.pictures.find(steps).items()}
        for block, rows in enumerate(shard.block_sizes.tolist()):
            texts = (shard.text_run(section, block, 0, rows) for section in ("keys", "captions"))
            for key, captions in zip(*texts, strict=True):
                same = self.captions.find(captions) if self.captions else None
                if same is not None:
                    found.append(Match(f"{record.file}/{key}", "caption", same))
                if key in near:
                    found.append(Match(f"{record.file}/{key}", "picture", near[key]))
        return found


def write_exclusions(path: Path, matches: Sequence[Match], header: Sequence[str]) -> int:
    """Write an exclusion list, one sample per line, below each reason; returns how many samples.

    Raises: DataError where it cannot be written.
    """
    reasons: dict[str, list[str]] = {}
    for match in matches:
        reasons.setdefault(match.sample, []).append(f"{match.kind}: {match.reason}")
    with data_file(path) as file:
        for line in header:
            file.write(f"# {line}\n".encode())
        for sample, why in reasons.items():
            file.write("".join(f"# {' '.join(reason.split())}\n" for reason in why).encode())
            file.write(f"{sample}\n".encode())
    return len(reasons)


def read_captions(sources: Sequence[str]) -> Iterator[str]:
    """The captions of COCO annotations or a list (.json), lines (.txt), tables (.csv .tsv), or image shards.

    Raises: DataError for a file that cannot be read or has no captions where they are expected.
    """
    for source in sources:
        suffix = Path(source).suffix.lower()
        if suffix not in _READERS:
            for shard in expand_shards(source):
                for sample in read_samples(shard, Faults()):
                    yield from sample.captions
            continue
        try:
            yield from _READERS[suffix](Path(source))
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise DataError(
                f"{source}: no captions can be read from it ({type(error).__name__}: {error}). Give COCO annotations "
                "or a list of strings (.json), lines (.txt), or a table with a column caption (.csv, .tsv), in UTF-8."
            ) from error


def _from_json(path: Path) -> Iterator[str]:
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    for entry in content["annotations"] if isinstance(content, dict) else content:
        caption = entry if isinstance(entry, str) else entry["caption"]
        if not isinstance(caption, str):
            raise ValueError(f"a caption is {caption!r}")
        yield caption


def _from_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        yield from file


def _from_table(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","):
            yield row["caption"] or ""


_READERS = {".json": _from_json, ".txt": _from_lines, ".csv": _from_table, ".tsv": _from_table}


def read_pictures(shards: Sequence[str], workers: int = 0, progress: bool = True) -> tuple[list[str], Steps]:
    """The readable pictures of image shards: names, and `grey_steps` [m, T].

    workers: processes that read shards. Raises: DataError for a missing shard, too many bad pictures in one, or none.
    """
    names: list[str] = []
    found: list[Steps] = []
    read = batches_in_order(lambda number: _shard_pictures(shards[number]), min(workers, len(shards)), len(shards))
    for shard, (keys, steps) in zip(
        shards, tqdm(read, total=len(shards), unit="shard", disable=not progress), strict=True
    ):
        names.extend(f"{source_name(shard)}/{key}" for key in keys)
        found.append(steps)
    if not names:
        raise DataError(f"no readable picture in {', '.join(shards)}. Give --images tars of the evaluation pictures.")
    return names, np.concatenate(found)


def _shard_pictures(
    shard: str, max_bad_rate: float = 0.01, caption_field: str | None = None
) -> tuple[list[str], Steps]:
    """Keys and `grey_steps` [n, T] of the pictures of a shard that can be decoded."""
    faults = Faults(max_bad_rate)
    keys: list[str] = []
    steps: list[Steps] = []
    for sample in read_samples(shard, faults, caption_field):
        try:
            steps.append(grey_steps(decode_rgb(sample.image)))
            keys.append(sample.key)
        except DataError as error:
            faults.skip(shard, sample.key, Fault.UNREADABLE_IMAGE, str(error))
    faults.finish()
    return keys, np.array(steps, np.float32).reshape(len(keys), 2 * (SIDE - 1) ** 2)
