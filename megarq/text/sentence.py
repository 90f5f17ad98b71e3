"""A SentencePiece `.model`, with a BPE dropout that is a function of its seed."""

import re
from random import Random

from sentencepiece import SentencePieceProcessor

from megarq.errors import ConfigError, DataError
from megarq.text.bpe import Drops, WordMerger, merge_symbols

PAD_PIECES = ("[PAD]", "<pad>")
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
SPACE = "\u2581"
WORD = re.compile(f"{SPACE}[^{SPACE}]*|[^{SPACE}]+")
USER_DEFINED = 4  # SentencePiece.Type


class SentencePieceTokenizer:
    """A SentencePiece model: BPE with or without dropout, the others without."""

    def __init__(self, content: bytes, source: str) -> None:
        """Read the file's content; `source` names it in errors.

        Raises DataError where it is damaged or has no padding piece.
        """
        self._source = source
        try:
            self._processor = SentencePieceProcessor(model_proto=content)
            self._type = MODEL_TYPES.get(_model_type(content), "unknown")
        except (RuntimeError, IndexError, ValueError) as error:
            raise DataError(
                f"{source} is not a SentencePiece model ({error}). Copy it again, or train one with "
                "tools/train_text_tokenizer.py."
            ) from error
        self.vocab_size = self._processor.vocab_size()
        self.pad_id = self._find_pad()
        self._table: _PieceTable | None = None

    def _find_pad(self) -> int:
        if self._processor.pad_id() >= 0:
            return self._processor.pad_id()
        for piece in PAD_PIECES:
            found = self._processor.piece_to_id(piece)
            if self._processor.id_to_piece(found) == piece:
                return found
        raise DataError(
            f"{self._source} has no padding piece: its pad_id is -1 and none of {', '.join(PAD_PIECES)} is in it. "
            "Captions are padded to one length; train it with pad_id=0, as tools/train_text_tokenizer.py does."
        )

    def encode(self, caption: str, length: int) -> list[int]:
        """The library's ids, without sentence marks, at most `length` of them."""
        return self._processor.encode(caption)[:length]

    def sample(self, caption: str, length: int, rate: float, random: Random) -> list[int]:
        """Like `encode`, with each merge left out of each step with probability `rate`; ConfigError unless BPE."""
        if self._type != "bpe":
            raise ConfigError(
                f"data.bpe_dropout with {self._source}, a SentencePiece {self._type} model: dropout needs BPE merges. "
                "Set data.bpe_dropout=0 or train the tokenizer with model type bpe."
            )
        if self._table is None:
            self._table = _PieceTable(self._processor)
        return self._table.segment(self._processor.normalize(caption), Drops(rate, random))[:length]

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return self._processor.decode(ids)


class _PieceTable:
    """The pieces of a SentencePiece BPE model, as merging needs them."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._unknown = processor.unk_id()
        self._ids: dict[str, int] = {}
        self._merges: dict[str, tuple[float, str]] = {}  # the higher a piece's score, the earlier it is merged
        self._bytes: dict[int, int] = {}
        self._unused: set[str] = set()
        for index in range(processor.vocab_size()):
            piece = processor.id_to_piece(index)
            if processor.is_byte(index):
                self._bytes[int(piece[3:5], 16)] = index
            elif not processor.is_control(index) and not processor.is_unknown(index):
                self._ids[piece] = index
                self._merges[piece] = (-processor.get_score(index), piece)
                if processor.is_unused(index):
                    self._unused.add(piece)
        self._whole = _user_defined(processor.serialized_model_proto())
        alternatives = [re.escape(piece) for piece in sorted(self._whole, key=len, reverse=True)]
        self._letters = re.compile("|".join([*alternatives, "."]), re.DOTALL)
        self._crosses_words = any(SPACE in piece[1:] for piece in self._ids.keys() - self._whole)
        self._plain = not (self._whole or self._unused or self._crosses_words)
        self._merger = WordMerger(self._merge)

    def segment(self, text: str, drops: Drops) -> list[int]:
        """Ids of normalised text."""
        halves: dict[str, tuple[str, str]] = {}  # what an unused piece was merged from

        def merge_and_note(left: str, right: str) -> tuple[float, str] | None:
            found = self._merge(left, right)
            if found is not None and found[1] in self._unused:
                halves[found[1]] = (left, right)
            return found

        waiting: list[str] = []
        if self._plain:
            for word in WORD.findall(text):
                waiting += self._merger(tuple(word), drops)
        else:
            for letters in self._words(self._letters.findall(text)):
                waiting += merge_symbols(letters, merge_and_note, drops)
        waiting.reverse()
        ids: list[int] = []
        in_unknown = False
        while waiting:
            piece = waiting.pop()
            if piece in self._unused and piece in halves:
                waiting.extend(reversed(halves[piece]))
                continue
            index = self._ids.get(piece)
            if index is not None:
                ids.append(index)
            elif self._bytes:
                ids.extend(self._bytes[byte] for byte in piece.encode("utf-8"))
            elif not in_unknown:  # a run of unknown characters is one unknown id
                ids.append(self._unknown)
            in_unknown = index is None
        return ids

    def _merge(self, left: str, right: str) -> tuple[float, str] | None:
        found = self._merges.get(left + right)
        return None if found is None or left in self._whole or right in self._whole else found

    def _words(self, letters: list[str]) -> list[list[str]]:
        """Letters cut before each space mark, since dropout is meant for a word; uncut where pieces cross spaces."""
        words: list[list[str]] = []
        for letter in letters:
            if not words or (letter.startswith(SPACE) and not self._crosses_words):
                words.append([])
            words[-1].append(letter)
        return words


def _fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """(field number, value) of a protocol-buffer message: the library does not tell all that its file holds."""
    found: list[tuple[int, int | bytes]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            found.append((number, varint()))
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        found.append((number, message[at : at + size]))
        at += size
    return found


def _model_type(content: bytes) -> int:
    """`trainer_spec.model_type` of a ModelProto; unigram is what the field defaults to."""
    for number, value in _fields(content):
        if number == 2 and isinstance(value, bytes):
            return next((int(kind) for field, kind in _fields(value) if field == 3), 1)
    return 1


def _user_defined(content: bytes) -> frozenset[str]:
    """Pieces of type USER_DEFINED in a ModelProto: they match before any merging and never merge."""
    pieces = (dict(_fields(value)) for number, value in _fields(content) if number == 1 and isinstance(value, bytes))
    return frozenset(bytes(piece[1]).decode("utf-8") for piece in pieces if piece.get(3) == USER_DEFINED)
