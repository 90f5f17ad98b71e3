"""Signals that ask a run to stop are taken note of."""

import os
import signal
import subprocess
import sys

import pytest

from megarq import cli
from megarq.errors import Stopped
from megarq.launch import stop


@pytest.fixture
def handlers():
    """The test's process listens; what it did before comes back."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    stop.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stop._received.clear()


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_remembered(number):
    assert stop.asked_to_stop() is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.asked_to_stop() == number.name


@pytest.mark.parametrize("script", ["train.py", "train_rqvae.py"])
def test_a_training_command_listens_before_its_long_imports(script):
    code = (
        "import runpy, signal, sys\n"
        "class Found(BaseException): pass\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name in ('torch', 'deepspeed', 'numpy'):\n"
        "            handlers = map(signal.getsignal, (signal.SIGTERM, signal.SIGUSR1))\n"
        "            print(name, *(handler.__name__ for handler in handlers))\n"
        "            raise Found\n"
        "sys.meta_path.insert(0, Finder())\n"
        "try:\n"
        f"    runpy.run_path('megarq/{script}', run_name='__main__')\n"
        "except Found: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["_note", "_note"], done.stdout + done.stderr


def test_a_run_that_stopped_ends_with_status_75(capsys):
    def main() -> None:
        raise Stopped("step 7: asked to stop; saved")

    assert cli.run(main) == stop.STOPPED == 75
    assert capsys.readouterr().out == "step 7: asked to stop; saved\n"


def test_the_first_interrupt_is_noted_and_another_ends_the_process(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with stop.interrupts_noted():
        for _ in range(2):  # a launcher sends it on, at once
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked_to_stop() == "SIGINT"
            now[0] += 0.1
        now[0] += stop.AGAIN
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    stop._received.clear()
