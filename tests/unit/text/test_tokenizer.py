import io
import json
import pickle
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer

from megarq.errors import ConfigError, DataError
from megarq.text.tokenizer import TextTokenizer

Contents = dict[str, tuple[bytes, str]]
LONG = 1000


def library_ids(content: bytes, suffix: str, caption: str) -> list[int]:
    if suffix == ".json":
        return Tokenizer.from_str(content.decode()).encode(caption).ids
    return SentencePieceProcessor(model_proto=content).encode(caption)


def strip(tokenizer: TextTokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if token != tokenizer.pad_id]


@pytest.mark.parametrize("kind", ["char", "bytes", "prefix", "sentencepiece"])
def test_encoding_without_dropout_is_the_librarys(kind: str, contents: Contents, captions: list[str]) -> None:
    content, suffix = contents[kind]
    tokenizer = TextTokenizer(content, suffix, kind)
    got = [strip(tokenizer, tokenizer.encode(caption, LONG)) for caption in captions]
    assert got == [library_ids(content, suffix, caption) for caption in captions]


def test_own_merging_at_rate_zero_equals_the_library(tokenizer: TextTokenizer, captions: list[str]) -> None:
    own = [tokenizer._backend.sample(caption, LONG, 0.0, Random(0)) for caption in captions]
    assert own == [tokenizer._backend.encode(caption, LONG) for caption in captions]


def test_own_merging_is_cut_like_the_library(tokenizer: TextTokenizer, captions: list[str]) -> None:
    own = [tokenizer._backend.sample(caption, 7, 0.0, Random(0)) for caption in captions]
    assert own == [tokenizer._backend.encode(caption, 7) for caption in captions]


def test_dropout_is_a_function_of_the_seed(tokenizer: TextTokenizer, captions: list[str]) -> None:
    first = [tokenizer.encode(caption, 64, dropout=0.5, seed=3) for caption in captions]
    assert first == [tokenizer.encode(caption, 64, dropout=0.5, seed=3) for caption in captions]


def test_another_seed_drops_other_merges(tokenizer: TextTokenizer, captions: list[str]) -> None:
    first = [tokenizer.encode(caption, 64, dropout=0.5, seed=3) for caption in captions]
    assert first != [tokenizer.encode(caption, 64, dropout=0.5, seed=4) for caption in captions]


def test_dropout_changes_most_captions(tokenizer: TextTokenizer, captions: list[str]) -> None:
    plain = [tokenizer.encode(caption, LONG) for caption in captions]
    dropped = [tokenizer.encode(caption, LONG, dropout=0.5, seed=3) for caption in captions]
    assert sum(a != b for a, b in zip(plain, dropped, strict=True)) > 0.8 * len(captions)


def test_captions_with_dropout_decode_to_the_same_text(tokenizer: TextTokenizer, captions: list[str]) -> None:
    plain = [tokenizer.decode(tokenizer.encode(caption, LONG)) for caption in captions]
    dropped = [tokenizer.decode(tokenizer.encode(caption, LONG, dropout=0.5, seed=3)) for caption in captions]
    assert dropped == plain


def test_rate_one_leaves_no_merge(char: TextTokenizer) -> None:
    assert len(strip(char, char.encode("seven digit", 64, dropout=1.0, seed=0))) == len("sevendigit")


def test_short_captions_are_padded_on_the_right(char: TextTokenizer) -> None:
    ids = char.encode("seven", 5)
    assert ids == strip(char, ids) + [char.pad_id] * (5 - len(strip(char, ids)))


def test_long_captions_are_cut(tokenizer: TextTokenizer, captions: list[str]) -> None:
    assert {len(tokenizer.encode(caption, 4, dropout=0.5, seed=0)) for caption in captions} == {4}


def test_marks_of_the_file_survive_the_cut(contents: Contents) -> None:
    tokenizer = TextTokenizer(*contents["bytes"], "bytes")
    ids = tokenizer.encode("the digit seven in white on black", 5)
    assert (ids[0], ids[-1]) == (1, 2)


