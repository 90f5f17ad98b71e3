"""What a training command needs, as small as can be: a model's YAML, code shards, and a tokenizer.

codes/    two shards of random codes of captioned pictures, beside a random RQ-VAE
tokenizer.json, tiny.yaml
"""

from pathlib import Path

import numpy as np
import torch

from megarq.config.models import RQVAEConfig
from megarq.data.code_writer import CodeBlock, write_shard
from megarq.data.manifest import CodeSettings, Manifest
from megarq.inference.pretrained import save_rqvae
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.text.training import train_tokenizer

SAMPLES = 100
MODEL = """
architecture: rq-transformer
model:
  code_shape: [2, 2, 2]
  codebook_size: 16
  codebook_dim: 8
  embed_dim: 32
  body: {layers: 1, heads: 2}
  head: {layers: 1, heads: 2}
  cond_length: 6
  cond_vocab_size: 64
  dropout: 0.0
train: {global_batch_size: 16, lr: 0.01, warmup_steps: 3, precision: fp32}
data: {bpe_dropout: 0.1}
log: {console_every: 1, validate_every: 0, peak_tflops: 1.0}
"""


def write_tiny_training(folder: Path) -> list[str]:
    """Writes all of it; returns the options of megarq/train.py, but for --ds_config and --output."""
    _write_codes(folder / "codes")
    train_tokenizer([f"picture number no. {number}" for number in range(SAMPLES)], 64, folder / "tokenizer.json")
    (folder / "tiny.yaml").write_text(MODEL)
    files = ["--model", folder / "tiny.yaml", "--data", folder / "codes", "--tokenizer", folder / "tokenizer.json"]
    return [*map(str, files)]


def _write_codes(folder: Path) -> None:
    torch.manual_seed(0)
    rqvae = RQVAE(
        RQVAEConfig(
            resolution=4,
            channels=32,
            channel_multipliers=[1, 1],
            res_blocks=1,
            attention_resolutions=[],
            latent_channels=8,
            codebook_dim=8,
            codebook_size=16,
            depth=2,
        )
    ).eval()
    save_rqvae(rqvae, folder)
    settings = CodeSettings((2, 2, 2), (16, 16), 2, 0.5, None, fingerprint(rqvae), "center", 4, 0, 16, 1024)
    random, records = np.random.default_rng(0), []
    for shard in range(2):
        stacks = random.integers(0, 16, (3, SAMPLES // 2, 2, 2, 2), dtype=np.uint16)
        numbers = range(shard * SAMPLES // 2, (shard + 1) * SAMPLES // 2)
        captions = [[f"picture number {number}", f"no. {number}"] for number in numbers]
        labels = [number % 7 for number in numbers]
        block = CodeBlock(stacks[0], list(stacks[1:]), None, [str(number) for number in numbers], captions, labels)
        records.append(write_shard(folder, shard, settings, f"{shard:05d}.tar", [block]))
    Manifest(settings, tuple(records)).save(folder)
