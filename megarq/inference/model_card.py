"""The README.md of an exported model: what it is, what for, and what not."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from megarq.inference.model_folder import ModelInfo

_ASKED = {
    "text": "text: a caption of up to {length} tokens",
    "class": "class: one of {vocab} class numbers",
    "none": "nothing: it is unconditional",
}
_CALL = {"text": 'prompts=["a handwritten seven"], count=4', "class": "classes=[3], count=4", "none": "count=4"}
_OPTION = {"text": '--prompt "a handwritten seven" ', "class": "--class 3 ", "none": ""}

_MODEL = """# {title}

{description}

| | |
|---|---|
| asked for with | {asked} |
| images | {resolution} x {resolution} pixels |
| codes of an image | {height} x {width} x {depth}, each one of {size} |
| weights | {weights}{step} |
| RQ-VAE | sha256 {fingerprint} |

## Use

    import megarq
    generator = megarq.ImageGenerator.from_pretrained("FOLDER")
    images = generator.generate({call})

    python tools/sample.py FOLDER {option}--count 16 --output grid.png

Unless told otherwise, it samples with top-k {top_k}, top-p {top_p}, temperature {temperature} and guidance {guidance}.
"""

_RQVAE = """# {title}

An RQ-VAE (arXiv 2203.01941): it turns {resolution} x {resolution} images into {height} x {width} x {depth} codes,
each one of {size}, and such codes back into images. sha256 of its weights: {fingerprint}

## Use

    from megarq.inference.pretrained import load_rqvae
    rqvae = load_rqvae("FOLDER")
    codes = rqvae.quantize(rqvae.encode(images))      # images [B, 3, {resolution}, {resolution}] in [-1, 1]
    images = rqvae.decode(codes)

    python tools/pretokenize.py --rqvae FOLDER --data 'shards/*.tar' --output CODES
"""

_LIMITS = """
## Intended use

Research on image generation, and work whose results a person looks at before they are used.

## Limits

- It shows what its training images show: their gaps, errors and prejudices are its own, and it may reproduce single
  training images closely.
- It does not know what is true: a picture is no evidence that something exists or happened.
- Counting, spatial relations and writing inside pictures are unreliable.
- Do not use it to depict real people without their consent, to deceive, or where a wrong picture does harm. Nothing in
  it filters harmful requests or pictures.

## License

The program that made these weights is under the Apache License 2.0. The weights' own terms are set by whoever publishes
them, and depend on the licenses of the training images and captions: state both here before passing them on.
"""


def model_card(info: ModelInfo, title: str, training: Mapping[str, Any] | None = None) -> str:
    """The card, in Markdown.

    Args:
        info: what config.json says.
        title: its first line.
        training: configuration to show, section by section; none where it is not known.
    """
    height, width, depth = info.rqvae.code_shape
    shared = {
        "title": title,
        "resolution": info.rqvae.resolution,
        "height": height,
        "width": width,
        "depth": depth,
        "size": max(info.rqvae.sizes),
        "fingerprint": info.rqvae_fingerprint,
    }
    card = _RQVAE.format(**shared) if info.transformer is None else _MODEL.format(**shared, **_model_fields(info))
    card += _LIMITS
    sections = dict(training or {"model": asdict(info.transformer or info.rqvae)})
    text = yaml.safe_dump(sections, sort_keys=False, default_flow_style=False)
    heading = "Training configuration" if training else "Configuration"
    return f"{card}\n## {heading}\n\n" + "".join(f"    {line}\n" for line in text.splitlines())


def _model_fields(info: ModelInfo) -> dict[str, Any]:
    assert info.transformer is not None
    condition = info.transformer.condition
    sampling = info.sampling
    return {
        "description": "An RQ-Transformer with its RQ-VAE (arXiv 2203.01941): it writes an image as a stack of codes, "
        "position by position, which the RQ-VAE decodes.",
        "asked": _ASKED[condition].format(length=info.transformer.cond_length, vocab=info.transformer.cond_vocab_size),
        "weights": "moving average (EMA)" if info.weights == "ema" else "last step's",
        "step": "" if info.step is None else f", after {info.step:,} steps",
        "call": _CALL[condition],
        "option": _OPTION[condition],
        "top_k": sampling.top_k or "off",
        "top_p": sampling.top_p,
        "temperature": sampling.temperature,
        "guidance": sampling.guidance,
    }
