"""Pictures from an exported model.

    generator = ImageGenerator.from_pretrained(FOLDER)
    generator.generate(prompts=["a seven", "a two"], count=2)      -> [seven 0, seven 1, two 0, two 1], PIL images
    generator.generate(classes=[3], count=4)                       a model of classes
    generator.generate(count=4)                                    a model without condition

Shapes: B batch, L condition length, H x W positions, D depth, K codebook size, V caption vocabulary, R resolution.
"""

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from megarq.config.run import SamplingConfig
from megarq.data.picture_set import LONGEST_PROMPT, MOST_PICTURES
from megarq.errors import ConfigError
from megarq.inference.frozen import Form, Int8Weight, fastest_form
from megarq.inference.memory import memory_for
from megarq.inference.pretrained import Pretrained, find_device, load_pretrained
from megarq.inference.sampling import CodeSampler, Guidance, Progress, check_condition, check_indices
from megarq.inference.settings import Counts, DepthSettings, Shares, check_guidance, check_seed, depth_settings
from megarq.parallel.topology import ALONE, TensorGroup

logger = logging.getLogger(__name__)

BATCH = 64
"""Pictures whose codes are drawn together."""
DECODED = 16
"""Pictures that the RQ-VAE decodes together; its feature maps are far larger than the transformer's."""
CUTS_NAMED = 3
"""Prompts of more tokens than the model reads that are warned of by name; of more, their number is told."""


