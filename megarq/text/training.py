"""Training a text tokenizer: Hugging Face CharBPE (`tokenizer.json`) or SentencePiece BPE (`tokenizer.model`).

Both lower the case and normalise by NFKC, keep [PAD] at id 0 and [UNK] at id 1, and give the same file for the same
captions in the same order. Captions that cannot fill the vocabulary give a smaller one.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megarq.errors import ConfigError, DataError
from megarq.files import write_atomically
from megarq.text.tokenizer import TextTokenizer

PAD, UNKNOWN = "[PAD]", "[UNK]"
WORD_END = "</w>"
ALPHABET = 1000  # characters kept; rarer ones become [UNK]
PRIVATE_USE = 0xF0000  # first code point of Unicode's supplementary private use area A
COVERAGE_SAMPLE = 100_000


def train_tokenizer(captions: Iterable[str], vocab_size: int, output: str | Path) -> tuple[TextTokenizer, "Coverage"]:
    """Train on captions and write the tokenizer.

    Args:
        captions: read once; blank ones are skipped.
        vocab_size: tokens wanted, [PAD] and [UNK] included.
        output: a path ending in .json (Hugging Face CharBPE) or .model (SentencePiece BPE).

    Returns:
        the tokenizer, loaded from the file just written, and what it makes of (a sample of) the captions.

    Raises:
        ConfigError: another ending, or a vocabulary smaller than the captions' alphabet needs.
        DataError: no caption at all.
    """
    output = Path(output)
    train = {".json": train_char_bpe, ".model": train_sentencepiece}.get(output.suffix)
    if train is None:
        raise ConfigError(f"--output {output}: end it in .json (Hugging Face) or .model (SentencePiece).")
    if vocab_size < 1:
        raise ConfigError(f"--vocab-size {vocab_size}: use a number above 0, such as 16384.")
    sample = CaptionSample(COVERAGE_SAMPLE)
    content = train(sample.watch(captions), vocab_size)
    tokenizer = TextTokenizer(content, output.suffix, str(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, content)
    return tokenizer, coverage(tokenizer, sample)


def train_char_bpe(captions: Iterable[str], vocab_size: int) -> bytes:
    """A tokenizer.json: words split at spaces and punctuation, characters merged, the end of a word marked by </w>.

    The library numbers symbols that carry </w> in the order of a hash table, so that two trainings differ. Here it sees
    a word's last character as one of its own, from Unicode's private use area; the marks are put back afterwards.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix=WORD_END)
    tokenizer.add_special_tokens([PAD, UNKNOWN])
    words = Counter(
        word
        for caption in captions
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(caption))
    )
    alphabet = _alphabet(words)
    last = {letter: chr(PRIVATE_USE + index) for index, letter in enumerate(alphabet)}
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[PAD, UNKNOWN], show_progress=False
    )
    texts = (f"{word[:-1]}{last[word[-1]]} " * count for word, count in words.items() if last.keys() >= set(word))
    learner.train_from_iterator(texts, trainer)
    marked = {ord(private): letter + WORD_END for letter, private in last.items()}
    learned = json.loads(learner.to_str())["model"]
    if len(learned["vocab"]) > vocab_size:
        raise ConfigError(
            f"--vocab-size {vocab_size}: the captions' alphabet alone needs {len(learned['vocab'])}. "
            "Ask for that many or more."
        )
    trained = json.loads(tokenizer.to_str())
    trained["model"]["vocab"] = {token.translate(marked): index for token, index in learned["vocab"].items()}
    trained["model"]["merges"] = [[part.translate(marked) for part in merge] for merge in learned["merges"]]
    trained["added_tokens"] = json.loads(learner.to_str())["added_tokens"]
    return Tokenizer.from_str(json.dumps(trained)).to_str(pretty=True).encode("utf-8")


def _alphabet(words: Counter[str]) -> list[str]:
    """The commonest characters, in the order of their code points."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            counts[letter] += count
    return sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:ALPHABET])


def train_sentencepiece(captions: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model: text split at spaces only, NFKC with case folding, unknown characters as [UNK]."""
    model = io.BytesIO()
    interruption: list[Exception] = []

    def guarded() -> Iterator[str]:
        try:
            yield from captions
        except Exception as error:  # kept here: SentencePiece would hide it in a RuntimeError of its own
            interruption.append(error)
            raise

    try:
        SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece=PAD,
            unk_piece=UNKNOWN,
            minloglevel=2,
        )
    except RuntimeError as error:
        if interruption:
            raise interruption[0] from None
        raise ConfigError(
            f"--vocab-size {vocab_size}: SentencePiece cannot train it ({error}). "
            "Ask for more tokens, or end --output in .json."
        ) from error
    return model.getvalue()


class CaptionSample:
    """An even sample of a stream of captions, drawn while something else reads it."""

    def __init__(self, size: int) -> None:
        """Keep up to `size` captions."""
        self.captions: list[str] = []
        self.seen = 0
        self._size = size
        self._random = Random(0)

    def watch(self, captions: Iterable[str]) -> Iterator[str]:
        """Pass on all captions that are not blank, spaces evened out. DataError at the end where there was none."""
        for caption in captions:
            caption = " ".join(caption.split())
            if not caption:
                continue
            self.seen += 1
            if len(self.captions) < self._size:
                self.captions.append(caption)
            elif (place := self._random.randrange(self.seen)) < self._size:
                self.captions[place] = caption
            yield caption
        if not self.seen:
            raise DataError(
                "no captions to train a tokenizer on: give shards with .txt or .json members, or a text file."
            )


@dataclass(frozen=True)
class Coverage:
    """What a tokenizer makes of captions."""

    vocab_size: int
    """Tokens in the vocabulary."""
    captions: int
    """Captions that were read."""
    mean_length: float
    """Mean tokens of a caption."""
    max_length: int
    """Most tokens of a caption."""
    longer_than_32: float
    """Share of captions with more than 32 tokens (cc3m-654m cuts them there)."""
    longer_than_64: float
    """Share of captions with more than 64 tokens (t2i-3.9b cuts them there)."""


def coverage(tokenizer: TextTokenizer, sample: CaptionSample) -> Coverage:
    """Measure a tokenizer on a sample of captions."""
    lengths = [tokenizer.count(caption) for caption in sample.captions]
    return Coverage(
        vocab_size=tokenizer.vocab_size,
        captions=sample.seen,
        mean_length=sum(lengths) / len(lengths),
        max_length=max(lengths),
        longer_than_32=sum(length > 32 for length in lengths) / len(lengths),
        longer_than_64=sum(length > 64 for length in lengths) / len(lengths),
    )
