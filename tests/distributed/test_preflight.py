"""What keeps a run from its first step, provoked on two ranks: both end alike, and are told on which of them it lies.

Each rank stands in a folder of its own, as on a node with its own disk, and names files relative to it.
"""

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS
from little_space import little_space
from tiny_runs import engine_run, tiny_config

from megarq.checkpoint.run_folder import checkpoint_at, checkpoints_folder
from megarq.config.faults import FaultConfig
from megarq.config.preflight import PreflightConfig
from megarq.config.run import CheckpointConfig
from megarq.engine import preflight, ranks
from megarq.engine.events import read_events
from megarq.engine.preflight import Preflight
from megarq.engine.state import EngineState
from megarq.errors import MegarqError
from megarq.launch.gather import over_store
from megarq.parallel.topology import ProcessGroups, Topology

FACTS: dict[str, object] = {"train.lr": 0.1, "train.seed": 0}
MIB = 2**20
Spoil = Callable[[pytest.MonkeyPatch], None]


@dataclass
class Told:
    """A log that keeps what it is told."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def say(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, step: int, warning: str) -> None:
        self.warnings.append(warning)

    def event(self, event: str, step: int, **values: Any) -> None:
        self.events.append({"event": event, "step": step, **values})


def checked(
    nodes: Path,
    check: Callable[[Preflight], object],
    spoil: Spoil | None = None,
    run: Path | None = None,
    config: PreflightConfig | None = None,
) -> Told | tuple[str, str]:
    """Meet, then `check`: what the log is told, or the kind of the error and its message; `spoil` is for rank 1."""
    rank = dist.get_rank()
    folder = nodes / f"node{rank}"
    folder.mkdir(exist_ok=True)
    gather = over_store(dist.FileStore(str(nodes / "store"), 2), rank, 2)
    faults = FaultConfig(hang_seconds=0, slow_factor=20)  # the tests' own ranks share few cores
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(socket, "gethostname", lambda: f"node{rank}")
        if spoil is not None and rank == 1:
            spoil(patch)
        try:
            it = Preflight(config or PreflightConfig(), rank, torch.device("cpu"), run, FACTS, faults)
            it.meet(gather)
            check(it)
        except MegarqError as error:
            return type(error).__name__, str(error)
        told = Told()
        it.tell(told, 7)
        return told


def no_more(it: Preflight) -> None:
    """Meeting is all."""


def collectives(it: Preflight, tp: int = 1) -> None:
    it.try_collectives(ProcessGroups.build(Topology(2, dist.get_rank(), tp)))


def collectives_of_tensor_ranks(it: Preflight) -> None:
    collectives(it, tp=2)


def other_code(patch: pytest.MonkeyPatch) -> None:
    facts = preflight.code_facts() | {"torch": "2.9.0"}
    patch.setattr(preflight, "code_facts", lambda: facts)


def other_configuration(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(FACTS, "train.lr", 0.2)


def late_clock(patch: pytest.MonkeyPatch) -> None:
    clock = time.time
    patch.setattr(time, "time", lambda: clock() - 90)


def wrong_sums(patch: pytest.MonkeyPatch) -> None:
    right = dist.all_reduce

    def wrong(tensor: torch.Tensor, group: Any = None) -> None:
        right(tensor, group=group)
        tensor[-1] += 1

    patch.setattr(dist, "all_reduce", wrong)


def wrong_sums_of_small_groups(patch: pytest.MonkeyPatch) -> None:
    right = dist.all_reduce

    def wrong(tensor: torch.Tensor, group: Any = None) -> None:
        right(tensor, group=group)
        tensor[-1] += group is not None

    patch.setattr(dist, "all_reduce", wrong)


def wrong_exchange(patch: pytest.MonkeyPatch) -> None:
    right = dist.batch_isend_irecv

    def wrong(operations: list[dist.P2POp]) -> list[Any]:
        for work in right(operations):
            work.wait()
        operations[1].tensor[3] += 0.5
        return []

    patch.setattr(dist, "batch_isend_irecv", wrong)


def more_work(patch: pytest.MonkeyPatch) -> None:
    """The probe of this rank is two hundred probes' work."""
    size, count = ranks._PROBE["cpu"]
    patch.setitem(ranks._PROBE, "cpu", (size, 200 * count))


