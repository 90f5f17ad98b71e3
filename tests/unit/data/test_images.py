"""Batches of pictures for the RQ-VAE: the same for any ranks, workers and starts."""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarq.data.image_sources import open_images
from megarq.data.images import ImageLoader
from megarq.data.order import LoaderState
from megarq.errors import DataError


def images(tars: list[str], count: int, **changes: object) -> list[Tensor]:
    options: dict[str, object] = {"transform": "imagenet", "resolution": 8, "global_batch_size": 12, "seed": 3}
    loader = ImageLoader(open_images(tars), **(options | changes))  # type: ignore[arg-type]
    return [batch.images for batch in islice(loader, count)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_the_global_batches(image_tars: list[str], world_size: int) -> None:
    whole = images(image_tars, 4)
    shares = [images(image_tars, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(torch.equal(torch.cat(parts), batch) for *parts, batch in zip(*shares, whole, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(image_tars: list[str], workers: int) -> None:
    whole = images(image_tars, 3)
    assert all(torch.equal(a, b) for a, b in zip(images(image_tars, 3, workers=workers), whole, strict=True))


def test_an_epoch_has_every_picture_once(image_tars: list[str]) -> None:
    batches = images(image_tars, 2, global_batch_size=23, transform="none")
    assert all(len(torch.unique(batch.flatten(1), dim=0)) == 23 for batch in batches)
    assert not torch.equal(*batches)


def test_a_loader_resumes_at_the_state_of_a_batch(image_tars: list[str]) -> None:
    loader = ImageLoader(open_images(image_tars), "imagenet", 8, 12, seed=3)
    batches = list(islice(loader, 5))
    assert batches[1].state == LoaderState(1, 1)
    resumed = images(image_tars, 3, start=batches[1].state)
    assert all(torch.equal(a, b.images) for a, b in zip(resumed, batches[2:], strict=True))


def test_the_global_random_state_is_left_alone(image_tars: list[str]) -> None:
    before = torch.random.get_rng_state()
    images(image_tars, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_samples_per_epoch_counts_the_pictures(image_tars: list[str]) -> None:
    assert ImageLoader(open_images(image_tars), "none", 8, 4).samples_per_epoch == 23


def test_an_unreadable_picture_is_replaced(
    make_tar: Callable[[str, Mapping[str, bytes]], str], png: Callable[[int], bytes]
) -> None:
    tar = make_tar("b.tar", {"bad.png": png(2)[:-40], "good.png": png(1)})
    (batch,) = images([tar], 1, transform="none", global_batch_size=2)
    assert torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_counts_the_pictures_skipped_for_it(
    make_tar: Callable[[str, Mapping[str, bytes]], str], png: Callable[[int], bytes], workers: int
) -> None:
    tar = make_tar("b.tar", {"bad.png": b"no picture", "good.png": png(1), "last.png": png(2)})
    loader = ImageLoader(open_images([tar]), "none", 8, 3, workers=workers)
    assert [batch.skipped for batch in islice(loader, 4)] == [1] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_pictures_stop_with_the_plain_error(
    make_tar: Callable[[str, Mapping[str, bytes]], str], workers: int
) -> None:
    tar = make_tar("b.tar", {f"{number}.png": b"no picture" for number in range(12)})
    with pytest.raises(DataError, match=r"^11 bad samples of 11 seen.* or accept more by data\.max_bad_rate"):
        images([tar], 1, workers=workers)


def test_a_bad_picture_is_judged_once_however_many_epochs_it_comes_in(
    make_tar: Callable[[str, Mapping[str, bytes]], str], png: Callable[[int], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    tar = make_tar("b.tar", {"bad.png": b"no picture", "good.png": png(1), "last.png": png(2)})
    loader = ImageLoader(open_images([tar]), "none", 8, 3)
    assert [batch.skipped for batch in islice(loader, 20)] == [1] * 20
    assert caplog.text.count("skipped bad") == 1


def test_pictures_none_of_which_can_be_used_stop_the_run(
    make_tar: Callable[[str, Mapping[str, bytes]], str], png: Callable[[int], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    tar = make_tar("b.tar", {"a.png": png(1), "b.png": png(2)})
    with pytest.raises(DataError, match="none of 2 pictures can be used"):
        images([tar], 1, transform="none", resolution=16)
    assert "wrong size: a picture of 8x8 with transform none at resolution 16" in caplog.text
    assert "unreadable" not in caplog.text


def test_a_rate_is_named_by_the_key_of_a_run(image_tars: list[str]) -> None:
    with pytest.raises(DataError, match=r"^data\.max_bad_rate=1\.0: use a share"):
        images(image_tars, 1, max_bad_rate=1.0)


def test_a_batch_that_ranks_cannot_share_is_refused(image_tars: list[str]) -> None:
    with pytest.raises(DataError, match=r"train\.global_batch_size=12 cannot be shared by 5"):
        images(image_tars, 1, world_size=5)


def test_a_shard_that_vanishes_after_it_was_listed_is_done_without(image_tars: list[str]) -> None:
    source = open_images(image_tars)
    Path(image_tars[1]).unlink()
    batches = list(islice(ImageLoader(source, "none", 8, 23, max_bad_rate=0.5), 2))
    assert [len(torch.unique(batch.images.flatten(1), dim=0)) for batch in batches] == [16, 16]
    assert all(batch.skipped >= 7 for batch in batches)
