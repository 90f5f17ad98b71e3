"""One face over text tokenizers: Hugging Face `tokenizer.json` and SentencePiece `.model`.

    tokenizer = TextTokenizer.load("tokenizer.json")
    tokenizer.encode("a handwritten seven", length=6)                        -> [12, 97, 41, 0, 0, 0]    0 is [PAD]
    tokenizer.encode("a handwritten seven", length=6, dropout=0.5, seed=1)   -> [12, 30, 55, 41, 0, 0]
    tokenizer.decode([12, 97, 41, 0, 0, 0])                                  -> "a handwritten seven"

Captions end where their tokens end: [PAD] fills the rest, on the right. Nothing marks beginning or end unless the
tokenizer.json itself says so in its post-processor (that of the published CC-3M model does not).
"""

from pathlib import Path
from random import Random

from megarq.errors import ConfigError, DataError
from megarq.files import write_atomically
from megarq.text.huggingface import HuggingFaceTokenizer
from megarq.text.sentence import SentencePieceTokenizer

BACKENDS: dict[str, type[HuggingFaceTokenizer] | type[SentencePieceTokenizer]] = {
    ".json": HuggingFaceTokenizer,
    ".model": SentencePieceTokenizer,
}


class TextTokenizer:
    """Captions to ids of one length, and back. Can be pickled, and sent to loader processes."""

    def __init__(self, content: bytes, suffix: str, source: str) -> None:
        """Build from a file's content.

        Args:
            content: the whole file.
            suffix: ".json" or ".model".
            source: where it came from, for messages.

        Raises:
            DataError: damaged, or without a padding token.
        """
        self._content, self._suffix, self._source = content, suffix, source
        self._backend = BACKENDS[suffix](content, source)

    @classmethod
    def load(cls, path: str | Path) -> "TextTokenizer":
        """Read a tokenizer file; DataError where it is missing, of another kind, damaged, or has no padding token."""
        path = Path(path)
        if path.suffix not in BACKENDS:
            raise DataError(
                f"{path} is not a tokenizer: expected a tokenizer.json (Hugging Face) or a .model (SentencePiece)."
            )
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer file. Train one with tools/train_text_tokenizer.py.")
        return cls(path.read_bytes(), path.suffix, str(path))

    def __reduce__(self) -> tuple[type["TextTokenizer"], tuple[bytes, str, str]]:
        return TextTokenizer, (self._content, self._suffix, self._source)

    @property
    def vocab_size(self) -> int:
        """Every id is below this; `model.cond_vocab_size` must be at least as large."""
        return self._backend.vocab_size

    @property
    def pad_id(self) -> int:
        """Id of [PAD]."""
        return self._backend.pad_id

    def encode(self, caption: str, length: int, dropout: float = 0.0, seed: int | None = None) -> list[int]:
        """Encode a caption.

        Args:
            caption: any text; an empty one is all padding.
            length: ids to return; longer captions are cut, shorter ones padded on the right.
            dropout: rate of BPE dropout (Provilkov et al. 2020), from 0 (the library's own encoding) to 1 (no merges).
            seed: what is dropped is a function of the caption, the rate and this; needed where dropout is above 0.

        Returns:
            `length` ids.

        Raises:
            ConfigError: a rate that is not from 0 to 1, a rate without seed, or a tokenizer that has no merges to drop.
        """
        if not 0 <= dropout <= 1:
            raise ConfigError(f"data.bpe_dropout={dropout}: use a rate from 0 to 1.")
        if dropout == 0 or not caption:
            ids = self._backend.encode(caption, length)
        elif seed is None:
            raise ConfigError(f"data.bpe_dropout={dropout} without a seed: give one, so that the run can be repeated.")
        else:
            ids = self._backend.sample(caption, length, dropout, Random(seed))
        return ids + [self.pad_id] * (length - len(ids))

    def decode(self, ids: list[int]) -> str:
        """The text of ids, padding left out."""
        return self._backend.decode([token for token in ids if token != self.pad_id])

    def count(self, caption: str) -> int:
        """Tokens of a whole caption, before any cut or padding."""
        return len(self._backend.encode(caption, 2**31))

    def save(self, folder: str | Path) -> Path:
        """Write the bytes that were loaded into `folder`, as tokenizer.json or tokenizer.model; returns that path."""
        path = Path(folder) / f"tokenizer{self._suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self._content)
        return path
