import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megarq.text.tokenizer import TextTokenizer
from megarq.text.training import train_char_bpe, train_sentencepiece

WORDS = [
    *(
        "a",
        "an",
        "the",
        "handwritten",
        "seven",
        "three",
        "digit",
        "number",
        "in",
        "white",
        "on",
        "black",
        "photo",
        "of",
    ),
    *("painted", "small", "large", "lower", "centre", "umbrella", "Straße", "naïve", "漢字", "zebra-crossing", "3.5"),
    *("café", "o'clock", "running", "runner", "runs", "unhappily", "happiness"),
]


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of words the tokenizers were trained on, with odd spaces, capitals and punctuation."""
    source = random.Random(seed)
    made = []
    for _ in range(count):
        words = source.choices(WORDS, k=source.randint(1, 14))
        words = [word.upper() if source.random() < 0.1 else word for word in words]
        made.append(source.choice([" ", "  ", ", "]).join(words) + source.choice(["", ".", " !", " "]))
    return made


def byte_level() -> bytes:
    """A byte-level BPE whose post-processor adds a beginning and an end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(300, 1), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer.to_str().encode()


def subword_prefix() -> bytes:
    """BPE marking what continues a word by ##, with neither normaliser nor pre-tokenizer splitting punctuation."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]"], continuing_subword_prefix="##", show_progress=False
    )
    tokenizer.train_from_iterator(sentences(300, 1), trainer)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="session")
def contents() -> dict[str, tuple[bytes, str]]:
    """File content and ending of one tokenizer of each kind."""
    captions = sentences(300, 1)
    return {
        "char": (train_char_bpe(captions, 300), ".json"),
        "bytes": (byte_level(), ".json"),
        "prefix": (subword_prefix(), ".json"),
        "sentencepiece": (train_sentencepiece(captions, 300), ".model"),
    }


@pytest.fixture(params=["char", "bytes", "prefix", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, contents: dict[str, tuple[bytes, str]]) -> TextTokenizer:
    """A BPE tokenizer of each kind in turn."""
    content, suffix = contents[request.param]
    return TextTokenizer(content, suffix, request.param)


@pytest.fixture
def char(contents: dict[str, tuple[bytes, str]]) -> TextTokenizer:
    """The CharBPE tokenizer."""
    return TextTokenizer(*contents["char"], "char")


@pytest.fixture(scope="session")
def captions() -> list[str]:
    """Captions the tokenizers did not see, an empty one, and one with characters they do not know."""
    return [*sentences(200, 2), "", "   ", "ψ ψψ seven ψa", "😀 seven"]
