from pathlib import Path

import pytest
import yaml

from megarq.config.load import config_to_dict, load_config, save_config
from megarq.config.names import CONFIGS, key_suggestion, resolve_name
from megarq.config.run import RQTransformerRunConfig
from megarq.errors import ConfigError

MINIMAL = "architecture: rq-transformer\ntrain:\n  steps: 10\n"


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    """A configuration file that says as little as possible."""
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return str(path)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "written.yaml"
    path.write_text(text)
    return str(path)


def message(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides, "rq-transformer")
    return str(caught.value)


def test_a_bare_name_is_looked_up_in_configs() -> None:
    assert load_config("cc3m-654m").model.embed_dim == 1280


def test_an_existing_path_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc3m-654m").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert load_config("cc3m-654m").train.steps == 10


def test_a_folder_of_that_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").architecture == "rq-transformer"


def test_what_a_file_leaves_out_has_its_default(minimal: str) -> None:
    assert load_config(minimal).train.lr == RQTransformerRunConfig().train.lr


def test_an_empty_section_value_is_refused(tmp_path: Path) -> None:
    assert "train is a section of keys" in message(written(tmp_path, "architecture: rq-transformer\ntrain:\n"))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("train.epochs=2", "train", "epochs", 2.0),
        ("train.betas=[0.5, 0.9]", "train", "betas", [0.5, 0.9]),
        ("train.micro_batch_size=null", "train", "micro_batch_size", None),
        ("train.activation_checkpointing=true", "train", "activation_checkpointing", True),
        ("model.codebook_sizes=", "model", "codebook_sizes", None),
        ("log={console_every: 3}", "log", "console_every", 3),
    ],
)
def test_overrides_win_over_the_file(minimal: str, override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_config(minimal, [override]), section), key) == value


def test_of_equal_overrides_the_last_counts(minimal: str) -> None:
    assert load_config(minimal, ["train.steps=3", "train.steps=4"]).train.steps == 4


def test_a_nested_override_leaves_its_siblings(minimal: str) -> None:
    body = load_config("t2i-3.9b", ["model.body.layers=3"]).model.body
    assert (body.layers, body.heads) == (3, 40)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trian.lr=1", "train.lr"),
        ("train.stpes=1", "train.steps"),
        ("lr=1", "train.lr"),
        ("model.lr=1", "train.lr"),
        ("model.body.layer=1", "model.body.layers"),
        ("embed_dim=1", "model.embed_dim"),
        ("parallel.TP=2", "parallel.tp"),
    ],
)
def test_an_unknown_override_names_the_nearest(minimal: str, override: str, nearest: str) -> None:
    key = override.partition("=")[0]
    text = message(minimal, override)
    assert f"unknown key {key} (command line)" in text and f"Did you mean {nearest}?" in text


def test_a_key_without_its_beginning_finds_all_of_its_section(minimal: str) -> None:
    nearest = "log.console_every or log.validate_every or log.sample_every"
    assert f"unknown key log.every (command line). Did you mean {nearest}?" in message(minimal, "log.every=5")


def test_an_unknown_key_in_the_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "model:\n  body:\n    hedas: 3\n")
    assert message(path) == f"unknown key model.body.hedas ({path}). Did you mean model.body.heads?"


def test_an_unknown_key_like_no_other_lists_what_there_is(minimal: str) -> None:
    assert "Known: parallel.tp, parallel.pp, parallel.sequence, parallel.sharded_init." in message(
        minimal, "parallel.zzzzzz=1"
    )


def test_a_key_below_a_value_is_unknown(minimal: str) -> None:
    assert "unknown key train.lr.peak (command line): train.lr is one number" in message(minimal, "train.lr.peak=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=many", "train.steps=many (command line): expected a whole number or null."),
        ("train.steps=1.5", "train.steps=1.5 (command line): expected a whole number or null."),
        ("train.lr=fast", "train.lr=fast (command line): expected a number."),
        ("train.lr=null", "train.lr=null (command line): expected a number."),
        ("train.activation_checkpointing=maybe", "expected a true or false."),
        ("train.betas=0.9", "train.betas=0.9 (command line): expected a list such as [a, b], each a number."),
        ("train.betas=[a, b]", "train.betas=[a, b] (command line): expected a list"),
        ("train.lr=.nan", "train.lr=.nan (command line): expected a finite number."),
        ("train=3", "train is a section of keys"),
        ("model.body=3", "model.body is a section of keys"),
    ],
)
def test_a_value_of_another_type_names_key_value_and_type(minimal: str, override: str, expected: str) -> None:
    assert expected in message(minimal, override)


