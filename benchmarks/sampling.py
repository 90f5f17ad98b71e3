"""How fast pictures are drawn, over batch sizes and shapes of codes: Figure 4 of arXiv 2203.01941.

Timed is ImageGenerator with random weights: the codes of a batch, then their decoding to 8-bit pictures in the host's
memory. The limit is the least time that megarq/planning/sampling.py counts for both: bytes of weights and caches over
the bandwidth, and FLOPs over the peak of products in --dtype (in fp16, the RQ-VAE decodes in fp32 all the same).

--compare-naive draws the same batch without caches: for each of the T * D codes RQTransformer's whole forward pass, as
training runs it, with all pictures of the batch: the body over L + T - 1 tokens, the head and the classifier over T * D
(and for captions their classifier over L - 1), of which one code is kept. Dtype, threads and draws are the same; on a
GPU these passes are not captured as CUDA graphs, which the sampler's steps are.
"""

import argparse
import io
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device import PeakMemory, Speed, find_speeds, timed, within_memory
from sampling_report import describe_batch, describe_run, draw_figure, read_result, write_trace
from torch import Tensor

from megarq import cli
from megarq.config.load import load_config
from megarq.config.models import RQTransformerConfig, RQVAEConfig, StackConfig
from megarq.errors import ConfigError
from megarq.files import make_room, write_atomically
from megarq.inference.export import DTYPES
from megarq.inference.frozen import fastest_form, freezable
from megarq.inference.generator import ImageGenerator
from megarq.inference.model_folder import ModelInfo
from megarq.inference.options import per_depth
from megarq.inference.pretrained import Pretrained, find_device
from megarq.inference.sampling import Draws, Guidance
from megarq.inference.settings import check_guidance, depth_settings
from megarq.launch.machine import describe_machine
from megarq.planning.counts import transformer_parameters
from megarq.planning.sampling import codes_work, decoding_work
from megarq.rqvae.model import RQVAE
from megarq.transformer.rq_transformer import RQTransformer

EXAMPLE = """examples:
  python benchmarks/sampling.py --model huge --batch-size 100 200 500 --json 8x8x4.json
  python benchmarks/sampling.py --model huge --f 16 --d 1 --batch-size 100 200 500 --json 16x16x1.json
  python benchmarks/sampling.py --from-json 16x16x1.json 8x8x4.json --figure speed.png
  python benchmarks/sampling.py --model small --compare-naive --naive-steps 8"""
