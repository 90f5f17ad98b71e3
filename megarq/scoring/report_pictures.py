"""Pictures for a report: which are shown, what stands under them, the reference's beside them, as small data URIs.

SET + result  ->  Gallery(samples=[Tile, ..], reference=[Tile, ..], best=[..], worst=[..])
"""

import base64
import io
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megarq.data.faults import Faults
from megarq.data.image_shards import IMAGE_EXTENSIONS, scan_samples, split_name
from megarq.data.image_sources import open_images
from megarq.data.pictures import Picture, Pictures, decode_plain, open_pictures
from megarq.data.transforms import decode_rgb, find_transform
from megarq.errors import DataError
from megarq.scoring.report_results import Result

SIDE = 160
"""Pixels of a thumbnail's longer side, at most."""
_JPEG_QUALITY = 82
_LONGEST_CAPTION = 400
_ELSEWHERE = "Give --images where they lie now, or --samples 0 for a page without pictures."


@dataclass(frozen=True)
class Tile:
    """One picture on the page."""

    source: str
    """data: URI of the thumbnail."""
    size: tuple[int, int]
    """Its width and height."""
    name: str
    """What it is, such as `generated picture 17`."""
    caption: str | None
    """Prompt or class."""
    index: int | None = None
    """Its place in its list."""
    score: float | None = None
    """CLIP score."""


@dataclass
class Gallery:
    """The pictures of one picture set."""

    labels: list[str]
    """The results that scored it."""
    samples: list[Tile]
    """Some of its pictures."""
    spread: bool
    """They are spread evenly over the set, not its first."""
    count: int
    """How many pictures the set has."""
    reference: list[Tile | None] = field(default_factory=list)
    """The reference's: beside each sample where `paired`, else a random sample."""
    paired: bool = False
    """The reference's pictures have the names of the samples' items."""
    note: str | None = None
    """Why there is no reference, or how its pictures were chosen."""
    best: list[Tile] = field(default_factory=list)
    """Those with the highest CLIP score, the highest first."""
    worst: list[Tile] = field(default_factory=list)
    """Those with the lowest, the lowest first."""