def test_a_value_of_another_type_in_the_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "model: {embed_dim: wide}\n")
    assert message(path) == f"model.embed_dim=wide ({path}): expected a whole number."


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${train.lr}", "???"])
def test_references_are_refused(minimal: str, value: str) -> None:
    assert "references are not resolved here" in message(minimal, f"train.precision={value}")


def test_references_in_the_file_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "objective: {targets: '${oc.env:HOME}'}\n")
    assert "references are not resolved here" in message(path)


def test_an_argument_without_equals_is_refused(minimal: str) -> None:
    text = message(minimal, "train.steps", "100")
    assert "'train.steps' (command line): expected key=value" in text and "Did you mean train.steps?" in text


def test_an_override_of_section_and_key_is_refused(minimal: str) -> None:
    assert "train has been given a value" in message(minimal, "train=3", "train.lr=1")


def test_an_unreadable_override_is_refused(minimal: str) -> None:
    assert "is not a YAML value" in message(minimal, "train.betas=[0.5")


def test_an_rqvae_is_refused_where_a_transformer_is_trained() -> None:
    expected = (
        "rqvae-8x8x4 is an rq-vae; megarq/train.py trains an rq-transformer. "
        "Use megarq/train_rqvae.py, or another --model."
    )
    assert message("rqvae-8x8x4") == expected


def test_the_command_line_cannot_change_the_architecture(minimal: str) -> None:
    assert "describes an rq-transformer" in message(minimal, "architecture=rq-vae")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    assert "use one of rq-transformer, rq-vae" in message(written(tmp_path, "architecture: gpt\n"))


def test_a_mistyped_name_lists_the_nearest_and_all() -> None:
    text = message("t2i-3.9B")
    assert "Did you mean t2i-3.9b?" in text and "imagenet-480m" in text


@pytest.mark.parametrize("vocabulary", [1, 10])
def test_a_model_without_captions_has_none_to_drop(minimal: str, vocabulary: int) -> None:
    uncaptioned = ["model.cond_length=1", f"model.cond_vocab_size={vocabulary}"]
    assert load_config(minimal, [*uncaptioned, "data.caption_dropout=0"])
    with pytest.raises(ConfigError, match=r"data\.caption_dropout=0\.1, but the model has no captions"):
        load_config(minimal, [*uncaptioned, "data.caption_dropout=0.1"])


def test_validation_runs_after_the_merge(minimal: str) -> None:
    assert "model.body.heads=7 does not divide" in message(minimal, "model.body.heads=7")


@pytest.mark.parametrize(
    "text", ["a: [1", "- 1\n- 2\n", "train: {lr: 1}\ntrain: {lr: 2}\n", "a: !!python/name:os.getcwd\n"]
)
def test_what_is_not_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert path in message(path)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read as YAML" in message(str(path))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml")))
def test_a_saved_configuration_is_read_back_the_same(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    save_config(config, tmp_path / "config.resolved.yaml")
    assert load_config(str(tmp_path / "config.resolved.yaml")) == config


def test_a_saved_configuration_is_plain_yaml(tmp_path: Path) -> None:
    save_config(load_config("demo"), tmp_path / "config.resolved.yaml")
    assert yaml.safe_load((tmp_path / "config.resolved.yaml").read_text()) == config_to_dict(load_config("demo"))


def test_a_name_may_carry_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text("{}")
    assert resolve_name("zero3.json", tmp_path, ".json") == resolve_name("zero3", tmp_path, ".json")


def test_a_missing_folder_of_names_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"folder of named configurations .*gone is missing"):
        resolve_name("zero3", tmp_path / "gone", ".json")


def test_nothing_is_suggested_for_what_is_like_nothing() -> None:
    assert key_suggestion("qqqqq", ["train.lr", "model.depth"]) == ""