SIZES = {"small": (512, 24, 4, 8), "medium": (1024, 24, 4, 16), "large": (1536, 24, 4, 24), "huge": (1536, 42, 6, 24)}
"""Width, layers of body and head, and attention heads; at depth 1 the body has the head's layers too."""
CONDITIONS = {"none": (1, 1), "class": (1, 1000), "text": (32, 16384)}
"""Length and vocabulary of the condition."""
MULTIPLIERS = {8: [1, 2, 2, 4], 16: [1, 1, 2, 2, 4], 32: [1, 1, 2, 2, 4, 4]}
"""Channels of the RQ-VAE's levels by downsampling factor; attention is at the codes' resolution."""
PICTURE = 256
"""Height and width of the pictures of these."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help=f"{', '.join(SIZES)}; or a configuration by name or path")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--f", type=int, choices=MULTIPLIERS, help="downsampling of 256x256 pictures (32 is 8x8 codes)")
    which.add_argument("--rqvae", help="a configuration by name or path, in place of the RQ-VAE of --f")
    add("--d", type=int, help="depth of the codes (default 4, or the configuration's)")
    add("--codebook-size", type=int, help="K (default 16384, or the configuration's)")
    add("--cond", choices=CONDITIONS, help="condition (default class, or the configuration's)")
    add("--batch-size", type=int, nargs="+", default=[8], help="one or more (default 8)")
    add("--top-k", type=per_depth(int), help="default: all codes, as in the authors' own measurement")
    add("--top-p", type=per_depth(float), default=1.0, help="default 1: all codes")
    add("--guidance", type=float, default=1.0, help="scale of guidance by the empty caption (default 1: none)")
    add("--dtype", choices=DTYPES, help="of the RQ-Transformer (default bf16 on a GPU, fp32 on a CPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--warm-up", type=int, default=1, help="batches that do not count (default 1)")
    add("--repeats", type=int, default=3, help="batches of which the median counts (default 3)")
    add("--bandwidth", type=float, metavar="GB/s", help="of memory (default: the GPU's data sheet, else measured)")
    add("--peak", type=float, metavar="TFLOP/s", help="of products in --dtype (default: likewise)")
    add("--compare-naive", action="store_true", help="draw the codes without caches too, see above")
    add("--naive-steps", type=int, metavar="N", help="time N of those T * D, evenly spread, and scale (default all)")
    add("--json", metavar="OUT", help="write the result to this file")
    add("--figure", metavar="PNG", help="draw seconds per image over batch sizes")
    add("--from-json", nargs="+", metavar="FILE", help="draw these results together, and measure nothing")
    add(
        "--trace",
        metavar="FILE.json",
        help="profile the first batch size, for chrome://tracing; operators' shares to FILE.txt",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    check_options(args)
    results = list(map(read_result, args.from_json)) if args.from_json else [measure(args)]
    if args.figure:
        content = io.BytesIO()
        draw_figure(results).savefig(content, format="png", dpi=150)
        write_atomically(args.figure, content.getvalue())


def check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for what cannot be measured or drawn."""
    if (args.model is None) == (args.from_json is None):
        raise ConfigError(f"--model {args.model}, --from-json {args.from_json}: give one of the two.")
    if args.from_json and not args.figure:
        raise ConfigError("--from-json without --figure: there is nothing to do. Give --figure FILE.png.")
    counts = {"batch-size": args.batch_size, "repeats": [args.repeats], "naive-steps": [args.naive_steps]}
    for name, values in {**counts, "d": [args.d], "codebook-size": [args.codebook_size]}.items():
        if any(value is not None and value < 1 for value in values):
            raise ConfigError(f"--{name} {' '.join(map(str, values))}: give whole numbers of 1 or more.")
    if args.warm_up < 0:
        raise ConfigError(f"--warm-up {args.warm_up}: give 0 or more batches.")
    for name in ("bandwidth", "peak"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value:g}: give a number above 0.")
    if args.naive_steps and not args.compare_naive:
        raise ConfigError(f"--naive-steps {args.naive_steps} without --compare-naive: give both, or neither.")
    for name, path, suffix in (("figure", args.figure, ".png"), ("trace", args.trace, ".json")):
        if path and Path(path).suffix != suffix:
            raise ConfigError(f"--{name} {path}: give a name that ends in {suffix}.")
    for path in filter(None, (args.json, args.figure, args.trace)):
        make_room(path)


