"""A `tokenizer.json` of the Hugging Face `tokenizers` library, with a BPE dropout that is a function of its seed."""

import json
from random import Random
from typing import Any

from tokenizers import Tokenizer

from megarq.errors import ConfigError, DataError
from megarq.text.bpe import merge_symbols

PAD_TOKENS = ("[PAD]", "<pad>")


class HuggingFaceTokenizer:
    """Any tokenizer.json: byte-level BPE, CharBPE, and (without dropout) the library's other models.

    Dropout needs the smallest symbols of each word as normaliser, pre-tokenizer, unknown token and byte fallback leave
    them. The library itself yields them when its own dropout is 1, which skips every merge and so is no longer random;
    only merging is done here.
    """

    def __init__(self, content: bytes, source: str) -> None:
        """Read the file's content; `source` names it in errors.

        Raises DataError where it is damaged or has no padding token.
        """
        try:
            text = content.decode("utf-8")
            self._tokenizer = self._build(text)
            self._letters = self._build(text)
            specification = json.loads(text)
        except Exception as error:  # the library raises bare Exception for whatever is wrong in the file
            raise DataError(
                f"{source} is not a tokenizer.json that the `tokenizers` library can read ({error}). Copy it again, or "
                "train one with tools/train_text_tokenizer.py."
            ) from error
        self._source = source
        self._merges: dict[tuple[int, int], tuple[int, int]] | None = None
        self._model = specification["model"]
        if self._is_bpe:
            self._tokenizer.model.dropout = None
            self._letters.model.dropout = 1.0
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.pad_id = self._find_pad(specification)

    @staticmethod
    def _build(text: str) -> Tokenizer:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @property
    def _is_bpe(self) -> bool:
        return self._model.get("type", "BPE") == "BPE" and "merges" in self._model

    def _find_pad(self, specification: dict[str, Any]) -> int:
        declared = (specification.get("padding") or {}).get("pad_token")
        for token in (*PAD_TOKENS, declared):
            if token is not None and (found := self._tokenizer.token_to_id(token)) is not None:
                return found
        raise DataError(
            f"{self._source} has no padding token: looked for {', '.join(PAD_TOKENS)} among {self.vocab_size} tokens. "
            "Captions are padded to one length: add [PAD] to its special tokens, or train one with "
            "tools/train_text_tokenizer.py."
        )

    def encode(self, caption: str, length: int) -> list[int]:
        """The library's ids, at most `length` of them; special tokens that its post-processor adds survive the cut."""
        encoding = self._tokenizer.encode(caption)
        return _truncate(encoding.ids, encoding.special_tokens_mask, length)

    def sample(self, caption: str, length: int, rate: float, random: Random) -> list[int]:
        """Like `encode`, with each merge left out of each step with probability `rate`; ConfigError unless BPE."""
        ranks = self._merge_ranks()
        encoding = self._letters.encode(caption)
        ids: list[int] = []
        special: list[int] = []
        word: list[int] = []
        letters = zip(encoding.ids, encoding.word_ids, encoding.special_tokens_mask, strict=True)
        previous: int | None = None

        def close() -> None:
            merged = merge_symbols(word, lambda left, right: ranks.get((left, right)), rate, random)
            ids.extend(merged)
            special.extend([0] * len(merged))
            word.clear()

        for token, index, is_special in letters:
            if is_special or index != previous:
                close()
            previous = index
            if is_special:
                ids.append(token)
                special.append(1)
            else:
                word.append(token)
        close()
        return _truncate(ids, special, length)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _merge_ranks(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(left id, right id) -> (rank, merged id), built at the first call."""
        if self._merges is None:
            if not self._is_bpe:
                raise ConfigError(
                    f"data.bpe_dropout with {self._source}, whose model is {self._model.get('type')!r}: dropout needs "
                    "BPE merges. Set data.bpe_dropout=0 or use a BPE tokenizer."
                )
            vocabulary = self._model["vocab"]
            prefix = len(self._model.get("continuing_subword_prefix") or "")
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in self._model["merges"])
            self._merges = {
                (vocabulary[left], vocabulary[right]): (rank, vocabulary[left + right[prefix:]])
                for rank, (left, right) in enumerate(pairs)
            }
        return self._merges


def _truncate(ids: list[int], special: list[int], length: int) -> list[int]:
    """Cut the text between the leading and the trailing special tokens until all fit into `length`."""
    if len(ids) <= length:
        return ids
    leading = next((i for i, is_special in enumerate(special) if not is_special), len(ids))
    trailing = next((i for i, is_special in enumerate(reversed(special)) if not is_special), 0)
    room = max(0, length - leading - trailing)
    return (ids[: leading + room] + ids[len(ids) - trailing :])[:length]
