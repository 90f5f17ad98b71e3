"""Batches of codes: the same for any ranks, workers and starts; draws, captions and classes as the contract says."""

import logging
from collections import Counter
from collections.abc import Callable
from itertools import count, islice, product

import numpy as np
import pytest
import torch

from megarq.data.code_shards import CodeShards
from megarq.data.loader import CodeBatch, CodeLoader, validation_batches
from megarq.data.mixture import MixedOrder, Mixture
from megarq.data.order import LoaderState, hash_array
from megarq.errors import DataError

MakeCodes = Callable[..., CodeShards]
BATCH = 24


def encode_caption(caption: str, seed: int | None) -> list[int]:
    """[number in the caption, 0 or 1 for which caption it is, 20 bits of the seed]."""
    digits = int("".join(filter(str.isdigit, caption)) or 0)
    return [digits, int("zweite" in caption), -1 if seed is None else seed % 2**20]


def mixed(codes: CodeShards | Mixture) -> Mixture:
    return codes if isinstance(codes, Mixture) else Mixture([codes])


def loader(codes: CodeShards | Mixture, **changes: object) -> CodeLoader:
    options: dict[str, object] = {
        "caption_encoder": encode_caption,
        "cond_length": 3,
        "condition": "text",
        "global_batch_size": BATCH,
        "seed": 5,
    }
    return CodeLoader(mixed(codes), **(options | changes))  # type: ignore[arg-type]


def take(codes: CodeShards | Mixture, count: int, **changes: object) -> list[CodeBatch]:
    return list(islice(loader(codes, **changes), count))


def rows(batch: CodeBatch) -> list[tuple[object, ...]]:
    """Everything about each sample of a batch, in order of the samples."""
    fields = (batch.sample_ids, batch.epochs, batch.codes, batch.cond, batch.weights)
    return sorted(map(tuple, torch.cat([field.reshape(len(field), -1).long() for field in fields], 1).tolist()))


def is_equal(a: CodeBatch, b: CodeBatch) -> bool:
    return torch.equal(a.sample_ids, b.sample_ids) and rows(a) == rows(b) and a.state == b.state


def collect(shares: list[list[CodeBatch]], step: int) -> list[tuple[object, ...]]:
    """The global batch of a step, put together from all ranks."""
    return sorted(row for share in shares for row in rows(share[step]))


class ManyLanes(Mixture):
    """A mixture read in small windows: with as many lanes as large data have, every worker of every rank has some."""

    def order(self, seed: int) -> MixedOrder:
        return MixedOrder([folder.block_sizes for folder in self.folders], self.counts, seed, window=24)


@pytest.fixture
def codes(make_codes: MakeCodes) -> CodeShards:
    """1,100 samples: four lanes."""
    return make_codes([[300, 20], [280], [300, 200]])


@pytest.fixture
def mixture(codes: CodeShards, make_codes: MakeCodes) -> Mixture:
    """Two folders with samples left out of the first, 1,080 samples once, and 700 half: 1,430 in an epoch, 59 lanes."""
    return ManyLanes([codes.without(range(290, 310)), make_codes([[400, 300]], name="more", draws=3)], [1, 0.5])


@pytest.fixture
def forkless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the parts of all workers made by turns in this process: forks cost a hundred times as much."""
    monkeypatch.setattr("megarq.data.loader.batches_in_order", lambda make, workers, prefetch: map(make, count()))


def assert_shared(
    data: CodeShards | Mixture, whole: list[CodeBatch], world_size: int, workers: int, start: LoaderState | None = None
) -> None:
    """That the ranks together get `whole`, which comes after `start`."""
    size = len(whole[0].sample_ids)
    options = {"global_batch_size": size, "world_size": world_size, "workers": workers, "start": start}
    shares = [take(data, len(whole), rank=rank, **options) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert all(len(share[step].sample_ids) == size // world_size for share in shares)
        assert all(share[step].state == batch.state for share in shares)
        assert collect(shares, step) == rows(batch), (step, world_size, workers)


COUNTS = list(product([1, 2, 3, 4, 8], [0, 1, 4]))
"""(ranks, workers of each)."""


@pytest.mark.usefixtures("forkless")
@pytest.mark.parametrize(("world_size", "workers"), COUNTS)
def test_ranks_and_workers_together_see_the_global_batches(mixture: Mixture, world_size: int, workers: int) -> None:
    assert_shared(mixture, take(mixture, 13, global_batch_size=120), world_size, workers)  # beyond the seam


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_s_files_are_those_of_its_first_epoch_s_samples(make_codes: MakeCodes, rank: int) -> None:
    codes = make_codes([[100]] * 11)  # four lanes: each rank has two
    options = {"rank": rank, "world_size": 2, "start": LoaderState(2, 0)}
    seen = [batch.sample_ids[batch.epochs == 2] for batch in take(codes, -(-1100 // BATCH), **options)]
    shards = sorted({number // 100 for number in torch.cat(seen).tolist()})
    files = loader(codes, **options).files()
    assert sorted(files) == [codes.folder / codes.manifest.shards[shard].file for shard in shards]
    assert all(path.stat().st_size == size for path, size in files.items())
    assert 0 < len(shards) < 11


def test_the_files_of_a_rank_without_a_lane_of_its_own_are_all(codes: CodeShards) -> None:
    assert len(loader(codes, rank=5, world_size=8).files()) == 3


def test_ranks_without_a_lane_of_their_own_take_what_the_others_have_too_much(codes: CodeShards) -> None:
    assert_shared(codes, take(codes, 48), world_size=8, workers=0)


@pytest.mark.parametrize(
    ("world_size", "workers"),
    [(1, 1), (1, 4), (2, 4), (3, 1), *(pytest.param(ranks, 4, marks=pytest.mark.full) for ranks in (3, 4, 8))],
)
def test_worker_processes_make_the_same_batches(mixture: Mixture, world_size: int, workers: int) -> None:
    _, before, *whole = take(mixture, 14, global_batch_size=120)  # beyond the seam
    assert_shared(mixture, whole, world_size, workers, before.state)


@pytest.mark.usefixtures("forkless")
def test_resuming_at_random_steps_on_another_number_of_ranks_and_workers_goes_on_exactly(mixture: Mixture) -> None:
    whole = take(mixture, 100)
    random = np.random.default_rng(0)
    for step, counts in zip(
        random.integers(1, 98, 20).tolist(), random.permutation([*COUNTS[1:], *COUNTS[1:7]]).tolist(), strict=True
    ):
        assert_shared(mixture, whole[step : step + 2], *counts, start=whole[step - 1].state)


def test_an_epoch_of_interruptions_loses_and_repeats_no_sample(mixture: Mixture) -> None:
    """Twenty restarts, each on another number of ranks, the last of them behind the seam."""
    state, seen, worlds = LoaderState(), [], [1, 2, 3, 4, 8]
    for turn in range(21):
        world_size = worlds[turn % len(worlds)]
        shares = [take(mixture, 3, rank=rank, world_size=world_size, start=state) for rank in range(world_size)]
        seen += [row for step in range(3) for row in collect(shares, step)]
        state = shares[0][-1].state
    assert state == LoaderState(1, 63 * BATCH - 1430)
    assert seen == [row for batch in take(mixture, 63) for row in rows(batch)]
    first_pass = [id for id, epoch, *_ in seen if id < 1100 and epoch == 0]
    assert sorted(first_pass) == sorted(set(range(1100)) - set(range(290, 310)))


def test_a_byte_of_codes_is_read_once_in_an_epoch(codes: CodeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    read_run = CodeShards.read_run

    def counted(self: CodeShards, block: int, first: int, draw: int, out: np.ndarray) -> None:
        read.extend((block, first + row) for row in range(len(out)))
        read_run(self, block, first, draw, out)

    monkeypatch.setattr(CodeShards, "read_run", counted)
    for rank in range(2):
        take(codes, 50, rank=rank, world_size=2, global_batch_size=22)
    assert len(read) == len(set(read)) == 1100


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
    codes = make_codes([[20, 20], [20, 20]], draws=3)
    batches = take(codes, 4, global_batch_size=80)
    for epoch, batch in enumerate(batches):
        blocks = batch.sample_ids.numpy() // 20
        expected = 1 + (hash_array(blocks, 5) % np.uint64(3) + np.uint64(epoch)) % np.uint64(3)
        draw = (batch.codes[:, 0, 0, 0] - batch.sample_ids) % 50 // 10
        assert draw.tolist() == expected.tolist()


def test_holding_out_shards_does_not_move_the_draws_of_the_others(make_codes: MakeCodes) -> None:
    """Each shard alone shows the draws that it shows in the whole folder."""
    codes = make_codes([[20], [20], [20], [20]], draws=3)
    batches = take(codes, 2, global_batch_size=40)
    shown = {int(id): row for batch in batches for id, row in zip(batch.sample_ids, batch.codes, strict=True)}
    for shard in range(4):
        (batch,) = take(codes.subset([shard]), 1, global_batch_size=20)
        assert all(torch.equal(shown[int(id)], row) for id, row in zip(batch.sample_ids, batch.codes, strict=True))


def test_all_captions_of_a_sample_take_turns(make_codes: MakeCodes) -> None:
    codes = make_codes([[40]])
    first, second = take(codes, 2, global_batch_size=40)
    turns = [dict(zip(batch.sample_ids.tolist(), batch.cond[:, 1].tolist(), strict=True)) for batch in (first, second)]
    assert all(turns[0][sample] != turns[1][sample] for sample in range(40))
    assert 0 < sum(turns[0].values()) < 40


def test_dropout_seeds_differ_between_samples_and_epochs(make_codes: MakeCodes) -> None:
    seeds = torch.cat([batch.cond[:, 2] for batch in take(make_codes([[40]]), 2, global_batch_size=40)])
    assert len(set(seeds.tolist())) == 80


def empty_captions(batches: list[CodeBatch]) -> set[tuple[int, int]]:
    """(sample, epoch) of the captions that were read as empty; sample 0, whose caption counts as 0, left out."""
    empty = {(id, epoch) for batch in batches for id, epoch, *_, number, _, _, _ in rows(batch) if number == 0}
    return {(id, epoch) for id, epoch in empty if id != 0}


def test_caption_dropout_empties_its_share_of_the_captions_and_others_in_every_epoch(make_codes: MakeCodes) -> None:
    codes = make_codes([[1000, 1000]])
    empty = empty_captions(take(codes, 2, global_batch_size=2000, caption_dropout=0.25))
    first, second = ({id for id, of in empty if of == epoch} for epoch in (0, 1))
    assert 440 < len(first) < 560 and 440 < len(second) < 560  # 500, with a deviation of 19
    assert 80 < len(first & second) < 170  # 125, with a deviation of 11
    assert not empty_captions(take(codes, 2, global_batch_size=2000))


@pytest.mark.usefixtures("forkless")
@pytest.mark.parametrize(("world_size", "workers"), [(1, 4), (2, 0), (3, 2)])
def test_caption_dropout_is_the_same_on_any_ranks_and_workers(mixture: Mixture, world_size: int, workers: int) -> None:
    options = {"global_batch_size": 120, "caption_dropout": 0.25}
    whole = empty_captions(take(mixture, 13, **options))
    shares = [
        take(mixture, 13, rank=rank, world_size=world_size, workers=workers, **options) for rank in range(world_size)
    ]
    assert whole and whole == set().union(*map(empty_captions, shares))


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


def validate(codes: CodeShards | Mixture, **changes: object) -> list[CodeBatch]:
    options: dict[str, object] = {
        "caption_encoder": encode_caption,
        "cond_length": 3,
        "condition": "text",
        "global_batch_size": BATCH,
    }
    return list(validation_batches(mixed(codes), **(options | changes)))  # type: ignore[arg-type]


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