def test_an_empty_caption_is_all_padding(char: TextTokenizer) -> None:
    assert char.encode("", 4, dropout=0.1, seed=0) == [char.pad_id] * 4


def test_decode_leaves_padding_out(char: TextTokenizer) -> None:
    assert char.decode(char.encode("A handwritten Seven", 32)) == "a handwritten seven"


def test_all_ids_are_below_vocab_size(tokenizer: TextTokenizer, captions: list[str]) -> None:
    assert max(max(tokenizer.encode(caption, 64)) for caption in captions) < tokenizer.vocab_size


def test_a_copied_tokenizer_encodes_the_same(tokenizer: TextTokenizer, captions: list[str]) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(captions[0], 32, 0.5, 1) == tokenizer.encode(captions[0], 32, 0.5, 1)


def test_saving_copies_the_bytes(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    saved = tokenizer.save(tmp_path / "model")
    assert TextTokenizer.load(saved).save(tmp_path / "again").read_bytes() == tokenizer._content


def test_a_dropout_in_the_file_does_not_make_encoding_random(contents: Contents) -> None:
    specification = json.loads(contents["char"][0])
    specification["model"]["dropout"] = 0.9
    tokenizer = TextTokenizer(json.dumps(specification).encode(), ".json", "file")
    assert tokenizer.encode("handwritten", 32) == TextTokenizer(*contents["char"], "char").encode("handwritten", 32)


def test_merges_written_as_strings_are_read(contents: Contents) -> None:
    specification = json.loads(contents["char"][0])
    specification["model"]["merges"] = [" ".join(pair) for pair in specification["model"]["merges"]]
    tokenizer = TextTokenizer(json.dumps(specification).encode(), ".json", "file")
    caption = "a handwritten seven"
    assert tokenizer._backend.sample(caption, LONG, 0.0, Random(0)) == tokenizer._backend.encode(caption, LONG)


def test_padding_set_in_the_file_does_not_matter(contents: Contents) -> None:
    library = Tokenizer.from_str(contents["char"][0].decode())
    library.enable_padding(length=20, direction="left", pad_id=0, pad_token="[PAD]")
    library.enable_truncation(2)
    tokenizer = TextTokenizer(library.to_str().encode(), ".json", "file")
    assert tokenizer.encode("a seven, a three", 16) == TextTokenizer(*contents["char"], "c").encode(
        "a seven, a three", 16
    )


ODD = [
    "a\tseven\n on\u00a0black",
    "  seven \u0308nai\u0308ve  ",
    "[PAD]seven [UNK] a[PAD]",
    "\u3000漢字 on",
    "a \u2581seven \ufdfa",
]


def test_spaces_tabs_marks_and_special_tokens_are_encoded_as_the_library_does(contents: Contents) -> None:
    content, suffix = contents["char"]
    tokenizer = TextTokenizer(content, suffix, "char")
    assert [tokenizer._backend.encode(text, LONG) for text in ODD] == [
        library_ids(content, suffix, text) for text in ODD
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": "a s"}, "content": "photos"}},
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Strip", "strip_left": True, "strip_right": True}],
            }
        },
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "n", "prepend_scheme": "first", "split": False}},
        {"added_tokens": [{"content": "a s", "lstrip": False}]},
        {"added_tokens": [{"content": "v", "lstrip": True}]},
    ],
    ids=lambda change: f"{next(iter(change))} {str(next(iter(change.values())))[:40]}",
)
def test_a_tokenizer_to_which_spaces_matter_reads_whole_captions(contents: Contents, change: dict[str, Any]) -> None:
    specification = json.loads(contents["char"][0])
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": False}
    for name, value in change.items():
        if name == "added_tokens":
            value = [*specification[name], *(flags | token | {"id": 299} for token in value)]
        specification[name] = value
    content = json.dumps(specification).encode()
    tokenizer, caption = TextTokenizer(content, ".json", "file"), "a seven on a  v "
    assert tokenizer._backend.encode(caption, LONG) == library_ids(content, ".json", caption)
    assert tokenizer._backend.sample(caption, LONG, 0.0, Random(0)) == library_ids(content, ".json", caption)