def choose(count: int, wanted: int, spread: bool) -> list[int]:
    """`wanted` of `count` places: spread evenly from the first on, or the first."""
    wanted = min(wanted, count)
    return [place * count // wanted if spread else place for place in range(wanted)]


def open_scored(result: Result, given: str | None) -> Pictures:
    """The pictures that a result scored; given: where they lie now.

    Raises: DataError where they are not there, or others.
    """
    path = given or result["images"]["path"]
    try:
        pictures = open_pictures(path)
    except DataError as error:
        if given:
            raise
        raise DataError(f"{result.path} scored pictures that cannot be shown: {error} {_ELSEWHERE}") from error
    if len(pictures) != result["count"]:
        raise DataError(
            f"{path} holds {len(pictures)} pictures, but {result.path} scored {result['count']}. {_ELSEWHERE}"
        )
    settings = pictures.settings or {}
    now = {"seed": settings.get("seed"), "model_fingerprint": (settings.get("model") or {}).get("fingerprint")}
    for name, value in now.items():
        if pictures.settings and result[name] != value:
            raise DataError(f"{path} has {name} {value}, but {result.path} scored {name} {result[name]}. {_ELSEWHERE}")
    return pictures


def make_gallery(
    results: Sequence[Result], pictures: Pictures, wanted: int, spread: bool, reference: str | None
) -> Gallery:
    """What is shown of a set. reference: pictures to stand beside, instead of those that the results name."""
    chosen = choose(len(pictures), wanted, spread)
    samples, records = _generated(pictures, [(index, None) for index in chosen])
    gallery = Gallery([result.label for result in results], samples, spread, len(pictures))
    scored = next((result for result in results if result["clip_scores"]), None)
    if scored:
        for name in ("best", "worst"):
            ranked = [(index, score) for index, score in scored["clip_scores"][name][:wanted]]
            beyond = [index for index, _ in ranked if not 0 <= index < len(pictures)]
            if beyond:
                raise DataError(
                    f"{scored.path} names picture {beyond[0]} of {len(pictures)} in its clip_scores. "
                    "Run score.py again."
                )
            setattr(gallery, name, _generated(pictures, ranked)[0])
    _add_reference(gallery, results, [record.get("id") for record in records], reference)
    return gallery


def _generated(pictures: Pictures, places: Sequence[tuple[int, float | None]]) -> tuple[list[Tile], list[Any]]:
    read = [pictures[index] for index, _ in places]
    records = _records(read) if pictures.kind == "set" else [{}] * len(read)
    tiles = []
    for picture, record, (index, score) in zip(read, records, places, strict=True):
        caption = picture.prompt
        if caption is None and record.get("class") is not None:
            caption = f"class {record['class']}"
        tiles.append(_tile(picture, f"generated picture {index}", caption, index, score))
    return tiles, records


def _tile(
    picture: Picture,
    name: str,
    caption: str | None,
    index: int | None = None,
    score: float | None = None,
    transform: str | None = None,
) -> Tile:
    """transform: what brought the picture to what the network saw."""
    try:
        image = decode_rgb(picture.data) if transform else decode_plain(picture.data)
        if transform:
            image = find_transform(transform)(image, min(*image.size, SIDE), random.Random(0))
    except DataError as error:
        reason = str(error).rpartition(". ")[0]
        raise DataError(f"picture {picture.name}: {reason}. Replace or remove it, and score again.") from error
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if caption and len(caption) > _LONGEST_CAPTION:
        caption = caption[:_LONGEST_CAPTION] + "…"
    return Tile(_data_uri(image), image.size, name, caption, index, score)


def _data_uri(image: Image.Image) -> str:
    """PNG or JPEG, whichever is smaller."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=_JPEG_QUALITY)
    kind, content = min((("png", png.getvalue()), ("jpeg", jpeg.getvalue())), key=lambda made: len(made[1]))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _records(pictures: Iterable[Picture]) -> list[dict[str, Any]]:
    """The .json beside each picture of a set."""
    places = [picture.name.rpartition("/") for picture in pictures]
    wanted = {(shard, key) for shard, _, key in places}
    records = {}
    for shard in {shard for shard, _ in wanted}:

        def take(tar: Any, member: Any, shard: str = shard) -> bytes:
            key, extension = split_name(member.name)
            return tar.extractfile(member).read() if extension == "json" and (shard, key) in wanted else b""

        for key, parts in scan_samples(shard, Faults(), take):
            content = json.loads(parts.get("json") or b"{}")  # open_pictures has read it before
            records[shard, key] = content if isinstance(content, dict) else {}
    return [records.get((shard, key), {}) for shard, _, key in places]


def _add_reference(gallery: Gallery, results: Sequence[Result], ids: Sequence[Any], given: str | None) -> None:
    """Reference pictures into the gallery, where they are at hand."""
    told = next((result for result in results if result["reference"]), None)
    named = told["reference"] if told else {}
    path = given or (named["path"] if named.get("kind") == "pictures" else None)
    if path is None or not gallery.samples:
        return
    try:
        reference = open_pictures(path)
    except DataError:
        if given:
            raise
        gallery.note = f"The reference pictures, {path}, are not at hand."
        return
    transform = named.get("transform")
    by_id = _find_named(reference, ids)
    if 2 * len(by_id) >= len(ids):  # a few could bear such a name by chance
        gallery.paired = True
        for place, sample in zip(ids, gallery.samples, strict=True):
            picture = by_id.get(place)
            name = f"reference picture for {sample.index}"
            gallery.reference.append(_tile(picture, name, sample.caption, transform=transform) if picture else None)
        return
    seed = (told["scored_seed"] if told else None) or 0
    places = random.Random(seed).sample(range(len(reference)), min(len(gallery.samples), len(reference)))
    gallery.note = f"A random sample of the {len(reference):,} reference pictures (seed {seed}): they are not paired."
    for place in places:
        picture = reference[place]
        gallery.reference.append(
            _tile(picture, f"reference picture {place}", picture.prompt, place, transform=transform)
        )


def _find_named(reference: Pictures, ids: Sequence[Any]) -> dict[Any, Picture]:
    """The reference's pictures by the ids that their names carry: `COCO_val2014_000000391895.jpg` has 391895.

    A name that two pictures carry is nobody's.
    """
    wanted = {str(name): name for name in ids if name is not None}
    if not wanted:
        return {}
    found: dict[str, list[int | Path]] = {}
    for place, stem in _names(reference):
        number = re.search(r"([0-9]+)$", stem)
        for name in {stem, stem.rpartition("/")[2], str(int(number[1])) if number else stem}:
            if name in wanted:
                found.setdefault(name, []).append(place)
    return {wanted[name]: _read(reference, places[0]) for name, places in found.items() if len(places) == 1}


def _names(reference: Pictures) -> list[tuple[int | Path, str]]:
    """(place, name without extension) of all pictures, without reading them."""
    if reference.kind == "folder":
        paths = Path(reference.source).rglob("*")
        return [(path, path.stem) for path in paths if path.suffix.lower()[1:] in IMAGE_EXTENSIONS]
    images = open_images([reference.source])
    return [(place, images.name(place)[1]) for place in range(len(images))]


def _read(reference: Pictures, place: int | Path) -> Picture:
    return reference[place] if isinstance(place, int) else Picture(place.read_bytes(), None, str(place))
