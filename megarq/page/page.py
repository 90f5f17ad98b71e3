"""What the web page of an exported model does, without the web: questions as they are typed, drawings, refinements.

page = Page(generator, most=16)
visit = page.visit("key of a browser session")
drawing = page.draw(visit, Asked(subject="a seven", count="4", top_k="64", seed=""), progress)
drawing.pictures                        4 pictures; an empty seed is a random one, and drawing.asked tells it
page.refine(drawing, 2)                 picture 2 from its first 1, 2, .. D depths
drawing.save(2, folder)                 picture 2 as a PNG that tells how it was drawn
"""

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image
from torch import Tensor

from megarq.data.picture_set import LONGEST_PROMPT
from megarq.errors import ConfigError, TooLittleMemoryError
from megarq.inference.generator import ImageGenerator
from megarq.inference.options import per_depth
from megarq.inference.png import write_png

LONGEST_FIELD = 100
"""Characters of any other field."""
HISTORY = 20
"""Drawings of a session that are kept."""
KEPT = 2000
"""Pictures of all sessions' drawings that are kept; the oldest drawings are forgotten first."""
VISITS = 100
"""Sessions that are remembered; the one that was away longest is forgotten first."""
SEEDS = 2**31
"""A random seed is below."""

Progress = Callable[[int, int], object]
"""Told the stacks drawn, and how many there will be."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The visitor no longer wants the drawing."""


@dataclass(frozen=True)
class Asked:
    """A question, as typed. Empty fields are the model's own settings, and a random seed."""

    subject: str = ""
    """A caption, or the number of a class, or nothing, as the model's condition is."""
    count: str = "1"
    temperature: str = ""
    """This and the next two: one value, or one for each depth with commas between them."""
    top_k: str = ""
    top_p: str = ""
    guidance: str = ""
    seed: str = ""


@dataclass(frozen=True)
class Drawing:
    """Pictures, and how they were drawn."""

    number: int
    """1, 2, .. in the order that they were drawn in."""
    asked: Asked
    """The question, with the seed that was used."""
    facts: dict[str, Any]
    """The same as numbers, and the model's settings where none were given."""
    codes: Tensor
    """[B, H, W, D]"""
    pictures: Sequence[Image.Image]

    def save(self, index: int, folder: Path) -> Path:
        """Write one picture with its facts; the file's name tells the seed and the index."""
        path = folder / f"megarq-{self.facts['seed']}-{index}.png"
        write_png(path, self.pictures[index], {**self.facts, "index": index})
        return path


class Visit:
    """One browser session: its drawings, newest first, and whether the one at work is to stop."""

    def __init__(self) -> None:
        self.drawings: deque[Drawing] = deque(maxlen=HISTORY)
        self.shown: Drawing | None = None
        """The drawing that is looked at."""
        self.stopping = False


