"""Image shards and a frozen RQ-VAE to a folder of code shards, picking up where an earlier run stopped.

    tar --read--> samples --decode (worker processes)--> batches --encode--> blocks --write, hash--> tar

Each arrow works ahead of the next: a batch is decoded while another is encoded and a block is written.
"""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from megarq.data.code_writer import CodeBlock, write_shard
from megarq.data.faults import Fault, Faults
from megarq.data.manifest import CodeSettings, Manifest, save_record
from megarq.data.sources import local_size, source_name
from megarq.data.transforms import find_transform
from megarq.errors import DataError
from megarq.launch.environment import read_environment
from megarq.pretokenize.ahead import ahead
from megarq.pretokenize.crew import Crew
from megarq.pretokenize.decoder import Decoder, UnreadableShardError
from megarq.pretokenize.encoder import PRECISIONS, BlockEncoder
from megarq.pretokenize.progress import Progress
from megarq.pretokenize.work import Work, count_records
from megarq.rqvae.model import RQVAE, fingerprint

logger = logging.getLogger(__name__)

_SHARD = 1000
"""Least samples that an image shard is taken to hold, before other shards tell."""


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
    precision: str = "fp32",
    compiled: bool = False,
    caption_field: str | None = None,
    threads: int = 0,
) -> CodeSettings:
    """What the shards of this RQ-VAE will hold. Raises: DataError for an unknown name or a number out of range."""
    find_transform(transform)
    if precision not in PRECISIONS:
        raise DataError(f"--precision {precision}: use one of {', '.join(PRECISIONS)}.")
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
        precision=precision,
        compiled=compiled,
        caption_field=caption_field,
        threads=threads,
    )


def pretokenize(
    rqvae: RQVAE,
    sources: Sequence[str],
    output: Path,
    settings: CodeSettings,
    *,
    device: torch.device,
    max_bad_rate: float = 0.01,
    workers: int = 0,
    crew: Crew | None = None,
    progress: bool = True,
) -> Manifest | None:
    """Make `output`/000000.tar .. from the image shards `sources`, skipping those that are done, then the manifest.

    The RQ-VAE is stored beside them, so that the folder is all that training needs. Other workers may do the same at
    the same time. None where they will complete the folder: they hold what is left, or rank 0 of our `crew` does.
    rqvae: on `device`; put into eval mode. workers: processes that decode pictures, 0 for none.
    Raises: DataError for image shards that cannot be read, once all others are done; for too many bad samples, a full
    disk, or an output folder of other settings or sources.
    """
    crew = crew or Crew(read_environment({}))
    with crew.failing_together():
        output.mkdir(parents=True, exist_ok=True)
        work = Work(output, settings, sources)
        faults = Faults(max_bad_rate)
        count_records(faults, (done := work.done()).values())
        counted = len(done)
        shown = Progress(faults, work.count_done, len(sources), quiet=not (progress and crew.environment.rank == 0))
        encoder = BlockEncoder(rqvae.eval(), settings, device)
        failures: dict[int, str] = {}
        with Decoder(settings, workers) as decoder, closing(work.take(crew.number, crew.workers, done)) as shards:
            for index in shards:
                # This worker's part may be worse than the rest: while it runs, it is judged over what all may hold.
                faults.grace = len(sources) * max(_SHARD, faults.seen // max(counted, 1))
                counted += 1
                try:
                    make_shard(decoder, encoder, work, index, faults, shown.show)
                except UnreadableShardError as error:
                    logger.error("left out for now: %s", error)
                    failures[index] = str(error)
        gathered = crew.gather(failures)
    if gathered is None:
        return None
    shown.show(last=True)
    return work.finish(rqvae, {index: why for part in gathered for index, why in part.items()}, max_bad_rate)


def make_shard(
    decoder: Decoder, encoder: BlockEncoder, work: Work, index: int, faults: Faults, show: Callable[[], None]
) -> None:
    """Shard `index` and its record; `show` is called after every block."""
    source = work.sources[index]
    source_bytes = local_size(source)
    lost: list[str] = []
    skipped, counts = faults.skipped, Counter(faults.counts)
    perplexities: list[tuple[float, ...]] = []

    def encoded() -> Generator[CodeBlock, None, None]:
        with (
            closing(ahead(decoder.batches(source, faults), room=2)) as batches,
            closing(ahead(encoder.blocks(batches, lost), room=2)) as blocks,
        ):
            for block, perplexity in blocks:
                perplexities.append(perplexity)
                yield block
                show()

    with closing(encoded()) as blocks:
        record = write_shard(work.folder, index, work.settings, source_name(source), blocks)
    for key in lost:  # counted only now, as the decoder counted in a thread of its own
        faults.skip(source, key, Fault.NOT_FINITE, _not_finite(work.settings))
    found = sorted((faults.counts - counts).items())
    if work.settings.caption_field and record.samples and not record.captioned:
        logger.warning("%s: no picture has the caption field %r in its .json", source, work.settings.caption_field)
    perplexity = perplexities[0] if perplexities else ()
    record = replace(
        record,
        skipped=faults.skipped - skipped,
        perplexity=perplexity,
        faults=dict(found),
        source_bytes=source_bytes,
    )
    save_record(work.folder, work.settings, record)


def _not_finite(settings: CodeSettings) -> str:
    return (
        f"its latents in {settings.precision}; try --precision bf16 or fp32, leave out --latents (fp16 ends at 65,504) "
        "or check the RQ-VAE"
    )
