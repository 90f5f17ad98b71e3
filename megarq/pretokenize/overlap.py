"""Finding an evaluation set's captions and pictures among training samples, to leave those out of training.

    captions = CaptionIndex(read_captions(["captions_val2014.json"]), min_words=4)
    pictures = PictureIndex(*encode_pictures(["val.tar"], rqvae, settings), share=0.9)
    found = list(find_overlap(Path("codes"), captions, pictures))
    write_exclusions(Path("exclude.txt"), found, header=["..."])

Captions match when they are equal after NFKC, case folding and turning everything but letters and digits into single
spaces. Pictures match when at least a share of the T = H * W argmin codes of the first depth are equal, place by place:
if no more than m of T places may differ, then of m + 1 bands of places one at least is equal as a whole, so hashes of
bands find every candidate and only candidates are compared. A plain picture (few different codes) matches any other
plain picture by chance and is left out, and so is a caption of few words.

Memory: the evaluation set alone; the training set streams by once.
"""

import csv
import json
import re
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from megarq.data.batches import batches_in_order
from megarq.data.faults import Faults
from megarq.data.files import data_file, expand_shards
from megarq.data.image_shards import read_samples
from megarq.data.manifest import CodeSettings, Manifest
from megarq.data.order import IntArray, UInt64Array, mix
from megarq.data.sources import source_name
from megarq.errors import DataError
from megarq.pretokenize.decoder import Decoder
from megarq.pretokenize.encoder import BlockEncoder
from megarq.pretokenize.shard_check import tar_blocks
from megarq.rqvae.model import RQVAE

PLAIN = 8
"""A picture with fewer different codes than one in this many places is plain."""
PAIRS = 2**20
"""Pairs of pictures compared at once."""

Maps = npt.NDArray[np.uint16]
"""First-depth argmin codes [n, T]."""


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


class PictureIndex:
    """First-depth code maps of the evaluation set's pictures."""

    def __init__(self, names: Sequence[str], codes: Tensor, share: float = 0.9) -> None:
        """codes: argmin stacks [m, H, W, D]; share: of equal first-depth codes, from which pictures are the same.

        Raises: DataError for a share outside 0.5 .. 1.
        """
        if not 0.5 <= share <= 1:
            raise DataError(f"--share {share}: use a share of equal codes from 0.5 to 1, such as 0.9.")
        maps: Maps = codes[..., 0].flatten(1).numpy().astype(np.uint16)
        places = maps.shape[1]
        different = np.array([len(np.unique(row)) for row in maps])
        kept = np.flatnonzero(different * PLAIN >= places)
        self.plain = len(maps) - len(kept)
        self._names = [names[number] for number in kept.tolist()]
        self._maps = maps[kept]
        self._most_different = int(places * (1 - share) + 1e-9)
        self._bands = np.array_split(np.arange(places), self._most_different + 1)
        hashed = [_band_hash(self._maps[:, band]) for band in self._bands]
        self._order = [np.argsort(values, kind="stable") for values in hashed]
        self._sorted = [values[order] for values, order in zip(hashed, self._order, strict=True)]

    def __len__(self) -> int:
        return len(self._names)

    def find(self, codes: npt.NDArray[np.uint16]) -> dict[int, str]:
        """Argmin stacks [n, H, W, D] -> for each row that matches, the nearest picture and its share of equal codes."""
        maps = np.ascontiguousarray(codes[..., 0].reshape(len(codes), -1))
        best: dict[int, tuple[int, int]] = {}
        for row, picture, equal in self._matches(maps):
            best[row] = max(best.get(row, (0, 0)), (equal, -picture))
        places = maps.shape[1]
        return {
            row: f"{self._names[-picture]} ({equal / places:.0%})" for row, (equal, picture) in sorted(best.items())
        }

    def _matches(self, maps: Maps) -> Iterator[tuple[int, int, int]]:
        """(row, picture, equal places) of all that match; some more than once."""
        for band, order, values in zip(self._bands, self._order, self._sorted, strict=True):
            asked = _band_hash(maps[:, band])
            starts = np.searchsorted(values, asked, "left")
            counts = np.searchsorted(values, asked, "right") - starts
            hits = np.flatnonzero(counts)
            for part in _parts(hits, counts, PAIRS):
                rows = np.repeat(part, counts[part])
                within = np.arange(len(rows)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
                pictures = order[starts[rows] + within]
                equal = (maps[rows] == self._maps[pictures]).sum(1)
                for pair in np.flatnonzero(equal >= maps.shape[1] - self._most_different):
                    yield int(rows[pair]), int(pictures[pair]), int(equal[pair])


def _parts(hits: IntArray, counts: IntArray, limit: int) -> list[IntArray]:
    """Split `hits` into runs whose counts sum to `limit` or little more."""
    steps = np.cumsum(counts[hits]) // limit
    return [part for part in np.split(hits, np.flatnonzero(np.diff(steps)) + 1) if len(part)]


def _band_hash(band: Maps) -> UInt64Array:
    """[n, places] -> uint64 [n]."""
    state = np.zeros(len(band), np.uint64)
    for column in band.T:
        state = mix(state ^ column.astype(np.uint64))
    return state


def find_overlap(
    folder: Path,
    captions: CaptionIndex | None,
    pictures: PictureIndex | None,
    *,
    workers: int = 0,
    progress: bool = True,
) -> Iterator[Match]:
    """The training samples of a code folder that are in either index, in order.

    Raises: DataError for a missing or damaged folder or shard.
    """
    manifest = Manifest.load(folder)
    scan = _Scan(folder, manifest, captions, pictures)
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

    def __call__(self, number: int) -> list[Match]:
        path, found = self.folder / self.manifest.shards[number].file, []
        try:
            for block in tar_blocks(path):
                content = json.loads(block.content("samples.json"))
                near = self.pictures.find(block.array("codes.npy")) if self.pictures else {}
                for row, (key, texts) in enumerate(zip(content["keys"], content["captions"], strict=True)):
                    same = self.captions.find(texts) if self.captions else None
                    if same is not None:
                        found.append(Match(f"{path.name}/{key}", "caption", same))
                    if row in near:
                        found.append(Match(f"{path.name}/{key}", "picture", near[row]))
        except (tarfile.TarError, OSError, ValueError, KeyError) as error:
            raise DataError(
                f"code shard {path} cannot be read ({error}). Check the folder with tools/verify_codes.py."
            ) from error
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


def encode_pictures(
    sources: Sequence[str], rqvae: RQVAE, settings: CodeSettings, workers: int = 0, progress: bool = True
) -> tuple[list[str], Tensor]:
    """The readable pictures of image shards: names, and argmin stacks int64 [m, H, W, D].

    settings: how the training set was encoded; workers: processes that decode JPEGs.
    Raises: DataError for a missing shard, too many bad pictures, or none.
    """
    ours = replace(settings, caption_field=None, compiled=False)
    encoder = BlockEncoder(rqvae, ours, next(rqvae.parameters()).device)
    names: list[str] = []
    codes: list[Tensor] = []
    faults = Faults()
    with Decoder(ours, workers) as decoder, tqdm(unit="picture", desc="encode", disable=not progress) as bar:
        for shard in sources:
            for batch in decoder.batches(shard, faults):
                names.extend(f"{source_name(shard)}/{sample.key}" for sample in batch.samples)
                codes.append(rqvae.quantize(encoder.encode(batch.pictures)).cpu())
                bar.update(len(batch.samples))
    faults.finish()
    if not codes:
        raise DataError(f"no readable picture in {', '.join(sources)}. Give --images tars of the evaluation pictures.")
    return names, torch.cat(codes)