def trained_sentencepiece(**options: object) -> bytes:
    model = io.BytesIO()
    lines = [f"a handwritten seven {i} unhappily running" for i in range(50)]
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, minloglevel=2, pad_id=3, **options)
    return model.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True, "vocab_size": 330},
        {"user_defined_symbols": ["even", "<x>"], "vocab_size": 60},
        {"split_by_whitespace": False, "vocab_size": 100},
        {"treat_whitespace_as_suffix": True, "vocab_size": 60},
    ],
    ids=["byte fallback", "user-defined symbols", "pieces across spaces", "spaces as suffixes"],
)
def test_own_merging_knows_sentencepieces_extras(options: dict[str, object], captions: list[str]) -> None:
    tokenizer = TextTokenizer(trained_sentencepiece(model_type="bpe", **options), ".model", "extras")
    captions = [*captions, "seven<x>even <x>a"]
    own = [tokenizer._backend.sample(caption, LONG, 0.0, Random(0)) for caption in captions]
    assert own == [tokenizer._backend.encode(caption, LONG) for caption in captions]


def test_sentencepiece_unigram_refuses_dropout() -> None:
    tokenizer = TextTokenizer(trained_sentencepiece(model_type="unigram", vocab_size=36), ".model", "unigram.model")
    with pytest.raises(ConfigError, match=r"unigram\.model, a SentencePiece unigram model"):
        tokenizer.encode("seven", 4, dropout=0.1, seed=0)


def test_models_without_merges_refuse_dropout() -> None:
    from tokenizers import models

    content = Tokenizer(models.WordLevel({"[PAD]": 0, "seven": 1}, unk_token="[PAD]")).to_str().encode()
    with pytest.raises(ConfigError, match="whose model is 'WordLevel'"):
        TextTokenizer(content, ".json", "words.json").encode("seven", 4, dropout=0.1, seed=0)


@pytest.mark.parametrize("kind", ["char", "bytes", "prefix", "sentencepiece"])
def test_an_empty_caption_has_nothing_to_drop(kind: str, contents: Contents) -> None:
    tokenizer = TextTokenizer(*contents[kind], kind)
    whole = tokenizer.encode("", 6)
    assert all(tokenizer.encode("", 6, dropout=1.0, seed=seed) == whole for seed in range(20))


def test_dropout_without_seed_is_refused(char: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"bpe_dropout=0\.1 without a seed"):
        char.encode("seven", 4, dropout=0.1)


def test_a_rate_above_one_is_refused(char: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"bpe_dropout=1\.5: use a rate from 0 to 1"):
        char.encode("seven", 4, dropout=1.5, seed=0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json: no such tokenizer file"):
        TextTokenizer.load(tmp_path / "gone.json")


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab\.txt is not a tokenizer"):
        TextTokenizer.load(tmp_path / "vocab.txt")


@pytest.mark.parametrize("kind", ["char", "sentencepiece"])
def test_a_file_cut_short_is_refused(kind: str, contents: Contents, tmp_path: Path) -> None:
    content, suffix = contents[kind]
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"cut{suffix} is not a"):
        TextTokenizer.load(path)


def test_json_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"architecture": "rq-transformer"}')
    with pytest.raises(DataError, match=r"config\.json is not a tokenizer\.json"):
        TextTokenizer.load(path)


def test_a_tokenizer_without_padding_is_refused() -> None:
    from tokenizers import models

    content = Tokenizer(models.BPE({"a": 0}, [])).to_str().encode()
    with pytest.raises(DataError, match=r"has no padding token: looked for \[PAD\]"):
        TextTokenizer(content, ".json", "file")


def test_a_sentencepiece_model_without_padding_is_refused() -> None:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9), model_writer=model, minloglevel=2, vocab_size=9, model_type="bpe"
    )
    with pytest.raises(DataError, match="has no padding piece: its pad_id is -1"):
        TextTokenizer(model.getvalue(), ".model", "file")
