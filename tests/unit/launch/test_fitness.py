"""Ranks that are unlike each other, by threads that play them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from made_up_checkpoints import Ranks

from megarq.errors import ConfigError, FaultError, PreflightError
from megarq.launch import fitness
from megarq.launch.fitness import (
    DeviceReport,
    check_devices,
    check_refusals,
    code_facts,
    differing,
    named,
    read_clocks,
)
from megarq.launch.gather import Gather

HOSTS = ["node1", "node1", "node2", "node2"]
H100 = DeviceReport("cuda", "H100", "GPU-0", 78.0, 79.0, 2)
CPU = DeviceReport.of(torch.device("cpu"))


def everywhere(hosts: list[str], work: Callable[[int, Gather], Any]) -> Any:
    """What all ranks answer, or raise, alike."""
    answers = Ranks(len(hosts)).run(work)
    assert len({(type(answer), str(answer)) for answer in answers}) == 1, answers
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def of_devices(devices: list[DeviceReport], hosts: list[str] = HOSTS) -> Any:
    return everywhere(hosts, lambda rank, gather: check_devices(devices[rank], hosts, gather))


def four(**changes: Any) -> list[DeviceReport]:
    """A GPU for each rank; the last rank's with changes."""
    devices = [replace(H100, uuid=f"GPU-{rank}") for rank in range(4)]
    return [*devices[:3], replace(devices[3], **changes)]


def test_many_ranks_are_named_by_the_first():
    assert named([1, 2], HOSTS) == "rank 1 (node1), rank 2 (node2)"
    assert named(range(6), ["a"] * 6) == "rank 0 (a), rank 1 (a), rank 2 (a), rank 3 (a) and 2 more"


def test_equal_facts_do_not_differ():
    assert everywhere(HOSTS, lambda rank, gather: differing({"train.lr": 0.1}, HOSTS, gather)) is None


def test_the_ranks_that_differ_from_most_are_named_with_what_differs():
    facts = [{"train.lr": 0.1, "train.seed": 1}] * 4
    facts[1:3] = [{"train.lr": 0.2, "train.seed": 1}, {"train.lr": 0.3, "train.seed": 1}]
    found = everywhere(HOSTS, lambda rank, gather: differing(facts[rank], HOSTS, gather))
    assert found == "rank 1 (node1), rank 2 (node2): train.lr is 0.2 there and 0.1 elsewhere"


def test_many_facts_that_differ_are_counted():
    found = everywhere(HOSTS, lambda rank, gather: differing(dict.fromkeys("abcdef", rank == 3), HOSTS, gather))
    assert found.endswith("d is True there and False elsewhere and 2 more")


def test_changed_sources_are_other_code(tmp_path, monkeypatch):
    for name in ("errors.py", "launch/fitness.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one = 1\n")
    monkeypatch.setattr(fitness, "__file__", str(tmp_path / "launch" / "fitness.py"))
    before = code_facts()
    (tmp_path / "errors.py").write_text("one = 2\n")
    after = code_facts()
    assert [key for key in before if before[key] != after[key]] == ["sources of megarq"]
    assert before["torch"] == torch.__version__.partition("+")[0]


def test_sound_devices_need_no_warning():
    assert of_devices(four()) == []
    assert of_devices([CPU] * 4) == []


def test_a_rank_without_its_gpu_is_a_fault_of_its_host():
    with pytest.raises(FaultError, match=r"^no GPU on rank 3 \(node2\), unlike the other ranks"):
        of_devices([*four()[:3], CPU])


def test_a_gpu_that_does_not_answer_is_a_fault_of_its_host():
    with pytest.raises(FaultError, match=r"does not answer on rank 3 \(node2\) \(CUDA error: unspecified\)"):
        of_devices(four(failure="CUDA error: unspecified"))


def test_a_gpu_that_does_not_answer_is_reported_and_not_raised(monkeypatch):
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: unspecified\nwith advice")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert DeviceReport.of(torch.device("cuda", 0)).failure == "CUDA error: unspecified"


def test_a_host_that_has_a_gpu_less_than_others_is_at_fault():
    with pytest.raises(FaultError, match=r"one GPU for rank 2 \(node2\), rank 3 \(node2\): 2 ranks .* 2 GPU"):
        of_devices(four(uuid="GPU-2"))


def test_more_ranks_than_gpus_on_every_host_is_the_users_to_mend():
    devices = [replace(H100, uuid=f"GPU-{host}", visible=1) for host in HOSTS]
    with pytest.raises(PreflightError, match="2 ranks were started on node1, which shows them 1 GPUs. Start as many"):
        of_devices(devices)


def test_another_kind_of_gpu_is_told_of():
    (warning,) = of_devices(four(name="A100"))
    assert warning.startswith("a A100 on rank 3 (node2), on most ranks a H100")


def test_a_gpu_that_another_process_fills_is_told_of():
    (warning,) = of_devices(four(free_gib=20.0))
    assert warning.startswith("only 20.0 of 79.0 GiB free on the GPU of rank 3 (node2)")


def test_what_one_rank_refuses_is_a_fault_of_its_host():
    def refuse(rank: int, gather: Gather) -> None:
        check_refusals(ConfigError("no weights. Copy them.") if rank == 2 else None, HOSTS, gather)

    with pytest.raises(FaultError, match=r"on rank 2 \(node2\) alone: no weights. Copy them. Start on other nodes"):
        everywhere(HOSTS, refuse)


def test_what_all_ranks_refuse_is_raised_as_it_is():
    with pytest.raises(ConfigError, match="^no weights. Copy them.$"):
        everywhere(HOSTS, lambda rank, gather: check_refusals(ConfigError("no weights. Copy them."), HOSTS, gather))


def test_the_clock_that_is_furthest_from_the_others_is_found():
    def read(rank: int, gather: Gather) -> Any:
        return read_clocks(lambda value: gather(value if value is None else value - 30 * (rank == 2)))

    clocks = everywhere(HOSTS, read)
    assert clocks.furthest == 2 and -31 < clocks.offset < -29 and 29 < clocks.spread < 31
