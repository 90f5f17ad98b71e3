from collections.abc import Iterator
from pathlib import Path

import pytest

from megarq.errors import ConfigError, DataError
from megarq.text.training import CaptionSample, train_char_bpe, train_sentencepiece, train_tokenizer

TRAINERS = [train_char_bpe, train_sentencepiece]
CAPTIONS = [f"a handwritten {word} in white on black" for word in ("seven", "three", "nine", "Four")] * 5


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_padding_is_id_zero(suffix: str, tmp_path: Path) -> None:
    tokenizer, _ = train_tokenizer(CAPTIONS, 80, tmp_path / f"tokenizer{suffix}")
    assert tokenizer.pad_id == 0


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_vocabulary_is_as_large_as_asked(suffix: str, tmp_path: Path) -> None:
    tokenizer, _ = train_tokenizer(CAPTIONS, 50, tmp_path / f"tokenizer{suffix}")
    assert tokenizer.vocab_size == 50


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_few_captions_give_a_smaller_vocabulary(suffix: str, tmp_path: Path) -> None:
    tokenizer, _ = train_tokenizer(CAPTIONS, 16384, tmp_path / f"tokenizer{suffix}")
    assert 40 < tokenizer.vocab_size < 200


@pytest.mark.parametrize("train", TRAINERS)
def test_the_same_captions_give_the_same_file(train) -> None:  # type: ignore[no-untyped-def]
    assert train(iter(CAPTIONS), 80) == train(iter(CAPTIONS), 80)


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_case_does_not_matter(suffix: str, tmp_path: Path) -> None:
    tokenizer, _ = train_tokenizer(CAPTIONS, 80, tmp_path / f"tokenizer{suffix}")
    assert tokenizer.encode("FOUR", 8) == tokenizer.encode("four", 8)


def test_coverage_measures_lengths(tmp_path: Path) -> None:
    long = " ".join(["seven"] * 40)
    tokenizer, coverage = train_tokenizer([*CAPTIONS[:3], long], 200, tmp_path / "tokenizer.json")
    lengths = [tokenizer.count(caption) for caption in [*CAPTIONS[:3], long]]
    assert (coverage.captions, coverage.max_length, coverage.mean_length) == (4, max(lengths), sum(lengths) / 4)
    assert (coverage.longer_than_32, coverage.longer_than_64) == (0.25, 0.0)


def test_blank_captions_are_skipped(tmp_path: Path) -> None:
    _, coverage = train_tokenizer(["", "  \n", *CAPTIONS], 80, tmp_path / "tokenizer.json")
    assert coverage.captions == len(CAPTIONS)


def test_the_caption_sample_is_even_and_bounded() -> None:
    sample = CaptionSample(100)
    assert len(list(sample.watch(str(i) for i in range(10_000)))) == 10_000
    mean = sum(map(int, sample.captions)) / len(sample.captions)
    assert len(sample.captions) == 100 and 4000 < mean < 6000


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_no_captions_are_an_error(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no captions to train a tokenizer on"):
        train_tokenizer([" "], 80, tmp_path / f"tokenizer{suffix}")


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_an_error_while_reading_captions_comes_through(suffix: str, tmp_path: Path) -> None:
    def torn() -> Iterator[str]:
        yield CAPTIONS[0]
        raise DataError("shard torn.tar is truncated")

    with pytest.raises(DataError, match=r"torn\.tar"):
        train_tokenizer(torn(), 80, tmp_path / f"tokenizer{suffix}")


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_a_vocabulary_below_the_alphabet_is_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--vocab-size 5"):
        train_tokenizer(CAPTIONS, 5, tmp_path / f"tokenizer{suffix}")


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end it in \.json"):
        train_tokenizer(CAPTIONS, 80, tmp_path / "tokenizer.txt")


def test_a_failed_training_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        train_tokenizer(CAPTIONS, 5, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []
