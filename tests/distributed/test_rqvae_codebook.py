"""Two ranks, each with half of the batch, keep one codebook: that of one process with the whole batch."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarq.rqvae.quantizer import ResidualQuantizer

DIM, STEPS, RANKS = 4, 6, 2
SETTINGS = {
    "shared": {"sizes": (24, 24, 24), "shared": True},
    "per depth": {"sizes": (24, 12, 6), "shared": False},
    "fewer latents than codes": {"sizes": (200, 200), "shared": True},
}
SHARES = {"even": (8, 8), "uneven": (11, 5)}
CASES = [(setting, share) for setting in SETTINGS for share in SHARES]


def train(setting: str, mine: slice) -> dict[str, Tensor]:
    """The quantizer's buffers after some training steps on this rank's part of each batch, and its last codes."""
    quantizer = ResidualQuantizer(dim=DIM, seed=3, **SETTINGS[setting]).train()
    for step in range(STEPS):
        batch = torch.randn(16, 2, 2, DIM, generator=torch.Generator().manual_seed(step))
        codes = quantizer(batch[mine]).codes
    return {**quantizer.state_dict(), "codes": codes}


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # ranks need not agree about the global generator
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = {}
    for setting, share in CASES:
        first = SHARES[share][0]
        results[setting, share] = train(setting, slice(first) if rank == 0 else slice(first, None))
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("codebook")
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank_main, args=(rank, folder)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * RANKS
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def buffers(result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in result.items() if name != "codes"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_agree_bit_for_bit(results: list[dict], case: tuple[str, str]) -> None:
    for name, tensor in buffers(results[0][case]).items():
        assert torch.equal(tensor, results[1][case][name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_have_the_codebook_of_one_process(results: list[dict], case: tuple[str, str]) -> None:
    for name, tensor in buffers(train(case[0], slice(None))).items():
        torch.testing.assert_close(results[0][case][name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_have_the_codes_of_one_process(results: list[dict], case: tuple[str, str]) -> None:
    codes = torch.cat([result[case]["codes"] for result in results])
    assert torch.equal(codes, train(case[0], slice(None))["codes"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_have_restarted(results: list[dict], case: tuple[str, str]) -> None:
    counts = [tensor for name, tensor in results[0][case].items() if name.endswith("cluster_size_ema")]
    assert all((count >= 1).all() for count in counts) and any((count == 1).any() for count in counts)
