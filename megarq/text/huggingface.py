"""A `tokenizer.json` of the Hugging Face `tokenizers` library, with a BPE dropout that is a function of its seed."""

import json
from functools import lru_cache
from itertools import groupby
from random import Random
from typing import Any

from tokenizers import Tokenizer

from megarq.errors import ConfigError, DataError
from megarq.text.bpe import Drops, WordMerger

PAD_TOKENS = ("[PAD]", "<pad>")
SPACELESS = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"},
    "pre_tokenizer": {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"},
}
"""The library's parts under which a caption is the chain of the texts between its spaces."""
CACHED = 2**16
"""Such texts that are remembered."""


class HuggingFaceTokenizer:
    """Any tokenizer.json: byte-level BPE, CharBPE, and (without dropout) the library's other models.

    Dropout needs the smallest symbols of each word as normaliser, pre-tokenizer, unknown token and byte fallback leave
    them. The library itself yields them when its own dropout is 1, which skips every merge and so is no longer random;
    only merging is done here. Where spaces do nothing but separate, the library sees each text between them once: to
    normalise and cut a caption takes it as long as everything else together.
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
        self._merger: WordMerger | None = None
        self._model = specification["model"]
        if self._is_bpe:
            self._tokenizer.model.dropout = None
            self._letters.model.dropout = 1.0
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.pad_id = self._find_pad(specification)
        self._separable = _is_separable(specification)
        self._plain_of = lru_cache(CACHED)(self._plain) if self._separable else self._plain
        self._words_of = lru_cache(CACHED)(self._words) if self._separable else self._words

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
        ids: list[int] = []
        special: list[int] = []
        for text in self._texts(caption):
            part = self._plain_of(text)
            ids += part[0]
            special += part[1]
        return _truncate(ids, special, length)

    def sample(self, caption: str, length: int, rate: float, random: Random) -> list[int]:
        """Like `encode`, with each merge left out of each step with probability `rate`; ConfigError unless BPE."""
        if self._merger is None:
            ranks = self._merge_ranks()
            self._merger = WordMerger(lambda left, right: ranks.get((left, right)))
        drops = Drops(rate, random)
        ids: list[int] = []
        special: list[int] = []
        for text in self._texts(caption):
            for is_special, letters in self._words_of(text):
                merged = self._merger(letters, drops)
                ids += merged
                special += [is_special] * len(merged)
        return _truncate(ids, special, length)

    def _texts(self, caption: str) -> list[str]:
        return caption.split(" ") if self._separable else [caption]

    def _plain(self, text: str) -> tuple[list[int], list[int]]:
        """The library's ids, and which of them its post-processor added (1, else 0)."""
        encoding = self._tokenizer.encode(text)
        return encoding.ids, encoding.special_tokens_mask

    def _words(self, text: str) -> list[tuple[int, tuple[int, ...]]]:
        """The smallest symbols of each word, each special token as a word of its own: (whether it is one, ids)."""
        encoding = self._letters.encode(text)
        words: list[tuple[int, tuple[int, ...]]] = []
        letters = zip(encoding.ids, encoding.word_ids, encoding.special_tokens_mask, strict=True)
        for _, word in groupby(enumerate(letters), lambda place: (place[0] if place[1][2] else None, place[1][1])):
            ids, _, special = zip(*(letter for _, letter in word), strict=True)
            words.append((special[0], ids))
        return words

    def decode(self, ids: list[int]) -> str:
        """The text of some ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _merge_ranks(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(left id, right id) -> (rank, merged id). Raises ConfigError unless BPE."""
        if not self._is_bpe:
            raise ConfigError(
                f"data.bpe_dropout with {self._source}, whose model is {self._model.get('type')!r}: dropout needs "
                "BPE merges. Set data.bpe_dropout=0 or use a BPE tokenizer."
            )
        vocabulary = self._model["vocab"]
        prefix = len(self._model.get("continuing_subword_prefix") or "")
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in self._model["merges"])
        return {
            (vocabulary[left], vocabulary[right]): (rank, vocabulary[left + right[prefix:]])
            for rank, (left, right) in enumerate(pairs)
        }


def _is_separable(specification: dict[str, Any]) -> bool:
    """Whether any caption may be cut at its spaces before the library sees it."""
    steps = {part: _steps(specification.get(part), f"{part}s".replace("_", "")) for part in SPACELESS}
    tokens = specification.get("added_tokens") or []
    return (
        all(steps[part] <= harmless for part, harmless in SPACELESS.items())
        and bool(steps["pre_tokenizer"])
        and not any(token["lstrip"] or token["rstrip"] or " " in token["content"] for token in tokens)
        and specification.get("post_processor") is None
    )


def _steps(stated: dict[str, Any] | None, list_name: str) -> set[str]:
    """Types of a normaliser or pre-tokenizer, or of those in a sequence of them."""
    if stated is None:
        return set()
    return {step["type"] for step in stated[list_name]} if stated["type"] == "Sequence" else {stated["type"]}


def _truncate(ids: list[int], special: list[int], length: int) -> list[int]:
    """Cut the text between the leading and the trailing special tokens until all fit into `length`."""
    if len(ids) <= length:
        return ids
    leading = next((i for i, is_special in enumerate(special) if not is_special), len(ids))
    trailing = next((i for i, is_special in enumerate(reversed(special)) if not is_special), 0)
    room = max(0, length - leading - trailing)
    return (ids[: leading + room] + ids[len(ids) - trailing :])[:length]
