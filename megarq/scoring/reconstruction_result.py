"""What reconstructions are worth: the numbers as JSON, as a table to read, and a sheet of pictures."""

import hashlib
from typing import Any

import torch
from PIL import Image, ImageDraw
from threadpoolctl import threadpool_limits
from torch import Tensor

from megarq.launch.machine import describe_machine
from megarq.rqvae.health import use_of
from megarq.scoring.distortion import psnr
from megarq.scoring.networks import LAYERS
from megarq.scoring.reconstruction import Measured, Reconstructed
from megarq.scoring.result import DIGITS, FORMAT, RECONSTRUCTIONS, VERSION, describe_score, in_columns
from megarq.scoring.scores import frechet, too_few
from megarq.scoring.statistics import to_statistics

ENOUGH_CODES = 10
"""Codes seen for each entry of the codebook; with fewer, its usage tells more of the number of pictures."""
_PAD, _LINE = 4, 14
"""Pixels between the pictures of a sheet, and of a line of text."""


def to_result(made: Reconstructed) -> dict[str, Any]:
    """Everything that must stand beside the numbers, plain enough for JSON, as score.py's results have it.

    The reference are the originals as the files hold them; sha256 is of the sha256 of all pictures in order: of their
    encoded bytes, and of the pixels [3, R, R] of the reconstructions.
    """
    request, pictures, model = made.request, made.pictures, made.model
    size = (made.config.resolution, made.config.resolution)
    originals, reconstructions = (_sha256(made.measured.digests[:, column]) for column in (0, 1))
    metrics, notes = _metrics(made)
    codebook = _codebook(made)
    return {
        "format": FORMAT,
        "version": VERSION,
        "metrics": metrics,
        "codebook": codebook,
        "depths": _depths(made) if request.depths else None,
        "protocol": request.protocol.describe(),
        "count": len(pictures),
        "resize": request.protocol.resize,
        "seed": None,
        "model_fingerprint": model.fingerprint,
        "ema": None if model.weights is None else model.weights == "ema",
        "step": model.step,
        "weights_sha256": made.networks.sha256,
        "reference_sha256": originals,
        "reference": {
            "path": pictures.source,
            "kind": "pictures",
            "count": len(pictures),
            "size": size,
            "transform": None if request.transform == "none" else request.transform,
        },
        "images": {
            "path": str(request.model),
            "kind": RECONSTRUCTIONS,
            "sha256": reconstructions,
            "size": size,
            "sampling": None,
            "dtype": None,
            "keep_fraction": None,
            "ranker": None,
        },
        "scored_seed": None,
        "bootstrap": 0,
        "warnings": [*made.networks.notes, *notes, *_few_codes(codebook)],
        "machine": describe_machine(),
    }


def _sha256(digests: Tensor) -> str:
    return hashlib.sha256(digests.contiguous().numpy().tobytes()).hexdigest()


def _metrics(made: Reconstructed) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """({metric: what a result says}, warnings), in the order in which they were asked for."""
    request, values = made.request, _by_name(made, -1)
    metrics: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for metric in request.metrics:
        if metric == "rfid":
            metrics[metric] = _rfid(made)
            notes += too_few(metric, len(made.pictures), made.measured.features.shape[2])
            continue
        metrics[metric] = _mean(values[metric]) | ({"network": "vgg16"} if metric == "lpips" else {})
    equal = int((values["mse"] == 0).sum())
    if "psnr" in metrics and equal:
        best = float(psnr(torch.zeros(()), made.config.resolution))
        notes.append(f"psnr: {equal} reconstructions equal their pictures and count as {best:.1f} dB, not infinity.")
    return metrics, notes


def _by_name(made: Reconstructed, row: int) -> dict[str, Tensor]:
    """fp64 [N] of each metric that every picture has, and the squared error, at a row of the depths."""
    values = dict(zip(made.request.columns, made.measured.values[:, row].unbind(1), strict=True))
    return {**values, "psnr": psnr(values["mse"], made.config.resolution)}


def _mean(values: Tensor) -> dict[str, Any]:
    return {"value": float(values.mean()), "std": float(values.std()) if len(values) > 1 else 0.0, "interval": None}


def _rfid(made: Reconstructed) -> dict[str, Any]:
    """Originals against reconstructions, on one thread: with another number, sums of products round differently."""
    request, features = made.request, made.measured.features
    with threadpool_limits(1):
        theirs, ours = (to_statistics(features[:, column], request.protocol, keep=False) for column in (0, 1))
        value = frechet(ours, theirs)
    network = request.protocol.network
    return {"value": value, "interval": None, "network": network, "layer": LAYERS[network]}


