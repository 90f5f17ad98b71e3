"""Drawing a whole set of pictures, on any number of workers: a picture depends on the seed, its item and place alone.

    items --lay_out--> tars --take (locks)--> batches --sample, decode--> [rank, keep the best] --> SET/000000.tar ..

The batches of a tar have one size and do not cross tars, so that the bytes are the same whoever draws which tar. Where
each picture is a file of its own, a batch takes the place of a tar.

With keep_fraction f below 1, the items are taken in groups: a class's pictures together, a caption alone. A group of n
draws ceil(n / f) candidates, of which the n that the ranker scores highest are kept, in the order of their indices.
Candidate c of a group is take c // n of its item c % n: index `item + take * TAKE`. So the candidates of a group are
its own, those of a larger fraction are the first of those of a smaller one, and take 0 of all is the set without
ranking.
"""

import heapq
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from megarq.data.picture_set import Item, PictureSet, PictureSettings, Sample, items_digest
from megarq.errors import ConfigError, DataError
from megarq.inference.generator import ImageGenerator
from megarq.inference.model_folder import ModelInfo, model_fingerprint
from megarq.inference.settings import check_guidance, check_seed, depth_settings

Rank = Callable[[Sequence[Image.Image], Sequence[Item]], Sequence[float]]
"""From pictures and what each is to show to scores; the higher, the better."""
PICTURES_PER_TAR = 512
_BETWEEN_LISTINGS = 20
"""Times what a listing of the folder takes, between two of them."""
TAKE = 2**32
"""Between the indices of an item's takes: more than a set has items."""


