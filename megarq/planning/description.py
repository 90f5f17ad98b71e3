"""One page about a configuration: what it is made of, what it costs, how it is trained.

`describe("demo", config)` gives {"architecture": .., "parameters": {..}, "flops_per_image": {..}, ..}, ready for JSON;
`render` makes the page of that.
"""

import json
import textwrap
from collections.abc import Mapping
from math import prod
from typing import Any

from megarq.config.load import RunConfig, config_to_dict
from megarq.config.models import RQTransformerConfig
from megarq.config.run import RQTransformerRunConfig, RQVAERunConfig
from megarq.planning.counts import Parameters, rqvae_parameters, transformer_parameters
from megarq.planning.flops import (
    rqvae_flops,
    rqvae_training_flops,
    training_flops,
    transformer_flops,
    transformer_tokens,
)

HYPERPARAMETERS = ("train", "objective", "loss", "data", "sampling")


def describe(name: str, config: RunConfig) -> dict[str, Any]:
    """Everything on the page, as plain values; counts are of numbers, FLOPs of one image, shapes with their letters."""
    facts = _transformer_facts(config.model) if isinstance(config, RQTransformerRunConfig) else _rqvae_facts(config)
    settings = config_to_dict(config)
    return {
        "name": name,
        "architecture": config.architecture,
        "model": settings["model"],
        **facts,
        "hyperparameters": {section: settings[section] for section in HYPERPARAMETERS if section in settings},
    }


def _transformer_facts(model: RQTransformerConfig) -> dict[str, Any]:
    height, width, depth = model.code_shape
    positions, length, wide = model.positions, model.cond_length, model.embed_dim
    tokens = transformer_tokens(model)
    shapes = {
        "codes [B, H, W, D]": ["B", height, width, depth],
        "cond [B, L]": ["B", length],
        "body tokens [B, L+T-1, E]": ["B", tokens["body"], wide],
        "head tokens [B*T, D, E]": [f"B*{positions}", depth, wide],
        "logits [B, H, W, D, K]": ["B", height, width, depth, max(model.sizes)],
    }
    if model.condition == "text":
        shapes["caption logits [B, L-1, V]"] = ["B", length - 1, model.cond_vocab_size]
    if model.uses_codebook:
        shapes["frozen codebook [K, C]"] = [max(model.sizes), model.codebook_dim]
    return {
        "condition": model.condition,
        "parameters": _counts(transformer_parameters(model)),
        "shapes": shapes,
        "tokens_per_image": {**tokens, "codes": prod(model.code_shape)},
        "flops_per_image": _flops(transformer_flops(model), training_flops(model)),
        "bytes_per_image": _bytes((height, width, depth), model.codebook_dim),
    }


def _rqvae_facts(config: RQVAERunConfig) -> dict[str, Any]:
    model, joined = config.model, config.loss.discriminator_start + 1
    height, width, depth = model.code_shape
    image = ["B", model.image_channels, model.resolution, model.resolution]
    return {
        "parameters": _counts(rqvae_parameters(model)),
        "shapes": {
            "images [B, 3, R, R]": image,
            "latents [B, H, W, C]": ["B", height, width, model.codebook_dim],
            "codes [B, H, W, D]": ["B", height, width, depth],
            "soft codes [B, H, W, D, K]": ["B", height, width, depth, max(model.sizes)],
            "codebook [K, C]": [max(model.sizes), model.codebook_dim],
        },
        "tokens_per_image": {"codes": prod(model.code_shape)},
        "flops_per_image": _flops(rqvae_flops(model), rqvae_training_flops(config, joined)),
        "bytes_per_image": _bytes(model.code_shape, model.codebook_dim),
    }


def _counts(parameters: Parameters) -> dict[str, Any]:
    return {
        "trainable": parameters.trainable,
        "frozen": parameters.frozen,
        "trainable_total": parameters.trainable_total,
        "total": parameters.total,
    }


def _flops(parts: Mapping[str, int], training: int) -> dict[str, Any]:
    return {"parts": dict(parts), "forward": sum(parts.values()), "training": training}


def _bytes(code_shape: tuple[int, int, int], codebook_dim: int) -> dict[str, int]:
    """What code shards hold of an image: uint16 for each code of a stack, and fp16 latents where they are stored."""
    return {"code_stack": 2 * prod(code_shape), "latents": 2 * code_shape[0] * code_shape[1] * codebook_dim}


def render(facts: Mapping[str, Any]) -> str:
    """The page, from what `describe` gives."""
    counts, flops, stored = facts["parameters"], facts["flops_per_image"], facts["bytes_per_image"]
    conditioned = f", conditioned on {facts['condition']}" if facts.get("condition") else ""
    lines = [f"{facts['name']}: {facts['architecture']}{conditioned}", "", "parameters"]
    parts = {**counts["trainable"], **{f"{part} (frozen)": count for part, count in counts["frozen"].items()}}
    totals = {"trainable": counts["trainable_total"]} if counts["frozen"] else {}
    lines += [_row(part, f"{count:,}") for part, count in {**parts, **totals, "total": counts["total"]}.items()]
    lines += ["", "shapes"]
    lines += [_row(name, f"[{', '.join(map(str, shape))}]") for name, shape in facts["shapes"].items()]
    lines += ["", "tokens per image"]
    lines += [_row(part, f"{count:,}") for part, count in facts["tokens_per_image"].items()]
    lines += ["", "FLOPs per image (2 for a multiply-add; causal attention in full)"]
    forward = {**flops["parts"], "forward": flops["forward"], "training (forward and backward)": flops["training"]}
    lines += [_row(part, f"{count / 1e9:,.2f} G") for part, count in forward.items()]
    lines += ["", "bytes per image in code shards"]
    lines += [_row("one code stack (uint16)", f"{stored['code_stack']:,}")]
    lines += [_row("latents (fp16, optional)", f"{stored['latents']:,}")]
    for section, values in {"model": facts["model"], **facts["hyperparameters"]}.items():
        text = "  ".join(_settings(values))
        lines += ["", section, textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"  {name:<34} {value:>24}"


def _settings(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key=value` of each setting, as the command line takes them."""
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _settings(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            lines.append(f"{prefix}{key}={text}")
    return lines