def _codebook(made: Reconstructed) -> dict[str, Any]:
    """How the codes of each depth are used, and those of a shared codebook altogether."""
    config, counts = made.config, made.measured.counts
    books = [row[:size] for row, size in zip(counts, config.sizes, strict=True)]
    uses = [use_of(counts)._asdict() for counts in books]
    told: dict[str, Any] = {
        "sizes": list(config.sizes),
        "shared": config.shared_codebook,
        "codes": int(counts[0].sum()),
        **{name: [use[name] for use in uses] for name in ("usage", "perplexity", "dead")},
    }
    if config.shared_codebook:
        told["all"] = use_of(counts.sum(0))._asdict()
    return told


def _few_codes(codebook: dict[str, Any]) -> list[str]:
    codes, size = codebook["codes"], max(codebook["sizes"])
    if codes >= ENOUGH_CODES * size:
        return []
    return [
        f"codebook: {codes} codes at each depth are few for a codebook of {size}: usage and perplexity grow with the "
        "number of pictures."
    ]


def _depths(made: Reconstructed) -> list[dict[str, Any]]:
    """Means over the pictures for each number of depths."""
    rows = []
    for row in range(made.config.depth):
        values = _by_name(made, row)
        rows.append({"depths": row + 1, **{name: float(each.mean()) for name, each in values.items()}})
    return rows


def to_table(result: dict[str, Any]) -> str:
    """The numbers with what they depend on."""
    reference, protocol, codebook = result["reference"], result["protocol"], result["codebook"]
    size, crop = "x".join(map(str, reference["size"])), reference["transform"]
    ema = {True: ", EMA", False: ", no EMA", None: ""}[result["ema"]]
    step = "" if result["step"] is None else f", step {result['step']}"
    data = f"{reference['path']}, {result['count']} of {size}{f' by {crop}' if crop else ''}"
    rows = [
        ("model", f"{result['images']['path']}, RQ-VAE {result['model_fingerprint'][:DIGITS]}{ema}{step}"),
        ("data", f"{data}, sha256 {result['reference_sha256'][:DIGITS]}"),
        ("reconstructions", f"8-bit, sha256 {result['images']['sha256'][:DIGITS]}"),
    ]
    if "rfid" in result["metrics"]:
        told = (protocol[name] for name in ("input", "resize", "normalize"))
        rows.append(("protocol", f"{protocol['name']}: {'; '.join(told)}"))
    rows += [(f"weights {name}", f"sha256 {sha256[:DIGITS]}") for name, sha256 in result["weights_sha256"].items()]
    rows += [(name, describe_score(score)) for name, score in result["metrics"].items()]
    for depth, size_ in enumerate(codebook["sizes"]):
        use = {name: codebook[name][depth] for name in ("usage", "perplexity", "dead")}
        rows.append((f"codes, depth {depth + 1}", _describe_use(use, size_)))
    if "all" in codebook:
        rows.append(("codes, all depths", _describe_use(codebook["all"], codebook["sizes"][0])))
    for depth in result["depths"] or ():
        told = (f"{name} {value:.5g}" for name, value in depth.items() if name != "depths")
        rows.append((f"first {depth['depths']}", ", ".join(told)))
    return in_columns(rows, result["warnings"])


def _describe_use(use: dict[str, Any], size: int) -> str:
    return f"{use['usage']:.1%} of {size} used, perplexity {use['perplexity']:.1f}, {use['dead']} dead"


def draw_sheet(measured: Measured) -> Image.Image:
    """Pictures side by side, each row under its name: originals, all depths, then the first 1 .. D - 1 depths."""
    depth, side = measured.shown.shape[1] - 1, measured.shown.shape[3]
    named = [
        (0, "originals"),
        (depth, "reconstructions"),
        *((row, f"first {row} of {depth} depths") for row in range(1, depth)),
    ]
    width = len(measured.shown) * (side + _PAD) + _PAD
    text = max(width, 9 * _LINE)
    sheet = Image.new("RGB", (text, len(named) * (side + _LINE + _PAD) + _PAD), "white")
    pen = ImageDraw.Draw(sheet)
    top = _PAD
    for row, name in named:
        pen.text((_PAD, top), name, fill="black")
        for column, pixels in enumerate(measured.shown[:, row]):
            tile = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            sheet.paste(tile, (_PAD + column * (side + _PAD), top + _LINE))
        top += side + _LINE + _PAD
    return sheet