class Page:
    """A generator and its visitors. One thread at a time may draw; anyone may stop a visit."""

    def __init__(self, generator: ImageGenerator, most: int) -> None:
        """`most` bounds the pictures of one drawing."""
        self.generator = generator
        self.most = most
        self._visits: dict[str, Visit] = {}
        self._coming = Lock()
        self._drawn = 0

    def visit(self, key: str) -> Visit:
        """The visit of this key, new where there is none."""
        with self._coming:
            visit = self._visits.pop(key, None) or Visit()
            while len(self._visits) >= VISITS:
                self.leave(next(iter(self._visits)))
            self._visits[key] = visit
        return visit

    def leave(self, key: str) -> None:
        """End a visit, and what is being drawn for it."""
        if key in self._visits:
            self._visits.pop(key).stopping = True

    def close(self) -> None:
        """End all visits."""
        for key in list(self._visits):
            self.leave(key)

    def draw(self, visit: Visit, asked: Asked, progress: Progress) -> Drawing:
        """Draw what is asked, show it and put it before the visit's other drawings.

        Raises:
            ConfigError: a field that cannot be read, is too long or out of range, or that the model cannot follow, or
                pictures that do not fit its memory.
            Stopped: the visit is stopping.
        """
        subject, settings = self._read(asked)
        cond = self.generator.conditions(**subject).repeat_interleave(settings["count"], dim=0)
        drawn, total = 0, len(cond) * self.generator.positions

        def tell(stacks: int) -> None:
            nonlocal drawn
            if visit.stopping:
                raise Stopped
            drawn += stacks
            progress(drawn, total)

        sampling = {name: value for name, value in settings.items() if name != "count"}
        try:
            codes = self.generator.sample_codes(cond, **sampling, progress=tell)
            pictures = self.generator.decode(codes)
        except TooLittleMemoryError as error:
            raise ConfigError(f"{len(cond)} pictures do not fit the memory that is left: ask for fewer.") from error
        self._drawn += 1
        drawing = Drawing(
            number=self._drawn,
            asked=replace(asked, seed=str(settings["seed"])),
            facts={**{name: [value] for name, value in subject.items()}, **settings, **self.generator.facts},
            codes=codes,
            pictures=pictures,
        )
        visit.drawings.appendleft(drawing)
        visit.shown = drawing
        self._forget()
        return drawing

    def _forget(self) -> None:
        """Leave no more than KEPT pictures, and whatever is shown."""
        visits = list(self._visits.values())
        kept = sum(len(drawing.pictures) for visit in visits for drawing in visit.drawings)
        while kept > KEPT:
            oldest = min(
                (visit.drawings for visit in visits if visit.drawings), key=lambda drawings: drawings[-1].number
            )
            kept -= len(oldest.pop().pictures)

    def cut(self, drawing: Drawing) -> int | None:
        """Tokens of its caption, where the model does not read all of them."""
        tokenizer, captions = self.generator.tokenizer, drawing.facts.get("prompts")
        tokens = tokenizer.count(captions[0]) if tokenizer is not None and captions else 0
        return tokens if tokens > self.generator.transformer.config.cond_length else None

    def refine(self, drawing: Drawing, index: int) -> list[Image.Image]:
        """One picture of a drawing from its first 1, 2, .. D depths."""
        codes = drawing.codes[index : index + 1]
        depths = range(1, self.generator.transformer.config.depth + 1)
        return [picture for depth in depths for picture in self.generator.decode(codes, depth)]

    def _read(self, asked: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
        """The subject as `conditions` takes it, and the settings, with the model's own in place of empty ones."""
        config, own = self.generator.transformer.config, self.generator.sampling
        for name, text in vars(asked).items():
            longest = LONGEST_PROMPT if name == "subject" else LONGEST_FIELD
            if len(text) > longest:
                raise ConfigError(f"{name} of {len(text)} characters: give at most {longest}.")
        subject: dict[str, Any] = {}
        if config.condition == "text":
            subject = {"prompts": asked.subject}
        elif config.condition == "class":
            subject = {"classes": _read("class", asked.subject, int)}
        count = _read("count", asked.count, int)
        if not 1 <= count <= self.most:
            raise ConfigError(f"count={count}: give 1 to {self.most} pictures.")
        return subject, {
            "count": count,
            "temperature": _read("temperature", asked.temperature, per_depth(float), own.temperature),
            "top_k": _read("top_k", asked.top_k, per_depth(int), own.top_k or max(config.sizes)),
            "top_p": _read("top_p", asked.top_p, per_depth(float), own.top_p),
            "guidance": _read("guidance", asked.guidance, float, own.guidance),
            "seed": _read("seed", asked.seed, int, secrets.randbelow(SEEDS)),
        }


def _read(name: str, text: str, convert: Callable[[str], Any], default: Any = None) -> Any:
    """The value of a field; of an empty one the default, where there is one."""
    if not text.strip() and default is not None:
        return default
    try:
        return convert(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: give {'a whole number' if convert is int else 'a number'}.") from None