def refused(answers: list[Any]) -> tuple[str, str]:
    """The kind of the error and its message, on both ranks."""
    assert answers[0] == answers[1] and isinstance(answers[0], tuple), answers
    return answers[0]


def passed(answers: list[Any]) -> Told:
    """What rank 0's log was told."""
    assert all(isinstance(answer, Told) for answer in answers), answers
    return answers[0]


def test_ranks_that_are_fit_are_told_of_in_a_line_and_an_event(rank_group, tmp_path):
    run = tmp_path / "run"
    told = passed(rank_group(2).run(checked, tmp_path, collectives, None, run))
    assert re.fullmatch(
        r"preflight: 2 ranks on 2 hosts, clocks within [\d.e-]+ ms, all_reduce \S+ GB/s, \S+ s", *told.lines
    )
    (event,) = told.events
    assert (event["event"], event["step"], event["ranks"], event["slow_ranks"]) == ("preflight", 7, 2, [])
    assert event["all_reduce_mib"] == 1 and event["all_reduce_gbs"] > 0 and event["all_reduce_latency_ms"] > 0
    assert event["slowest_neighbour_host"] == f"node{event['slowest_neighbour']}"
    assert event["slowest_neighbour_gbs"] <= event["neighbours_gbs"]
    assert told.warnings == [] and list(run.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_code, r"the ranks run different code; rank 1 \(node1\): torch is 2\.9\.0 there and .* elsewhere\. "),
        (
            other_configuration,
            r"configured differently; rank 1 \(node1\): train.lr is 0\.2 there and 0\.1 elsewhere\. ",
        ),
    ],
)
def test_a_rank_that_was_given_something_else_is_named_with_it(rank_group, tmp_path, spoil, message):
    kind, text = refused(rank_group(2).run(checked, tmp_path, no_more, spoil, tmp_path / "run"))
    assert kind == "PreflightError" and re.search(message, text)
    assert not (tmp_path / "run").exists()


