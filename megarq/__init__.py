"""MegaRQ: large-scale training of residual-quantized text-to-image models (RQ-VAE and RQ-Transformer).

import megarq
generator = megarq.ImageGenerator.from_pretrained(FOLDER)
images = generator.generate(prompts=["a handwritten seven"], count=4)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megarq.inference.generator import ImageGenerator

__all__ = ["ImageGenerator", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `ImageGenerator`, and torch with it, when first asked for."""
    if name == "ImageGenerator":
        from megarq.inference.generator import ImageGenerator

        return ImageGenerator
    raise AttributeError(f"module 'megarq' has no attribute {name!r}")
