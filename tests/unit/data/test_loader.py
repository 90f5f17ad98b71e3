"""Batches of codes: the same for any ranks, workers and starts; draws, captions and classes as the contract says."""

import logging
from collections import Counter
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch

from megarq.data.code_shards import CodeShards
from megarq.data.loader import CodeBatch, CodeLoader, validation_batches
from megarq.data.order import LoaderState, sample_hash
from megarq.errors import DataError

MakeCodes = Callable[..., CodeShards]
BATCH = 24


def encode_caption(caption: str, seed: int | None) -> list[int]:
    """[number in the caption, 0 or 1 for which caption it is, 20 bits of the seed]."""
    digits = int("".join(filter(str.isdigit, caption)) or 0)
    return [digits, int("zweite" in caption), -1 if seed is None else seed % 2**20]


def loader(codes: CodeShards, **changes: object) -> CodeLoader:
    options: dict[str, object] = {
        "caption_encoder": encode_caption,
        "cond_length": 3,
        "condition": "text",
        "global_batch_size": BATCH,
        "seed": 5,
    }
    return CodeLoader(codes, **(options | changes))  # type: ignore[arg-type]


def take(codes: CodeShards, count: int, **changes: object) -> list[CodeBatch]:
    return list(islice(loader(codes, **changes), count))


def rows(batch: CodeBatch) -> list[tuple[object, ...]]:
    """Everything about each sample of a batch, in order of the samples."""
    fields = (batch.sample_ids, batch.epochs, batch.codes.flatten(1), batch.cond, batch.weights)
    return sorted(tuple(str(field[i].tolist()) for field in fields) for i in range(len(batch.sample_ids)))


def is_equal(a: CodeBatch, b: CodeBatch) -> bool:
    return torch.equal(a.sample_ids, b.sample_ids) and rows(a) == rows(b) and a.state == b.state


