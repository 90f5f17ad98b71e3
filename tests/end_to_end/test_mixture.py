"""Training on weighted folders with samples left out, by the real command: what counts as an epoch, and going on."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from megarq.data.code_shards import CodeShards
from tests.end_to_end.commands import Outcome, succeed
from tests.end_to_end.conftest import Walk

KEPT, HELD_OUT, BATCH = 24, 16, 16
"""Samples of the first folder that are trained on, and of each folder that are held out; samples in a batch."""


class Mixed(NamedTuple):
    run: Path
    said: str
    options: tuple[object, ...]
    """Of the command, but for --data and train.steps."""
    folders: tuple[Path, Path]


@pytest.fixture(scope="module")
def mixed(walk: Walk, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Five steps on 24 of a folder's samples, twice in an epoch, and 32 of another's."""
    folder = tmp_path_factory.mktemp("mixture")
    folders = (walk / "codes", shutil.copytree(walk / "codes", folder / "more"))
    codes = CodeShards.open(folders[0])
    first, second = (codes.text_run("keys", block, 0, 4) for block in range(2))
    listed = [*(f"000000.tar/{key}" for key in first), *second, "nowhere"]
    (folder / "exclude.txt").write_text("# of the first folder alone\n" + "\n".join(listed) + "\n", encoding="utf-8")
    options = (
        *("--ds_config", "zero1.json", "--model", walk / "rqtransformer.yaml"),
        *("--tokenizer", walk / "tokenizer.json", "--output", folder / "run"),
        *("--exclude-keys", f"{folders[0]}={folder / 'exclude.txt'}"),
    )
    ran = train(options, f"{folders[0]}:2", folders[1], steps=5)
    return Mixed(folder / "run", ran.printed + ran.errors, options, folders)


def train(options: tuple[object, ...], *data: object, steps: int) -> Outcome:
    return succeed("megarq/train.py", *options, "--data", *data, f"train.steps={steps}", "log.sample_every=0")


def epochs(run: Path) -> list[int]:
    """The epoch of every step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["epoch"] for line in lines if "loss" in line]


def test_samples_left_out_are_counted_and_keys_that_are_nowhere_named(mixed: Mixed) -> None:
    assert f"{mixed.folders[0]}: {48 - HELD_OUT - KEPT} of 48 samples are left out" in mixed.said
    assert "1 of 9 keys are in no shard, such as nowhere" in mixed.said
    assert f"{mixed.folders[1]}: " not in mixed.said


def test_an_epoch_is_as_many_passes_over_each_folder_as_its_weight_says(mixed: Mixed) -> None:
    length = 2 * KEPT + 32
    assert epochs(mixed.run) == [step * BATCH // length for step in range(1, 6)] == [0, 0, 0, 0, 1]


def test_going_on_with_other_weights_says_so(mixed: Mixed, tmp_path: Path) -> None:
    run = shutil.copytree(mixed.run, tmp_path / "run")
    resumed = train((*mixed.options, "--output", run), *mixed.folders, steps=7)
    assert "going on from step 5" in resumed.printed and len(epochs(run)) == 7
    before, now = (f"[{{'samples': {KEPT}, 'weight': {weight}, " for weight in (2.0, 1.0))
    changed = next(line for line in resumed.printed.splitlines() if "changed since the checkpoint: the data" in line)
    assert before in changed.split(" -> ")[0] and changed.split(" -> ")[1].startswith(now)
