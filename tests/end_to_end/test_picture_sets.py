"""Picture sets drawn by the commands: on any number of ranks, killed and begun again, not a bit differs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from captioned_tars import contents
from safetensors.torch import load_file, save_file
from tiny_drawing import COUNT, TARS, drawing_command, prompts_command

from megarq.data.picture_set import PictureSettings
from tests.end_to_end.commands import ON_CPU, ROOT, call_ranks, start_ranks, succeed, typed

SECONDS = 120


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return drawing_command(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one rank draws, as the deepspeed launcher starts it."""
    output = tmp_path_factory.mktemp("undisturbed") / "set"
    said = succeed(*command, "--output", output, "--local_rank=0").printed
    assert f"{output}: {COUNT} pictures in {TARS} tars, complete" in said
    return contents(output)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_draws_the_same_bits(
    command: tuple[str, ...], undisturbed: dict[str, bytes], tmp_path: Path, ranks: int
) -> None:
    outcomes = call_ranks(*command, "--output", tmp_path / "set", ranks=ranks)
    assert [outcome.status for outcome in outcomes] == [0] * ranks, outcomes
    assert "image" in outcomes[0].errors and not any(outcome.errors for outcome in outcomes[1:])
    assert any("complete" in outcome.printed for outcome in outcomes)
    assert contents(tmp_path / "set") == undisturbed


def test_torchrun_draws_the_same_bits(command: tuple[str, ...], undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    launcher = Path(sys.executable).with_name("torchrun")
    started = [launcher, "--standalone", "--nproc_per_node", 2, *command, "--output", tmp_path / "set"]
    done = subprocess.run(
        [*map(str, started)], cwd=ROOT, env={**os.environ, **ON_CPU}, text=True, capture_output=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "set") == undisturbed


def test_the_launcher_of_deepspeed_draws_the_same_bits(
    command: tuple[str, ...], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    assert "complete" in typed(*command, "--output", tmp_path / "set", ranks=2)
    assert contents(tmp_path / "set") == undisturbed


def killed(command: tuple[str, ...], output: Path, ranks: int, more: int) -> tuple[int, int]:
    """Kill all ranks while they are at work with `more` tars done; (tars done, tars half made)."""
    wanted = len(list(output.glob("*.tar"))) + more
    forks = start_ranks(*command, "--output", output, ranks=ranks, log=output.with_suffix(".log"))
    deadline = time.monotonic() + SECONDS
    while len(list(output.glob("*.tar"))) < wanted or not list(output.glob(".*.tmp")):
        assert time.monotonic() < deadline and any(fork.is_alive() for fork in forks), "no moment to kill at"
        time.sleep(0.001)
    for fork in forks:
        fork.kill()
    for fork in forks:
        fork.join(SECONDS)
    return len(list(output.glob("*.tar"))), len(list(output.glob(".*.tar.tmp")))


def test_two_kills_leave_no_trace(command: tuple[str, ...], undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "set"
    kills = [killed(command, output, ranks, more=3) for ranks in (2, 1)]
    assert all(0 < done < TARS for done, _ in kills) and any(torn for _, torn in kills), (
        f"no kill in the middle: {kills}"
    )
    assert not PictureSettings.load(output)[1]
    assert all(outcome.status == 0 for outcome in call_ranks(*command, "--output", output, ranks=2))
    assert contents(output) == undisturbed


def test_a_file_of_prompts_is_drawn_on_after_a_kill_with_the_same_bytes(tmp_path: Path) -> None:
    command = prompts_command(tmp_path)
    said = succeed(*command, "--output", tmp_path / "undisturbed").printed
    assert f"{COUNT} pictures, complete" in said
    output = tmp_path / "set"
    (fork,) = start_ranks(*command, "--output", output, ranks=1, log=tmp_path / "log")
    deadline = time.monotonic() + SECONDS
    while len(list(output.glob("*.png"))) < COUNT // 4:
        assert time.monotonic() < deadline and fork.is_alive(), "no moment to kill at"
        time.sleep(0.001)
    fork.kill()
    fork.join(SECONDS)
    there = {path: path.stat().st_mtime_ns for path in output.glob("*.png")}
    assert COUNT // 4 <= len(there) < COUNT and not PictureSettings.load(output)[1]
    assert all(outcome.status == 0 for outcome in call_ranks(*command, "--output", output, ranks=2))
    assert contents(output) == contents(tmp_path / "undisturbed")
    kept = [path for path, time_ns in there.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(there) - 2  # at most the batch that was torn is made anew


def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    command, output = prompts_command(tmp_path), tmp_path / "set"
    drawing = subprocess.Popen(
        [sys.executable, *command, "--count", "1000", "--output", output],
        cwd=ROOT,
        env={**os.environ, **ON_CPU},
        text=True,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + SECONDS
    while not list(output.glob("*.png")):
        assert time.monotonic() < deadline and drawing.poll() is None
        time.sleep(0.01)
    drawing.send_signal(signal.SIGINT)
    _, errors = drawing.communicate(timeout=SECONDS)
    assert drawing.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted"
    assert not list(output.glob(".*.tmp"))


def test_two_ranks_share_a_model_and_draw_what_one_draws(tmp_path: Path) -> None:
    many = prompts_command(tmp_path)
    few = (*many[:2], "--prompt", "a seven", "--count", "4", "--seed", "5")
    for name, command in (("many", many), ("few.png", few)):
        succeed(*command, "--output", tmp_path / "alone" / name)
        outcomes = call_ranks(*command, "--tp", "2", "--output", tmp_path / "shared" / name, ranks=2)
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
        assert outcomes[0].printed and not outcomes[1].printed
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for folder, ranks in ((alone, 1), (shared, 2)):
        settings = json.loads((folder / "many" / "pictures.json").read_text())
        assert settings.pop("tp") == ranks
        (folder / "many" / "pictures.json").write_text(json.dumps(settings))
    assert contents(alone / "many") == contents(shared / "many")
    assert (alone / "few.png").read_bytes() == (shared / "few.png").read_bytes()


def test_weights_that_are_not_finite_are_told_in_one_line_where_ranks_share_them(tmp_path: Path) -> None:
    command = prompts_command(tmp_path)
    file = Path(command[1]) / "model.safetensors"
    weights = load_file(file)
    weights["head.0.ln1.weight"][0] = float("nan")
    save_file(weights, file)
    first, second = call_ranks(*command, "--tp", "2", "--output", tmp_path / "set", ranks=2)
    assert first.status == second.status == 2 and not second.errors, (first, second)
    assert "not finite in torch.float32" in first.errors and "Traceback" not in first.errors


def test_a_model_is_shared_by_all_ranks_of_a_job_or_not_at_all(tmp_path: Path) -> None:
    outcomes = call_ranks(*prompts_command(tmp_path), "--tp", "4", "--output", tmp_path / "many", ranks=2)
    assert all(outcome.status == 2 for outcome in outcomes), outcomes
    assert "--tp 4 in a job of 2 ranks" in outcomes[0].errors and "torchrun --nproc_per_node 4" in outcomes[0].errors
