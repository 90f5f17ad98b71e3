"""Folders of code shards that pre-tokenization makes of small captioned pictures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from captioned_tars import write_tar

from megarq.pretokenize.run import code_settings, pretokenize
from megarq.rqvae.model import RQVAE


def image_tar(path: Path, samples: Iterable[tuple[str, bytes, str]]) -> str:
    """A tar of (key, PNG, caption); an empty caption is left out."""
    members = [member for sample in samples for member in _members(*sample)]
    write_tar(path, members)
    return str(path)


def _members(key: str, png: bytes, caption: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png), *([(f"{key}.txt", caption.encode())] if caption else [])]


def tiny_codes(folder: Path, tars: list[str], rqvae: RQVAE, **changes: Any) -> Path:
    """Code shards of these image shards: two draws and latents, blocks of 5, or as `changes` say."""
    settings = code_settings(rqvae, draws=2, latents=True, batch_size=4, block_size=5, temperature=0.02, **changes)
    pretokenize(rqvae, tars, folder, settings, device=torch.device("cpu"), progress=False)
    return folder