@pytest.fixture
def codes(make_codes: MakeCodes) -> CodeShards:
    """1,100 samples: four lanes."""
    return make_codes([[300, 20], [280], [300, 200]])


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_ranks_together_see_the_global_batches(codes: CodeShards, world_size: int) -> None:
    whole = take(codes, 50)
    shares = [take(codes, 50, rank=rank, world_size=world_size) for rank in range(world_size)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert all(len(part.sample_ids) == BATCH // world_size and part.state == batch.state for part in parts)
        assert sorted(row for part in parts for row in rows(part)) == rows(batch)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(codes: CodeShards, workers: int) -> None:
    assert all(is_equal(a, b) for a, b in zip(take(codes, 6), take(codes, 6, workers=workers), strict=True))


def test_resuming_at_random_steps_on_another_number_of_ranks_goes_on_exactly(codes: CodeShards) -> None:
    whole = take(codes, 100)
    for step in np.random.default_rng(0).integers(1, 98, 20).tolist():
        state = whole[step - 1].state
        parts = [take(codes, 2, start=state, rank=rank, world_size=3) for rank in range(3)]
        for ahead in range(2):
            assert sorted(row for part in parts for row in rows(part[ahead])) == rows(whole[step + ahead])


def test_each_epoch_has_each_sample_once(codes: CodeShards) -> None:
    seen = torch.cat([batch.sample_ids for batch in take(codes, 2 * 1100 // BATCH + 1)]).tolist()
    assert sorted(seen[:1100]) == sorted(seen[1100:2200]) == list(range(1100))
    assert seen[:1100] != seen[1100:2200]


def test_states_count_samples_across_the_epoch_seam(codes: CodeShards) -> None:
    states = [batch.state for batch in take(codes, 46)]
    assert states[0] == LoaderState(0, 24) and states[44] == LoaderState(0, 1080) and states[45] == LoaderState(1, 4)


def test_shapes_and_types_are_those_of_the_model(codes: CodeShards) -> None:
    (batch,) = take(codes, 1)
    assert batch.codes.shape == (BATCH, 2, 2, 3) and batch.codes.dtype == torch.int64
    assert batch.cond.shape == (BATCH, 3) and batch.cond.dtype == torch.int64
    assert batch.latents is None and batch.weights.tolist() == [1.0] * BATCH


def test_codes_captions_and_ids_belong_together(codes: CodeShards) -> None:
    (batch,) = take(codes, 1, targets="argmin")
    assert torch.equal(batch.codes[:, 0, 0, 0], batch.sample_ids % 50)
    assert torch.equal(batch.cond[:, 0], batch.sample_ids)


def test_draws_take_turns_by_hash_and_epoch(make_codes: MakeCodes) -> None:
    codes = make_codes([[40]], draws=3)
    batches = take(codes, 4, global_batch_size=40)
    for epoch, batch in enumerate(batches):
        ids = batch.sample_ids
        expected = 1 + (sample_hash(5, ids.numpy()) % np.uint64(3) + np.uint64(epoch)) % np.uint64(3)
        draw = (batch.codes[:, 0, 0, 0] - ids) % 50 // 10
        assert draw.tolist() == expected.tolist()


def test_all_captions_of_a_sample_take_turns(make_codes: MakeCodes) -> None:
    codes = make_codes([[40]])
    first, second = take(codes, 2, global_batch_size=40)
    turns = [dict(zip(batch.sample_ids.tolist(), batch.cond[:, 1].tolist(), strict=True)) for batch in (first, second)]
    assert all(turns[0][sample] != turns[1][sample] for sample in range(40))
    assert 0 < sum(turns[0].values()) < 40


def test_dropout_seeds_differ_between_samples_and_epochs(make_codes: MakeCodes) -> None:
    seeds = torch.cat([batch.cond[:, 2] for batch in take(make_codes([[40]]), 2, global_batch_size=40)])
    assert len(set(seeds.tolist())) == 80


def test_another_seed_gives_another_order(codes: CodeShards) -> None:
    assert not torch.equal(take(codes, 1)[0].sample_ids, take(codes, 1, seed=6)[0].sample_ids)


def test_classes_are_the_condition(codes: CodeShards) -> None:
    (batch,) = take(codes, 1, condition="class", cond_length=1, caption_encoder=None)
    assert torch.equal(batch.cond, (batch.sample_ids % 7).unsqueeze(1))


def test_no_condition_is_zeros(codes: CodeShards) -> None:
    (batch,) = take(codes, 1, condition="none", cond_length=1, caption_encoder=None)
    assert torch.equal(batch.cond, torch.zeros(BATCH, 1, dtype=torch.int64))


def test_soft_targets_bring_latents_beside_argmin_codes(make_codes: MakeCodes) -> None:
    (batch,) = take(make_codes([[40]]), 1, targets="soft")
    assert batch.latents is not None and batch.latents.dtype == torch.float16
    assert torch.equal(batch.latents[:, 0, 0, 0].long(), batch.sample_ids)
    assert torch.equal(batch.codes[:, 0, 0, 0], batch.sample_ids)


def test_draws_without_draws_name_the_remedy(make_codes: MakeCodes) -> None:
    with pytest.raises(DataError, match=r"Set objective\.targets=argmin"):
        loader(make_codes([[40]], draws=0))


def test_soft_targets_without_latents_name_the_remedy(make_codes: MakeCodes) -> None:
    with pytest.raises(DataError, match="Pretokenize with --latents"):
        loader(make_codes([[40]], latent_shape=None), targets="soft")


def test_a_class_model_refuses_samples_without_class(make_codes: MakeCodes) -> None:
    with pytest.raises(DataError, match=r"40 of 40 samples .* have none"):
        loader(make_codes([[40]], labelled=False), condition="class", cond_length=1)


def test_a_text_model_refuses_data_without_any_caption(make_codes: MakeCodes) -> None:
    with pytest.raises(DataError, match=r"no sample in .* has one"):
        loader(make_codes([[40]], captioned=False))


def test_samples_without_caption_train_as_empty_with_a_warning(
    make_codes: MakeCodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes = make_codes([[40]], captioned=False)
    monkeypatch.setattr(CodeShards, "captioned", 39)
    with caplog.at_level(logging.WARNING):
        (batch,) = take(codes, 1)
    assert "1 of 40 samples" in caplog.text and batch.cond[:, 0].eq(0).all()


def test_a_batch_that_ranks_cannot_share_is_refused(codes: CodeShards) -> None:
    with pytest.raises(DataError, match=r"train\.global_batch_size=24 cannot be shared by 5"):
        loader(codes, world_size=5)


def test_a_start_in_other_data_is_refused(codes: CodeShards) -> None:
    with pytest.raises(DataError, match="saved on other data"):
        loader(codes, start=LoaderState(0, 5000))


def test_a_worker_passes_its_error_on_unchanged(codes: CodeShards) -> None:
    def refuse(caption: str, seed: int | None) -> list[int]:
        raise DataError("no such caption")

    with pytest.raises(DataError, match=r"^no such caption$"):
        take(codes, 1, caption_encoder=refuse, workers=1)


def validate(codes: CodeShards, **changes: object) -> list[CodeBatch]:
    options: dict[str, object] = {
        "caption_encoder": encode_caption,
        "cond_length": 3,
        "condition": "text",
        "global_batch_size": BATCH,
    }
    return list(validation_batches(codes, **(options | changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_weighs_every_sample_once(make_codes: MakeCodes, world_size: int) -> None:
    codes = make_codes([[30, 3], [17]])
    per_rank = [validate(codes, rank=rank, world_size=world_size) for rank in range(world_size)]
    weighed: Counter[int] = Counter()
    for batches in per_rank:
        assert [len(batch.sample_ids) for batch in batches] == [BATCH // world_size] * 3
        for batch in batches:
            weighed.update(batch.sample_ids[batch.weights > 0].tolist())
    assert weighed == Counter(range(50))


def test_validation_is_the_same_every_time_and_without_dropout(make_codes: MakeCodes) -> None:
    codes = make_codes([[30, 3], [17]])
    first, second = validate(codes), validate(codes)
    assert all(is_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all((batch.cond[:, 2] == -1).all() for batch in first)


def test_validation_of_a_view_uses_its_samples_alone(make_codes: MakeCodes) -> None:
    _, held_out = make_codes([[30, 3], [17]]).split(1)
    assert held_out is not None
    (batch,) = validate(held_out)
    assert batch.sample_ids[:17].tolist() == list(range(33, 50)) and batch.weights.sum() == 17
