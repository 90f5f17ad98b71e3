import platform

import torch

from megarq.launch import machine


def test_what_is_not_installed_is_told_as_such(monkeypatch) -> None:
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "no-such-package"))
    described = machine.describe_machine()
    assert described["torch"] == torch.__version__.partition("+")[0]
    assert described["no-such-package"] is None
    assert described["python"] == platform.python_version()
    assert described["cores"] >= 1
