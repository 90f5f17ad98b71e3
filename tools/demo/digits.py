"""The demo's data: the 1,797 handwritten digits that scikit-learn ships, enlarged to 32x32 and captioned in many words.

    python tools/demo/digits.py --output runs/demo/images

writes OUTPUT/train/*.png with OUTPUT/train.csv (image, caption, label; one row for each caption), and the same for
"validation", every fifth digit of each class.
"""

import argparse
import csv
import sys
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from megarq import cli

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "a handwritten {word}",
    "the digit {number} in white on black",
    "a photo of the number {word}",
    "handwritten digit {number}",
    "a scan of a {word}",
    "somebody wrote the number {number}",
    "the numeral {word}, written by hand",
    "a picture of the digit {word}",
)
CAPTIONS_PER_IMAGE = 4
SIDE = 32


def caption(digit: int, wording: int) -> str:
    """One of the ways to ask for a digit."""
    return WORDINGS[wording].format(word=WORDS[digit], number=digit)


def enlarged(scan: np.ndarray) -> Image.Image:
    """An 8x8 scan of grey levels 0 to 16 as an RGB picture of 32x32."""
    grey = Image.fromarray((scan / 16 * 255).round().astype(np.uint8))
    return grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def split() -> dict[str, list[tuple[np.ndarray, int]]]:
    """(scan, digit) of the training and the validation part."""
    data = load_digits()
    parts: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "validation": []}
    seen = [0] * 10
    for scan, digit in zip(data.images, data.target.tolist(), strict=True):
        seen[digit] += 1
        parts["validation" if seen[digit] % 5 == 0 else "train"].append((scan, digit))
    return parts


def write_part(output: Path, name: str, scans: list[tuple[np.ndarray, int]], shuffle: bool, random: Random) -> None:
    """Write a part's pictures and captions; with `shuffle`, the captions of other pictures (the control)."""
    (output / name).mkdir(parents=True, exist_ok=True)
    asked = [digit for _, digit in scans]
    if shuffle:
        random.shuffle(asked)
    with (output / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "label"])
        for index, ((scan, digit), asked_digit) in enumerate(zip(scans, asked, strict=True)):
            image = f"{index:05d}.png"
            enlarged(scan).save(output / name / image)
            for wording in random.sample(range(len(WORDINGS)), CAPTIONS_PER_IMAGE):
                rows.writerow([image, caption(asked_digit, wording), digit])


def main(argv: list[str] | None = None) -> None:
    """Write both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shuffle-captions", action="store_true", help="the control: captions of other pictures")
    args = parser.parse_args(argv)
    random = Random(0)
    for name, scans in split().items():
        write_part(args.output, name, scans, args.shuffle_captions, random)
        print(f"{len(scans)} {name} pictures in {args.output / name}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
