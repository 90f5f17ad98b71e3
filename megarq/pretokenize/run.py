"""Image shards and a frozen RQ-VAE to a folder of code shards, picking up where an earlier run stopped."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from megarq.data.code_writer import CodeBlock, write_shard
from megarq.data.image_shards import BadSamples
from megarq.data.manifest import CodeSettings, Manifest, save_record
from megarq.data.transforms import find_transform
from megarq.errors import DataError
from megarq.inference.pretrained import save_rqvae
from megarq.pretokenize.encoder import BlockEncoder
from megarq.pretokenize.work import Work
from megarq.rqvae.model import RQVAE, fingerprint


def code_settings(
    rqvae: RQVAE,
    *,
    draws: int = 8,
    temperature: float = 0.5,
    latents: bool = False,
    transform: str = "center",
    seed: int = 0,
    batch_size: int = 64,
    block_size: int = 1024,
) -> CodeSettings:
    """What the shards of this RQ-VAE will hold. Raises: DataError for an unknown transform or a number out of range."""
    find_transform(transform)
    if draws < 0:
        raise DataError(f"--draws {draws}: use 0 for argmin codes alone, or the number of drawn stacks, such as 8.")
    if temperature <= 0:
        raise DataError(f"--temperature {temperature}: use a temperature above 0, such as 0.5.")
    for name, value in (("--batch-size", batch_size), ("block size", block_size)):
        if value < 1:
            raise DataError(f"{name} {value}: use 1 or more.")
    config = rqvae.config
    height, width, depth = config.code_shape
    return CodeSettings(
        code_shape=(height, width, depth),
        codebook_sizes=config.sizes,
        draws=draws,
        temperature=temperature,
        latent_shape=(height, width, config.codebook_dim) if latents else None,
        fingerprint=fingerprint(rqvae),
        transform=transform,
        resolution=config.resolution,
        seed=seed,
        batch_size=min(batch_size, block_size),
        block_size=block_size,
    )


def pretokenize(
    rqvae: RQVAE,
    sources: Sequence[str],
    output: Path,
    settings: CodeSettings,
    *,
    device: torch.device,
    max_bad_rate: float = 0.01,
    progress: bool = True,
) -> Manifest:
    """Make `output`/000000.tar .. from the image shards `sources`, skipping those that are done, then the manifest.

    The RQ-VAE is stored beside them, so that the folder is all that training needs.
    rqvae: on `device`; put into eval mode. Raises: DataError for torn or missing image shards, too many bad samples, or
    an output folder of other settings or sources.
    """
    output.mkdir(parents=True, exist_ok=True)
    work = Work(output, settings, sources)
    done = work.done()
    bad = BadSamples(max_bad_rate)
    for record in done.values():
        bad.count_seen(record.samples + record.skipped)
        bad.bad += record.skipped
    resumed = bad.seen
    encoder = BlockEncoder(rqvae.eval(), settings, device)
    with tqdm(total=len(sources), initial=len(done), unit="shard", desc="pretokenize", disable=not progress) as bar:

        def show() -> None:
            speed = (bad.seen - resumed) / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{speed:.0f} images/s, {bad.bad} bad")

        for index in range(len(sources)):
            if index not in done:
                _make_shard(encoder, work, index, bad, show)
                bar.update()
    bad.finish()
    save_rqvae(rqvae, output)
    return work.finish()


def _make_shard(encoder: BlockEncoder, work: Work, index: int, bad: BadSamples, show: Callable[[], None]) -> None:
    """Shard `index` and its record; `show` is called after every block."""
    bad_before = bad.bad
    perplexities: list[tuple[float, ...]] = []

    def blocks() -> Iterator[CodeBlock]:
        for block, perplexity in encoder.blocks(work.sources[index], bad):
            perplexities.append(perplexity)
            yield block
            show()

    record = write_shard(work.folder, index, work.settings, Path(work.sources[index]).name, blocks())
    perplexity = perplexities[0] if perplexities else ()
    save_record(work.folder, work.settings, replace(record, skipped=bad.bad - bad_before, perplexity=perplexity))
