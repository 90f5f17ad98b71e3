"""What importing megarq and sampling with it brings in."""

import subprocess
import sys

import pytest

import megarq


def modules_after(statement):
    command = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_megarq_is_cheap():
    assert not modules_after("import megarq; megarq.__version__") & {"torch", "numpy", "deepspeed", "PIL"}


def test_sampling_and_export_need_neither_deepspeed_nor_mpi():
    loaded = modules_after("import megarq.inference.export, megarq.inference.authors; megarq.ImageGenerator")
    assert "torch" in loaded
    assert not loaded & {"deepspeed", "mpi4py", "webdataset", "tensorboard"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Generator'"):
        megarq.Generator  # noqa: B018