def drawing_settings(
    model: Path,
    info: ModelInfo,
    items: Sequence[Item],
    *,
    seed: int,
    sampling: dict[str, Any],
    batch_size: int,
    dtype: str,
    threads: int,
    pictures_per_tar: int | None = PICTURES_PER_TAR,
    keep_fraction: float = 1.0,
    tp: int = 1,
) -> PictureSettings:
    """What the pictures of these items will be; the ranker, which costs more to make, is still to be told.

    model: the exported folder that `info` is of; sampling: as `chosen_sampling` takes it.
    Raises: ConfigError for a setting out of range, or a keep fraction without anything to rank by.
    """
    assert info.transformer is not None
    for name, value in (("--batch-size", batch_size), ("--pictures-per-tar", pictures_per_tar)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: give 1 or more.")
    if not 0 < keep_fraction <= 1:
        raise ConfigError(f"--keep-fraction {keep_fraction}: give a share above 0 and at most 1, such as 0.05.")
    if keep_fraction < 1 and info.transformer.condition == "none":
        raise ConfigError(
            f"--keep-fraction {keep_fraction}: nothing ranks pictures of a model without condition. Leave it out."
        )
    return PictureSettings(
        count=len(items),
        pictures_per_tar=pictures_per_tar,
        condition=info.transformer.condition,
        seed=check_seed(seed),
        sampling=chosen_sampling(info, sampling),
        batch_size=batch_size,
        dtype=dtype,
        threads=threads,
        model={
            "fingerprint": model_fingerprint(model),
            "name": model.resolve().name,
            "weights": info.weights,
            "step": info.step,
        },
        items=items_digest(items),
        keep_fraction=keep_fraction,
        ranker=None,
        resolution=info.rqvae.resolution,
        tp=tp,
    )


def chosen_sampling(info: ModelInfo, asked: Mapping[str, Any]) -> dict[str, Any]:
    """top_k, top_p, temperature and guidance: those asked for, and the model's own in place of None.

    Raises: ConfigError for one out of range, or guidance of a model without captions.
    """
    assert info.transformer is not None
    chosen = {name: own if asked.get(name) is None else asked[name] for name, own in asdict(info.sampling).items()}
    depth_settings(info.transformer.sizes, chosen["top_k"], chosen["top_p"], chosen["temperature"])
    chosen["guidance"] = check_guidance(chosen["guidance"], info.transformer.condition)
    return chosen


def lay_out(items: Sequence[Item], settings: PictureSettings) -> list[range]:
    """The pictures of each tar, or of each batch where there are no tars: full ones, but for the last; where candidates
    are ranked, whole groups.

    Raises: ConfigError for a group that no tar can hold.
    """
    size = settings.pictures_per_tar or settings.batch_size
    if settings.keep_fraction == 1:
        return [range(first, min(first + size, len(items))) for first in range(0, len(items), size)]
    tars: list[range] = []
    for group in groups(items, range(len(items))):
        if len(group) > size:
            raise ConfigError(
                f"--pictures-per-tar {size}: a class has {len(group)} pictures, which are ranked together. Use "
                f"--pictures-per-tar {len(group)} or more."
            )
        if tars and group.stop - tars[-1].start <= size:
            tars[-1] = range(tars[-1].start, group.stop)
        else:
            tars.append(group)
    return tars


def groups(items: Sequence[Item], places: range) -> list[range]:
    """The parts of `places` whose candidates are ranked together: runs of one class; a caption is a group alone."""
    found = []
    first = places.start
    for _, run in groupby(places, lambda place: place if items[place].label is None else ("class", items[place].label)):
        found.append(range(first, first := first + len(list(run))))
    return found


@dataclass(frozen=True, slots=True)
class Candidate:
    """A picture that may be drawn."""

    group: range
    """Places in the set that its group has."""
    place: int
    """Place of its item."""
    index: int
    """With the seed, all that is random about it."""


def candidate_count(kept: int, keep_fraction: float) -> int:
    """How many are drawn to keep so many."""
    return math.ceil(kept / Fraction(str(keep_fraction)))  # 0.05 is a twentieth, not its nearest float


def candidates(group: range, keep_fraction: float) -> list[Candidate]:
    """All candidates of a group, by index."""
    takes = (divmod(number, len(group)) for number in range(candidate_count(len(group), keep_fraction)))
    return [Candidate(group, group[place], group[place] + take * TAKE) for take, place in takes]


def draw_pictures(
    generator: ImageGenerator,
    items: Sequence[Item],
    pictures: PictureSet,
    *,
    rank: Rank | None = None,
    number: int = 0,
    workers: int = 1,
    progress: bool = True,
) -> bool:
    """Draw what of `pictures` nobody else has drawn or holds. Whether the set is complete at the end.

    generator: of the model and batch size that the set's settings tell. rank: scores candidates, where fewer are kept
    than drawn. number, workers: this process's place among those that share the folder; it only says where it begins.
    Held in memory are one batch, the best candidates of one group, and 256 pictures that are being written.
    Raises: ConfigError for items that the model cannot be asked for; DataError for a folder that cannot be written, or
    scores that are not finite.
    """
    drawer = _Drawer(generator, items, pictures.settings, rank)
    costs = [
        sum(candidate_count(len(group), pictures.settings.keep_fraction) for group in drawer.groups(tar))
        for tar in pictures.places
    ]
    with _Bar(pictures, costs, quiet=not progress) as bar, closing(pictures.take(number, workers)) as taken:
        for index in taken:
            bar.show(0)
            with closing(drawer.samples(pictures.places[index], bar.show)) as samples:
                pictures.write(index, samples)
    return pictures.finish()


class _Drawer:
    """Draws the pictures of any part of a set."""

    def __init__(
        self, generator: ImageGenerator, items: Sequence[Item], settings: PictureSettings, rank: Rank | None
    ) -> None:
        assert generator.batch_size == settings.batch_size and (rank is None) == (settings.keep_fraction == 1)
        self._generator, self._items, self._settings, self._rank = generator, items, settings, rank
        self._conditions = _conditions(generator, items, settings.condition)

    def groups(self, places: range) -> list[range]:
        """What is drawn together; without ranking, everything."""
        return [places] if self._rank is None else groups(self._items, places)

    def samples(self, places: range, drawn: Callable[[int], object]) -> Generator[Sample, None, None]:
        """The pictures of these places, in order; `drawn` is told how many candidates were drawn, after each batch."""
        if self._rank is None:
            plan = candidates(places, 1)
            yield from (Sample(self._items[one.place], picture) for one, picture, _ in self._draw(plan, None, drawn))
            return
        plan = [one for group in self.groups(places) for one in candidates(group, self._settings.keep_fraction)]
        for group, found in groupby(self._draw(plan, self._rank, drawn), lambda each: each[0].group):
            best = heapq.nlargest(len(group), found, key=lambda each: each[2])  # of equal ones the first
            best.sort(key=lambda each: each[0].index)
            for place, (one, picture, score) in zip(group, best, strict=True):
                yield Sample(self._items[place], picture, score, one.index)

    def _draw(
        self, plan: Sequence[Candidate], rank: Rank | None, drawn: Callable[[int], object]
    ) -> Generator[tuple[Candidate, Image.Image, float], None, None]:
        """All candidates of a tar, with their scores, batch by batch."""
        done = 0
        size = self._settings.batch_size
        for batch in (plan[first : first + size] for first in range(0, len(plan), size)):
            cond = self._conditions[[one.place for one in batch]]
            codes = self._generator.sample_codes(
                cond, **self._settings.sampling, seed=self._settings.seed, indices=[one.index for one in batch]
            )
            made = self._generator.decode(codes)
            scores = [0.0] * len(made) if rank is None else self._scores(rank, made, batch)
            yield from zip(batch, made, scores, strict=True)
            done += len(batch)
            drawn(done)

    def _scores(self, rank: Rank, made: list[Image.Image], batch: Sequence[Candidate]) -> list[float]:
        scores = [float(score) for score in rank(made, [self._items[one.place] for one in batch])]
        for score, one in zip(scores, batch, strict=True):
            if not math.isfinite(score):
                raise DataError(
                    f"the ranker gave {score} for candidate {one.index} of picture {one.place}. Check the weights "
                    "given to --ranker-weights."
                )
        return scores


def _conditions(generator: ImageGenerator, items: Sequence[Item], condition: str) -> Tensor:
    """Conditions [N, L] of all items. Raises ConfigError where the model cannot be asked for one of them."""
    if condition == "text":
        places: dict[str, int] = {}
        order = [places.setdefault(item.prompt or "", len(places)) for item in items]
        return generator.conditions(prompts=list(places))[order]
    if condition == "class":
        return generator.conditions(classes=[-1 if item.label is None else item.label for item in items])
    return generator.conditions().expand(len(items), -1)


class _Bar:
    """`drawing: 12% | 3600/30000 [1:02<7:30, 58 image/s]`: what all workers have drawn, as far as this one can see.

    Where the best of several candidates are kept, all candidates count.
    """

    def __init__(self, pictures: PictureSet, costs: Sequence[int], quiet: bool) -> None:
        """costs: candidates of each tar."""
        self._pictures, self._costs = pictures, costs
        self._interval = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=sum(costs),
            initial=self._done(),
            unit="image",
            desc="drawing",
            smoothing=0,  # the tars of other workers come in leaps
            mininterval=self._interval,
            disable=quiet,
        )
        self._next = time.monotonic() + self._interval

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._update(0)
        self._bar.close()

    def show(self, here: int) -> None:
        """Show where things stand, with `here` candidates drawn of the tar at work; lists the folder now and then."""
        if not self._bar.disable and time.monotonic() >= self._next:
            self._update(here)

    def _update(self, here: int) -> None:
        start = time.monotonic()
        self._bar.update(self._done() + here - self._bar.n)
        end = time.monotonic()
        self._next = end + max(self._interval, _BETWEEN_LISTINGS * (end - start))

    def _done(self) -> int:
        return sum(self._costs[index] for index in self._pictures.done())