def configurations(args: argparse.Namespace) -> tuple[RQTransformerConfig, RQVAEConfig]:
    """The two networks that the options describe. Raises ConfigError where they do not fit."""
    if args.model in SIZES:
        config = size_of_the_paper(args.model, args.d or 4, args.cond or "class")
    else:
        config = load_config(args.model, [], "rq-transformer").model
        if args.cond not in (None, config.condition):
            raise ConfigError(f"--cond {args.cond}: {args.model} has condition {config.condition}. Leave --cond out.")
    if args.rqvae:
        rqvae = load_config(args.rqvae, [], "rq-vae").model
    else:
        side = PICTURE // args.f if args.f else config.code_shape[0]
        rqvae = rqvae_of(min(MULTIPLIERS, key=lambda factor: abs(PICTURE // factor - side)))
    height, width, _ = rqvae.code_shape
    if args.model not in SIZES and not args.f and [height, width] != config.code_shape[:2]:
        raise ConfigError(
            f"{args.model} has {config.code_shape[0]}x{config.code_shape[1]} codes, the RQ-VAE {height}x{width}: "
            "give --rqvae, the configuration of the one that the model was made for."
        )
    config = replace(config, code_shape=[height, width, args.d or config.depth])
    if args.codebook_size:
        config = replace(config, codebook_size=args.codebook_size, codebook_sizes=None)
    fields = {name: getattr(config, name) for name in ("depth", "codebook_dim", "codebook_size", "codebook_sizes")}
    return config, replace(rqvae, **fields, shared_codebook=config.codebook_sizes is None)


def size_of_the_paper(name: str, depth: int, condition: str) -> RQTransformerConfig:
    """A size of the paper's measurements."""
    width, body, head, heads = SIZES[name]
    body, head = (body, head) if depth > 1 else (body + head, 0)
    length, vocabulary = CONDITIONS[condition]
    return RQTransformerConfig(
        code_shape=[8, 8, depth],
        embed_dim=width,
        body=StackConfig(body, heads),
        head=StackConfig(head, heads),
        cond_length=length,
        cond_vocab_size=vocabulary,
    )


def rqvae_of(factor: int) -> RQVAEConfig:
    """The authors' RQ-VAE of a downsampling factor."""
    return RQVAEConfig(channel_multipliers=MULTIPLIERS[factor], attention_resolutions=[PICTURE // factor])


class EmptyCaptions:
    """In place of a tokenizer: guidance asks for the empty caption alone."""

    def encode(self, _: str, length: int) -> list[int]:
        """As padding."""
        return [0] * length


def build_models(
    config: RQTransformerConfig, rqvae_config: RQVAEConfig, device: torch.device, dtype: torch.dtype
) -> Pretrained:
    """Both networks with random weights, in the form that an exported model is loaded in."""
    torch.manual_seed(0)
    rqvae = RQVAE(rqvae_config).to(device).eval()
    with device:
        transformer = RQTransformer(config, shared_codebook=rqvae_config.shared_codebook).eval()
    for parameter in transformer.parameters():  # and not the codebook, which is fp32
        parameter.data = parameter.data.to(dtype)
    transformer.initialize(0)
    if (form := fastest_form(device, dtype)) is not None:
        for layer in freezable(transformer).values():
            layer.freeze(form, layer.weight.detach())
    transformer.load_codebook(rqvae.codebook_weights())
    return Pretrained(transformer, rqvae, EmptyCaptions(), ModelInfo(rqvae_config, "random", config))  # type: ignore[arg-type]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every batch size in turn; the result is written after each."""
    device = find_device(args.device)
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    config, rqvae_config = configurations(args)
    depth_settings(config.sizes, args.top_k, args.top_p)  # what they refuse is refused before models are built
    check_guidance(args.guidance, config.condition)
    models = build_models(config, rqvae_config, device, DTYPES[dtype])
    speeds = find_speeds(device, dtype, args.bandwidth, args.peak)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "command": f"python benchmarks/sampling.py {shlex.join(sys.argv[1:])}".strip(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "model": args.model,
        "parameters": transformer_parameters(config).total,
        "weights": "random",
        "code_shape": list(config.code_shape),
        "codebook_size": max(config.sizes),
        "condition": config.condition,
        "dtype": dtype,
        "drawing": {"top_k": args.top_k, "top_p": args.top_p, "guidance": args.guidance},
        "batches_dropped": args.warm_up,
        "batches_of_the_median": args.repeats,
        "memory": "most allocated" if device.type == "cuda" else "growth of the process at its largest",
        "speeds": {name: speed._asdict() for name, speed in speeds.items()},
        "batches": [],
    }
    print(describe_run(result))
    for batch in args.batch_size:
        row = {"batch_size": batch, **within_memory(partial(measure_batch, models, batch, speeds, args))}
        if args.compare_naive:
            row["full_forward"] = within_memory(partial(measure_full_forward, models.transformer, batch, args))
            if "error" not in row and "error" not in row["full_forward"]:
                whole, cached = row["full_forward"]["seconds_per_image"], row["seconds_per_image"]["codes"]
                row["ar_speedup_over_full_forward"] = whole / cached
        result["batches"].append(row)
        print(describe_batch(row), flush=True)
        if args.json:
            write_atomically(args.json, json.dumps(result, indent=2) + "\n")
    if args.trace:
        batch = args.batch_size[0]
        generator, cond = ImageGenerator(models, batch), conditions(config, batch)
        write_trace(Path(args.trace), lambda: generator.decode(draw_codes(generator, cond, args, seed=0)), device)
    return result


def conditions(config: RQTransformerConfig, batch: int) -> Tensor:
    """Made-up conditions [B, L]."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(config.cond_vocab_size, (batch, config.cond_length), generator=generator)


def draw_codes(generator: ImageGenerator, cond: Tensor, args: argparse.Namespace, seed: int) -> Tensor:
    """Codes of a batch, as the options say."""
    return generator.sample_codes(cond, args.top_k, args.top_p, seed=seed, guidance=args.guidance)


def measure_batch(models: Pretrained, batch: int, speeds: dict[str, Speed], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of codes and decoding, beside the limit of each; and memory."""
    generator, config = ImageGenerator(models, batch), models.transformer.config
    cond, device = conditions(config, batch), models.transformer.body_input.positions.device
    memory = PeakMemory(device)
    seconds: dict[str, list[float]] = {"codes": [], "decoding": []}
    for turn in range(args.warm_up + args.repeats):
        took, codes = timed(partial(draw_codes, generator, cond, args, seed=turn), device)
        seconds["codes"].append(took)
        seconds["decoding"].append(timed(partial(generator.decode, codes), device)[0])
    counted = {part: each[args.warm_up :] for part, each in seconds.items()}
    counted["both"] = list(map(sum, zip(*counted.values(), strict=True)))
    number = models.transformer.body_input.positions.element_size()
    work = {
        "codes": codes_work(config, batch, len(cond.unique(dim=0)), number, guided=args.guidance != 1),
        "decoding": decoding_work(models.rqvae.config, batch, models.rqvae.post_quant_conv.weight.element_size()),
    }
    rates = speeds["bandwidth_gb_s"].value * 1e9, speeds["peak_tflops"].value * 1e12
    limit = {part: each.seconds(*rates) / batch for part, each in work.items()}
    limit["both"] = sum(limit.values())
    per_image = {part: statistics.median(each) / batch for part, each in counted.items()}
    return {
        "seconds_per_image": per_image,
        "images_per_second": 1 / per_image["both"],
        "limit_seconds_per_image": limit,
        "share_of_limit": {part: limit[part] / per_image[part] for part in limit},
        "peak_memory_gib": memory.gib(),
        "seconds": counted,
        "work": {part: asdict(each) for part, each in work.items()},
    }


def measure_full_forward(transformer: RQTransformer, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of codes without caches: of all steps, or of some of them, scaled."""
    config, device = transformer.config, transformer.body_input.positions.device
    codes = config.positions * config.depth
    steps = spread(codes, args.naive_steps or codes)
    choose = Draws(transformer, batch, depth_settings(config.sizes, args.top_k, args.top_p))
    choose.seed(0, range(batch))
    guidance = Guidance(args.guidance, torch.zeros(config.cond_length, dtype=torch.int64, device=device))
    draw = partial(draw_by_full_forward, transformer, conditions(config, batch).to(device), choose, guidance)
    memory = PeakMemory(device)
    timed(lambda: draw([0]), device)
    seconds, _ = timed(lambda: draw(steps), device)
    return {
        "seconds_per_image": seconds * codes / len(steps) / batch,
        "naive_steps": codes,
        "naive_steps_timed": len(steps),
        "naive_scaled": len(steps) < codes,
        "peak_memory_gib": memory.gib(),
    }


@torch.no_grad()
def draw_by_full_forward(
    transformer: RQTransformer,
    cond: Tensor,
    choose: Callable[[Tensor, int, int], Tensor],
    guidance: Guidance,
    steps: Iterable[int],
) -> Tensor:
    """Codes [B, H, W, D] for conditions [B, L], each step's by a forward pass over all tokens; other codes are 0."""
    config, guided = transformer.config, guidance.scale != 1
    codes = cond.new_zeros(len(cond), *config.code_shape)
    rows = torch.cat([cond, guidance.null.expand_as(cond)]) if guided else cond
    for step in steps:
        position, depth = divmod(step, config.depth)
        logits = transformer(torch.cat([codes, codes]) if guided else codes, rows)[0]  # [B or 2B, H, W, D, K]
        logits = logits.flatten(1, 2)[:, position, depth, : config.sizes[depth]].float()
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + guidance.scale * (conditional - null)
        codes.flatten(1, 2)[:, position, depth] = choose(logits, position, depth)
    return codes


def spread(count: int, some: int) -> list[int]:
    """So many of 0 .. count - 1, evenly, the first and the last among them; of one, the first."""
    gaps = max(min(some, count) - 1, 1)
    return sorted({round(place * (count - 1) / gaps) for place in range(min(some, count))})


if __name__ == "__main__":
    sys.exit(cli.run(main))
