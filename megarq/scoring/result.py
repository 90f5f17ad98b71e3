"""The result of scoring as JSON, and as a table to read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarq.files import write_atomically
from megarq.launch.machine import describe_machine
from megarq.scoring.evaluate import Scored
from megarq.scoring.scores import clip_extremes

FORMAT, VERSION = "megarq-scores", 1
RECONSTRUCTIONS = "reconstructions"
"""Kind of images that were measured and not kept."""
DIGITS = 12
"""Of each hash, in a table."""


def to_result(scored: Scored) -> dict[str, Any]:
    """Everything that must stand beside the numbers, plain enough for JSON."""
    request, features, reference = scored.request, scored.features, scored.reference
    drawn = scored.pictures.settings or {}
    model = drawn.get("model") or {}
    weights = model.get("weights")
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "metrics": scored.metrics,
        "protocol": request.protocol.describe(),
        "count": features.count,
        "resize": request.protocol.resize,
        "seed": drawn.get("seed"),
        "model_fingerprint": model.get("fingerprint"),
        "ema": None if weights is None else weights == "ema",
        "step": model.get("step"),
        "weights_sha256": scored.networks,
        "reference_sha256": reference.sha256 if reference else None,
        "reference": None
        if reference is None
        else {
            "path": reference.path,
            "kind": reference.kind,
            "count": reference.count,
            "size": reference.size,
            "transform": reference.transform,
        },
        "images": {
            "path": request.images,
            "kind": scored.pictures.kind,
            "sha256": features.sha256,
            "size": features.size,
            "sampling": drawn.get("sampling"),
            "dtype": drawn.get("dtype"),
            "keep_fraction": drawn.get("keep_fraction"),
            "ranker": drawn.get("ranker"),
        },
        "scored_seed": request.settings.seed,
        "bootstrap": request.bootstrap,
        "warnings": scored.warnings,
        "machine": describe_machine(),
    }
    if features.cosines is not None:
        result["clip_scores"] = clip_extremes(features.cosines)
    return result


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    write_atomically(path, json.dumps(result, indent=2) + "\n")


def to_table(result: dict[str, Any]) -> str:
    """The scores with what they depend on."""
    images, reference, protocol = result["images"], result["reference"], result["protocol"]
    size = "x".join(map(str, images["size"]))
    rows = [
        ("protocol", f"{protocol['name']}: {protocol['input']}; {protocol['resize']}; {protocol['normalize']}"),
        ("images", f"{images['path']}, {result['count']} of {size}, sha256 {images['sha256'][:DIGITS]}"),
    ]
    if reference:
        count = "an unknown number" if reference["count"] is None else reference["count"]
        told = f"{reference['path']}, {reference['kind']} of {count}, sha256 {result['reference_sha256'][:DIGITS]}"
        rows.append(("reference", told))
    if result["model_fingerprint"]:
        ema = {True: ", EMA", False: ", no EMA", None: ""}[result["ema"]]
        rows.append(("model", f"{result['model_fingerprint'][:DIGITS]}{ema}, seed {result['seed']}"))
    rows += [(f"weights {name}", f"sha256 {sha256[:DIGITS]}") for name, sha256 in result["weights_sha256"].items()]
    rows += [(name, describe_score(score)) for name, score in result["metrics"].items()]
    return in_columns(rows, result["warnings"])


def in_columns(rows: Sequence[tuple[str, str]], warnings: Sequence[str]) -> str:
    """Names, what is told of each beside them, and warnings below."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {told}" for name, told in rows]
    return "\n".join(lines + [f"warning: {warning}" for warning in warnings])


def describe_score(score: dict[str, Any]) -> str:
    """A score's value with what is known of its spread."""
    told = f"{score['value']:.6g}"
    if "std" in score:
        told += f" (standard deviation {score['std']:.3g})"
    if score.get("interval"):
        low, high = score["interval"]
        told += f", 95% interval {low:.6g} to {high:.6g}"
    return told