def test_what_fails_is_an_event_of_the_run(rank_group, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").write_text('{"time": 1.0, "event": "started", "step": 40}\n')
    _, text = refused(rank_group(2).run(checked, tmp_path, no_more, other_configuration, run))
    event = read_events(run)[-1]
    assert (event["event"], event["step"], event["text"]) == ("failed", 40, f"preflight: {text}")


def test_a_clock_that_is_late_is_told_of(rank_group, tmp_path):
    told = passed(rank_group(2).run(checked, tmp_path, no_more, late_clock))
    (warning,) = told.warnings
    assert re.match(r"the clock of rank 0 \(node0\) is (89\.\d|90|90\.\d) s ahead, preflight.max_clock_skew_s", warning)


def test_clocks_may_be_as_far_apart_as_is_allowed(rank_group, tmp_path):
    config = PreflightConfig(max_clock_skew_seconds=100)
    told = passed(rank_group(2).run(checked, tmp_path, no_more, late_clock, None, config))
    assert told.warnings == [] and 89 < told.events[0]["clock_spread_seconds"] < 91


@pytest.mark.parametrize(
    ("spoil", "check", "whom"),
    [
        (wrong_sums, collectives, "all ranks"),
        (wrong_sums_of_small_groups, collectives, "the data-parallel ranks"),
        (wrong_sums_of_small_groups, collectives_of_tensor_ranks, "the tensor-parallel ranks"),
    ],
)
def test_a_rank_that_receives_a_wrong_sum_is_named(rank_group, tmp_path, spoil, check, whom):
    kind, text = refused(rank_group(2).run(checked, tmp_path, check, spoil))
    assert kind == "FaultError" and text.startswith(f"a wrong sum from all_reduce over {whom} on rank 1 (node1). ")


def test_a_rank_that_receives_other_numbers_than_were_sent_is_named(rank_group, tmp_path):
    kind, text = refused(rank_group(2).run(checked, tmp_path, collectives, wrong_exchange))
    assert kind == "FaultError" and text.startswith("other numbers than the rank before sends on rank 1 (node1). ")


def test_an_all_reduce_that_is_too_slow_ends_the_run(rank_group, tmp_path):
    config = PreflightConfig(min_bandwidth_gbs=1e6, all_reduce_mib=0.5)
    kind, text = refused(rank_group(2).run(checked, tmp_path, collectives, None, None, config))
    assert kind == "FaultError"
    assert re.match(r"all_reduce of 0\.5 MiB over 2 ranks has a bus bandwidth of \S+ GB/s, preflight\.min_band", text)
    assert re.search(r"slowest with the ranks beside it is rank [01] \(node[01]\), at", text)


def test_a_rank_whose_own_work_takes_longer_is_told_of(rank_group, tmp_path):
    told = passed(rank_group(2).run(checked, tmp_path, collectives, more_work))
    assert told.events[0]["slow_ranks"] == [1]
    assert any("ms on rank 1 (node1): all wait for it" in warning for warning in told.warnings)


def test_a_folder_that_the_ranks_do_not_share_is_refused(rank_group, tmp_path):
    kind, text = refused(rank_group(2).run(checked, tmp_path, no_more, None, Path("run")))
    assert kind == "PreflightError"
    assert text.startswith("what is written into run on rank 1 (node1) does not come to rank 0 (node0): ")


def test_a_rank_that_cannot_write_into_the_run_is_a_fault_of_its_host(rank_group, tmp_path):
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "run").write_text("in the way")
    kind, text = refused(rank_group(2).run(checked, tmp_path, no_more, None, Path("run")))
    assert kind == "FaultError" and text.startswith("run cannot be written on rank 1 (node1) (File exists)")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards that both nodes have, on disks of their own."""
    for node in ("node0", "node1"):
        (tmp_path / node / "codes").mkdir(parents=True)
        for name in ("manifest.json", "00000.tar", "00001.tar"):
            (tmp_path / node / "codes" / name).write_bytes(b"content of " + name.encode())
    return tmp_path


def see_codes(it: Preflight) -> None:
    it.see([Path("codes"), Path("codes/manifest.json"), Path("missing/everywhere")], contents=True)


def read_codes(it: Preflight) -> None:
    it.read({Path(f"codes/0000{dist.get_rank()}.tar"): 20})


def see_and_read_codes(it: Preflight) -> None:
    see_codes(it)
    read_codes(it)


def test_files_that_all_ranks_have_are_counted(rank_group, shards):
    told = passed(rank_group(2).run(checked, shards, see_and_read_codes))
    assert told.events[0]["files_read"] == 2 and told.warnings == []


def test_a_manifest_that_one_rank_lacks_is_a_fault_of_its_host(rank_group, shards):
    (shards / "node1" / "codes" / "manifest.json").unlink()
    kind, text = refused(rank_group(2).run(checked, shards, see_codes))
    assert kind == "FaultError"
    assert "rank 1 (node1): codes/manifest.json is missing (No such file or directory) there and 24 bytes of" in text


def test_a_manifest_of_the_same_size_and_other_content_is_another(rank_group, shards):
    (shards / "node1" / "codes" / "manifest.json").write_bytes(b"another manifest, as big")
    kind, text = refused(rank_group(2).run(checked, shards, see_codes))
    assert kind == "FaultError" and "codes/manifest.json is 24 bytes of sha256" in text


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file or directory"), (b"torn", "4 bytes in place of 20")]
)
def test_a_shard_that_only_its_reader_lacks_is_a_fault_of_the_host(rank_group, shards, content, reason):
    shard = shards / "node1" / "codes" / "00001.tar"
    shard.unlink()
    if content is not None:
        shard.write_bytes(content)
    kind, text = refused(rank_group(2).run(checked, shards, read_codes))
    assert kind == "FaultError"
    assert text.startswith(f"codes/00001.tar cannot be read on rank 1 (node1) ({reason}); on rank 0 (node0) it can. ")


def test_a_shard_that_no_rank_has_is_the_users_to_mend(rank_group, shards):
    for node in ("node0", "node1"):
        (shards / node / "codes" / "00001.tar").unlink()
    kind, text = refused(rank_group(2).run(checked, shards, read_codes))
    assert kind == "PreflightError"
    assert text.startswith("codes/00001.tar cannot be read on rank 1 (node1) (No such file or directory), nor on any ")


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[None]:
    """A disk of its own at `folder`, while the body runs."""
    with little_space(folder, kib * 1024):
        if not folder.is_mount():
            pytest.skip("a small disk must be mounted")
        yield
    subprocess.run(["umount", str(folder)], check=True)


def room_for_a_checkpoint_of_100_kib(it: Preflight) -> None:
    it.make_room(100 * 1024, CheckpointConfig(keep=2), saves=10)


@pytest.mark.parametrize(
    ("kib", "there", "fit", "warned"),
    [(450, 0, 4, False), (250, 0, 2, True), (250, 1, 2, False), (150, 2, 1, False)],
)
def test_space_is_wanted_for_one_more_checkpoint_than_is_kept(rank_group, tmp_path, kib, there, fit, warned):
    with small_disk(tmp_path / "run", kib):
        for step in range(there):
            (checkpoints_folder(tmp_path / "run") / f"step-{step:08d}").mkdir(parents=True)
        answers = rank_group(2).run(checked, tmp_path, room_for_a_checkpoint_of_100_kib, None, tmp_path / "run")
    told = passed(answers)
    assert told.events[0]["checkpoints_that_fit"] == fit and f"space for {fit} checkpoint" in told.lines[0]
    assert bool(told.warnings) == warned
    if warned:
        assert "and 3 more are to lie there at once (checkpoint.keep=2)" in told.warnings[0]


def test_a_disk_that_one_checkpoint_does_not_fit_on_is_refused(rank_group, tmp_path):
    with small_disk(tmp_path / "run", 64):
        answers = rank_group(2).run(checked, tmp_path, room_for_a_checkpoint_of_100_kib, None, tmp_path / "run")
    kind, text = refused(answers)
    assert kind == "PreflightError" and "run has 6.1e-05 GiB free, a checkpoint takes 9.54e-05" in text


def test_what_an_unfinished_save_left_is_free(rank_group, tmp_path):
    with small_disk(tmp_path / "run", 200):
        left = checkpoints_folder(tmp_path / "run") / ".step-00000004.tmp"
        left.mkdir(parents=True)
        (left / "rank-00000.safetensors").write_bytes(bytes(120 * 1024))
        answers = rank_group(2).run(checked, tmp_path, room_for_a_checkpoint_of_100_kib, None, tmp_path / "run")
    assert passed(answers).events[0]["checkpoints_that_fit"] == 2


def bytes_to_save(*args: Any) -> int:
    """What this rank expects to save, before the first step; the run goes on to its end."""
    expected: list[int] = []
    start = EngineState.__init__

    def counted(self: EngineState, *given: Any) -> None:
        start(self, *given)
        expected.append(self.saved_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineState, "__init__", counted)
        engine_run(*args)
    return expected[0]


@pytest.mark.parametrize("layout", ["tp2 dp2 ZeRO-1", "dp2 ZeRO-3", "pp2 dp2 ZeRO-1"])
def test_the_bytes_of_a_checkpoint_are_known_before_the_first_step(rank_group, tmp_path, layout):
    tested = LAYOUTS[layout]
    config = replace(tiny_config(ema_decay=0.8, steps=2), checkpoint=CheckpointConfig(keep=1))
    expected = tested.on(rank_group).run(bytes_to_save, tmp_path / "run", config, tested.ds, tested.parallel)
    checkpoint = checkpoint_at(tmp_path / "run")
    kinds = ("param", "exp_avg", "exp_avg_sq", "ema", "buffer")
    saved = [checkpoint.tensor(name, kind).nbytes for kind in kinds for name in checkpoint.names(kind)]
    assert sum(expected) == sum(saved) > 0