class ImageGenerator:
    """An RQ-Transformer with its RQ-VAE and tokenizer, ready to be asked for pictures."""

    def __init__(self, model: Pretrained, batch_size: int = BATCH, facts: Mapping[str, Any] | None = None) -> None:
        """`batch_size` bounds the pictures drawn at once, and so the memory; it does not change them, as far as the
        device's products do not depend on it (those of int8 on a CPU do).

        `facts` say where the model is from.
        """
        self.facts = dict(facts or {})
        """What pictures follow from besides the settings, for those who write it beside them: dtype and model."""
        self.transformer = model.transformer
        """Called with codes [B, H, W, D] and cond [B, L]: logits [B, H, W, D, K], and [B, L-1, V] or None."""
        self.rqvae = model.rqvae.requires_grad_(False)
        """encode, quantize, soft_codes, decode; frozen, and fp32 but for the decoder of a model loaded in bf16."""
        self.tokenizer = model.tokenizer
        """None for a model without captions, or imported without tokenizer."""
        self.info = model.info
        """What the folder's config.json says."""
        self.batch_size = _whole("batch_size", batch_size, least=1)
        if self.transformer.body_input.positions.dtype == torch.bfloat16:  # fp16 has not the range
            for part in (self.rqvae.post_quant_conv, self.rqvae.decoder):
                part.to(torch.bfloat16).to(memory_format=torch.channels_last)
        self._sampler = CodeSampler(self.transformer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = BATCH,
        tp: TensorGroup = ALONE,
    ) -> Self:
        """Load an exported model.

        Args:
            folder: the --output of tools/export.py or tools/import_pretrained.py.
            device: where it runs.
            dtype: of the RQ-Transformer, and where it is bf16, of the RQ-VAE's decoder; torch.int8 is bf16 but for the
                linear layers, which are rounded to 8 bits and take half the memory.
            batch_size: pictures drawn at once, at most.
            tp: ranks that share the RQ-Transformer, each of which must make the same calls (see `sharing`).

        Raises:
            CheckpointError: the folder is missing, incomplete, damaged or of another format version.
            ConfigError: a device or dtype that cannot be used.
        """
        device = find_device(device)
        form: Form | None = Int8Weight
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.int8:
            dtype = torch.bfloat16
        else:
            form = fastest_form(device, dtype)
        model = load_pretrained(folder, device, dtype, form, tp)
        made_by = {"name": Path(folder).resolve().name, "weights": model.info.weights, "step": model.info.step}
        return cls(model, batch_size, {"dtype": name, "model": made_by | {"rqvae": model.info.rqvae_fingerprint}})

    @property
    def sampling(self) -> SamplingConfig:
        """The settings used where none are given."""
        return self.info.sampling

    def generate(
        self,
        prompts: Sequence[str] | str | None = None,
        classes: Sequence[int] | int | None = None,
        count: int = 1,
        temperature: Shares | None = None,
        top_k: Counts = None,
        top_p: Shares | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        guidance: float | None = None,
    ) -> list[Image.Image]:
        """Draw pictures.

        Args:
            prompts: captions, for a model of captions, of at most LONGEST_PROMPT characters; of more tokens than the
                model reads the first are read, with a warning.
            classes: class numbers, for a model of classes.
            count: pictures of each prompt or class.
            temperature: divides the logits; this and the next two: one value, one for each depth, or None for the
                folder's own setting.
            top_k: draw among the k likeliest codes.
            top_p: draw among the likeliest codes that hold this share of the probability.
            seed: the same seed gives the same pictures.
            progress: called with the number of stacks drawn, as they are drawn; `positions` of them make a picture.
            guidance: how much the caption is stressed, where the model was trained with caption dropout; 1 is none.

        Returns:
            `count` pictures of the first prompt or class, then of the second, and so on.

        Raises:
            ConfigError: what the model cannot be asked for, or a setting out of range.
            TooLittleMemoryError: a batch does not fit the device.
        """
        number = _whole("count", count, least=1)
        prompts = None if prompts is None else _captions(prompts)
        for prompt in prompts or ():
            check_length(prompt)
        cond = self.conditions(prompts, classes)
        if number * len(cond) > MOST_PICTURES:
            raise ConfigError(
                f"count={number} of {len(cond)} prompts or classes: one call draws at most {MOST_PICTURES:,} pictures. "
                "Draw them in parts, with a seed for each."
            )
        cond = cond.repeat_interleave(number, dim=0)
        codes = self.sample_codes(cond, top_k, top_p, temperature, seed, progress=progress, guidance=guidance)
        return self.decode(codes)

    def decode(self, codes: Tensor, depth: int | None = None) -> list[Image.Image]:
        """The pictures of codes [B, H, W, D], from their first `depth` depths (all by default)."""
        with memory_for(f"{min(len(codes), DECODED)} pictures that are decoded"):
            return [picture for part in codes.split(DECODED) for picture in to_pictures(self.rqvae.decode(part, depth))]

    def sample_codes(
        self,
        cond: Tensor,
        top_k: Counts = None,
        top_p: Shares | None = None,
        temperature: Shares | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        progress: Progress | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Codes [B, H, W, D] for conditions [B, L]; settings left out are the folder's.

        The randomness of a picture is a function of the seed and of its index (0, 1, .. unless `indices` are given).
        Raises ConfigError for a condition or setting that the model cannot take, and TooLittleMemoryError where a batch
        does not fit the device.
        """
        settings: dict[str, Any] = {
            "top_k": self.sampling.top_k if top_k is None else top_k,
            "top_p": self.sampling.top_p if top_p is None else top_p,
            "temperature": self.sampling.temperature if temperature is None else temperature,
        }
        each = depth_settings(self.transformer.config.sizes, **settings)
        seed = check_seed(seed)
        cond = check_condition(self.transformer, cond)
        guided = self._guidance(self.sampling.guidance if guidance is None else guidance)
        return self._draw(cond, each, seed, check_indices(indices, len(cond)), guided, progress)

    def _draw(
        self,
        cond: Tensor,
        settings: list[DepthSettings],
        seed: int,
        indices: list[int],
        guidance: Guidance | None,
        progress: Progress | None,
    ) -> Tensor:
        """Codes [B, H, W, D], in batches; everything is checked."""
        size = self.batch_size
        batches = [slice(first, first + size) for first in range(0, len(cond), size)]
        with memory_for(f"{min(len(cond), size)} pictures at once"):
            return torch.cat(
                [self._sampler.draw(cond[part], settings, seed, indices[part], progress, guidance) for part in batches]
            )

    def _guidance(self, scale: float) -> Guidance | None:
        scale = check_guidance(scale, self.transformer.config.condition)
        if scale == 1:
            return None
        if self.tokenizer is None:
            raise ConfigError(f"guidance={scale:g}: the model was imported without a tokenizer. Give --tokenizer then.")
        return Guidance(scale, torch.tensor(self.tokenizer.encode("", self.transformer.config.cond_length)))

    @property
    def positions(self) -> int:
        """Stacks of codes in one picture."""
        return self.transformer.config.positions

    def conditions(
        self, prompts: Sequence[str] | str | None = None, classes: Sequence[int] | int | None = None
    ) -> Tensor:
        """Conditions [N, L] for N prompts or classes; [1, 1] for a model without condition.

        Raises ConfigError for what the model cannot be asked for. A caption of more tokens than the model reads is cut,
        with a warning.
        """
        if prompts is not None and classes is not None:
            raise ConfigError("prompts and classes are both given: give one or the other.")
        condition = self.transformer.config.condition
        given = "text" if prompts is not None else "class" if classes is not None else "none"
        if given != condition:
            wants = {"text": "prompts (--prompt)", "class": "classes (--class)", "none": "neither prompts nor classes"}
            gave = {"text": "prompts", "class": "classes", "none": "neither prompts nor classes"}
            raise ConfigError(
                f"{gave[given]} given, but the model's condition is {condition}: give {wants[condition]}."
            )
        if prompts is not None:
            rows = self._tokens(_captions(prompts))
        elif classes is not None:
            rows = [[self._class(value)] for value in (classes if isinstance(classes, Iterable) else [classes])]
        else:
            rows = [[0]]
        if not rows:
            raise ConfigError("prompts or classes are an empty list: give at least one.")
        return torch.tensor(rows, dtype=torch.int64)

    def _tokens(self, prompts: list[Any]) -> list[list[int]]:
        if self.tokenizer is None:
            raise ConfigError(
                "this model was imported without a tokenizer, so it reads no prompts: import it again with "
                "--tokenizer, or give token ids to sample_codes."
            )
        length = self.transformer.config.cond_length
        cut = 0
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ConfigError(f"prompt {prompt!r}: give a caption of at least one word.")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"prompt {prompt!a:.80} is no text ({error}). Mend it.") from error
            tokens = self.tokenizer.count(prompt)
            cut += tokens > length
            if length < tokens and cut <= CUTS_NAMED:
                logger.warning("prompt %.80r has %d tokens; the model reads the first %d.", prompt, tokens, length)
        if cut > CUTS_NAMED:
            logger.warning("%d of %d prompts have more tokens than the model reads (%d).", cut, len(prompts), length)
        return [self.tokenizer.encode(prompt, length) for prompt in prompts]

    def _class(self, value: Any) -> int:
        number = _whole("class", value, least=0)
        classes = self.transformer.config.cond_vocab_size
        if number >= classes:
            raise ConfigError(f"class={number}: this model knows classes 0 to {classes - 1}. Choose among them.")
        return number


def _captions(prompts: Any) -> list[Any]:
    if not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts={prompts!r}: give a caption, or a list of captions.")
    return [prompts] if isinstance(prompts, str) else list(prompts)


def check_length(prompt: Any) -> None:
    """Raise ConfigError for a caption of more than LONGEST_PROMPT characters."""
    if isinstance(prompt, str) and len(prompt) > LONGEST_PROMPT:
        raise ConfigError(f"prompt of {len(prompt)} characters: give at most {LONGEST_PROMPT}.")


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, R, R] (or [B, 1, R, R]) in [-1, 1], clamped, as 8-bit pictures."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in pixels.numpy()]


def _whole(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ConfigError(f"{name}={value!r}: give a whole number of {least} or more.")
    return number
