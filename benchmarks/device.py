"""What measurements ask of a device: time, memory, and the speeds that a limit is counted from."""

import ctypes
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megarq.engine.metrics import peak_tflops
from megarq.errors import TooLittleMemoryError
from megarq.inference.export import DTYPES
from megarq.inference.frozen import fastest_form
from megarq.inference.memory import out_of_memory
from megarq.planning.estimate import GIB

MEMORY_GB_S = {
    "H100 PCIe": 2000.0,
    "H100 NVL": 3900.0,
    "H200": 4800.0,
    "H100": 3350.0,
    "H800": 3350.0,
    "A100-SXM4-40GB": 1555.0,
    "A100-PCIE-40GB": 1555.0,
    "A100-SXM4-80GB": 2039.0,
    "A100 80GB PCIe": 1935.0,
    "L40S": 864.0,
    "V100": 900.0,
}
"""Bandwidth of memory by part of the GPU's name, from data sheets."""
OUT_OF_MEMORY = "out of memory"


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that a call takes, until the device has finished; and what it returns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    returned = run()
    wait()
    return time.perf_counter() - start, returned


class PeakMemory:
    """The most memory since this was made: allocated on a GPU; on a CPU, what the process grew by at its largest."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what is free is not held
            Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is now the size
            self.before = self.gib()

    def gib(self) -> float:
        """So far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024 / GIB - self.before


def within_memory(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a measurement gives, or that memory did not suffice; nothing of it stays there."""
    try:
        return run()
    except (RuntimeError, MemoryError, TooLittleMemoryError) as error:
        if not out_of_memory(error):
            raise
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return {"error": OUT_OF_MEMORY}


class Speed(NamedTuple):
    """Something that a limit divides by."""

    value: float
    origin: str
    """given, data sheet or measured."""


def find_speeds(device: torch.device, dtype: str, bandwidth: float | None, peak: float | None) -> dict[str, Speed]:
    """Bandwidth in GB/s and peak in TFLOP/s: as given, else of the GPU's data sheet, else measured now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = peak_tflops(device, None, "fp32" if dtype == "fp32" else "bf16")
    return {
        "bandwidth_gb_s": first_speed(bandwidth, known_gb_s(name), partial(copied_gb_s, device)),
        "peak_tflops": first_speed(peak, known, partial(multiplied_tflops, device, DTYPES[dtype])),
    }


def first_speed(given: float | None, known: float | None, measure: Callable[[], float]) -> Speed:
    """The first that there is."""
    if given is not None:
        return Speed(given, "given")
    return Speed(known, "data sheet") if known is not None else Speed(measure(), "measured")


def known_gb_s(name: str) -> float | None:
    """Bandwidth of a GPU's memory by its name; None where unknown."""
    return next((speed for part, speed in MEMORY_GB_S.items() if part in name), None)


def copied_gb_s(device: torch.device, size: int = 2**28, turns: int = 5) -> float:
    """Bytes read and written by the fastest of a few copies of `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(timed(lambda: target.copy_(source), device)[0] for _ in range(turns)) / 1e9


def multiplied_tflops(device: torch.device, dtype: torch.dtype, turns: int = 5) -> float:
    """FLOPs of the fastest of a few products of square matrices, plain or in the form that sampling multiplies in."""
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device).to(dtype)
    products: list[Callable[[], Any]] = [lambda: matrix @ matrix]
    if (form := fastest_form(device, dtype)) is not None:
        products.append(partial(form(matrix), matrix, None))
    return 2 * side**3 / min(timed(product, device)[0] for product in products for _ in range(turns)) / 1e12
