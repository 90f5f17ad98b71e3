"""The machine and the versions that measured numbers stand beside."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("megarq", "torch", "deepspeed", "numpy", "webdataset", "tokenizers")


def installed_versions() -> dict[str, str | None]:
    """Versions of what computes; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def describe_machine() -> dict[str, object]:
    """Cores this process may use, the load beside it, the first GPU's name or None, and the versions installed."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **installed_versions(),
    }
