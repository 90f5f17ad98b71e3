from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned_tars import small_rqvae, write_tars

from megarq.data.manifest import CodeSettings, Manifest
from megarq.pretokenize.run import code_settings, pretokenize
from megarq.rqvae.model import RQVAE, fingerprint


@pytest.fixture(scope="session")
def rqvae() -> RQVAE:
    return small_rqvae(0)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Three tars of 11, 4 and 6 captioned pictures with classes."""
    return write_tars(tmp_path / "images", (11, 4, 6))


@pytest.fixture(scope="session")
def settings(rqvae: RQVAE) -> CodeSettings:
    """Two draws and latents; blocks of 5, encoded 4 at a time."""
    return code_settings(rqvae, draws=2, latents=True, batch_size=4, block_size=5)


@pytest.fixture
def run(rqvae: RQVAE, sources: list[str], settings: CodeSettings, tmp_path: Path) -> Callable[..., Manifest]:
    """Pretokenize `sources` into a folder, quietly, with some of the settings or of the options changed."""

    def go(
        output: str = "codes",
        model: RQVAE = rqvae,
        given: list[str] | None = None,
        max_bad_rate: float = 0.01,
        workers: int = 0,
        **changes: Any,
    ) -> Manifest:
        ours = replace(settings, fingerprint=fingerprint(model), **changes)
        manifest = pretokenize(
            *(model, sources if given is None else given, tmp_path / output, ours),
            device=torch.device("cpu"),
            max_bad_rate=max_bad_rate,
            workers=workers,
            progress=False,
        )
        assert manifest is not None
        return manifest

    return go
