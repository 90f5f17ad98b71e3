"""An RQ-VAE's reconstructions measured by the command, with the real networks and random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from captioned_tars import small_rqvae
from random_inception import write_inception
from random_vgg import write_vgg
from scored_pictures import write_pictures

from megarq.config.models import RQVAEConfig
from megarq.inference.pretrained import save_rqvae
from megarq.rqvae.model import RQVAE
from tests.end_to_end.commands import call_ranks, error_of, succeed

COUNT = 5


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """What is measured, but for --output: two batches and a part of one, so one of four ranks has nothing to do."""
    folder = tmp_path_factory.mktemp("reconstruction")
    small = small_rqvae(0)
    config = RQVAEConfig(**{**vars(small.config), "resolution": 16})
    save_rqvae(RQVAE(config).eval(), folder / "model")
    data = write_pictures(folder / "pictures", COUNT, 0, size=(18, 16))
    given = ("--feature-weights", write_inception(folder), "--perceptual-weights", write_vgg(folder))
    return (
        *("evaluation/reconstruction.py", "--model", folder / "model", "--data", data, "--transform", "center"),
        *(*given, "--batch-size", 2, "--depths"),
    )


def measured(folder: Path) -> tuple[dict[str, Any], bytes]:
    """(the result, but for the machine's load; the sheet)."""
    assert {path.name for path in folder.iterdir()} == {"scores.json", "reconstructions.png"}
    result = json.loads((folder / "scores.json").read_text())
    del result["machine"]
    return result, (folder / "reconstructions.png").read_bytes()


@pytest.fixture(scope="module")
def alone(command: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    folder = tmp_path_factory.mktemp("alone")
    succeed(*command, "--output", folder)
    return measured(folder)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_measures_the_same_bits(
    command: tuple[object, ...], alone: tuple[dict[str, Any], bytes], tmp_path: Path, ranks: int
) -> None:
    outcomes = call_ranks(*command, "--output", tmp_path, ranks=ranks)
    assert [outcome.status for outcome in outcomes] == [0] * ranks, outcomes
    assert "rfid" in outcomes[0].printed and not any(outcome.printed for outcome in outcomes[1:])
    assert measured(tmp_path) == alone
    assert set(alone[0]["metrics"]) == {"rfid", "psnr", "ssim", "lpips"} and alone[0]["metrics"]["rfid"]["value"] > 1


def test_a_picture_that_one_rank_cannot_read_stops_all(command: tuple[object, ...], tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "pictures", COUNT, 0, size=(16, 16))
    (data / "003.png").write_bytes(b"torn")
    place = command.index("--data") + 1
    changed = (*command[:place], data, *command[place + 1 :], "--metrics", "psnr", "--output", tmp_path / "out")
    outcomes = call_ranks(*changed, ranks=2)
    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
    assert "003.png: not a readable picture of 4 bytes" in outcomes[1].errors
    assert "rank 1 failed, so this one stops too" in error_of(outcomes[0])
    assert not list((tmp_path / "out").iterdir())
