"""From pictures to a result, with networks that stand in for the real ones."""

import io
import json
import runpy
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from captioned_tars import picture, write_tar
from PIL import Image
from safetensors.torch import save_file
from scored_pictures import stand_in, write_pictures

from megarq import cli
from megarq.data.picture_set import PictureSettings
from megarq.errors import ConfigError, DataError
from megarq.scoring import evaluate as module
from megarq.scoring.evaluate import Request, evaluate, make_reference
from megarq.scoring.networks import FeatureNetwork
from megarq.scoring.protocols import PROTOCOLS
from megarq.scoring.result import to_result, to_table, write_result
from megarq.scoring.scores import ScoreSettings
from megarq.scoring.statistics import write_statistics

CPU = torch.device("cpu")
PAPER = PROTOCOLS["rq-paper"]
SMALL = ScoreSettings(is_splits=2, kid_subset_size=4, kid_subsets=3)


@pytest.fixture(scope="module")
def many(files: Path) -> Path:
    """Forty small pictures."""
    return write_pictures(files / "many", 40, 2, size=(8, 8))


@pytest.fixture(scope="module")
def others(files: Path) -> Path:
    """Thirty smoother ones."""
    return write_pictures(files / "others", 30, 3, blur=2.0, size=(8, 8))


def ask(images: Path, reference: Path | None, *metrics: str, **changes: Any) -> Request:
    asked = Request(str(images), str(reference) if reference else None, PAPER, metrics, CPU, settings=SMALL)
    return replace(asked, **changes)


def features_of(folder: Path) -> np.ndarray:
    """What the stand-in sees, computed plainly."""
    rows = [np.asarray(Image.open(path), np.float64)[0, :6].mean(1) / 255 for path in sorted(folder.iterdir())]
    return np.stack(rows)


def frechet(ours: np.ndarray, theirs: np.ndarray) -> float:
    from scipy.linalg import sqrtm

    one, two = np.cov(ours.T), np.cov(theirs.T)
    return float(((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(one + two - 2 * sqrtm(one @ two).real))


def test_fid_from_pictures_is_the_distance_of_their_features(quick, many, others):
    found = evaluate(ask(many, others, "fid", batch_size=7))
    assert found.metrics["fid"]["value"] == pytest.approx(frechet(features_of(many), features_of(others)), abs=1e-6)
    assert (found.features.count, found.reference.count, found.metrics["fid"]["layer"]) == (40, 30, "2048")


class Projected:
    """In Inception's place: 2,048 features, which are random projections of the grey levels, cut at zero."""

    weights = stand_in("inception", ("2048",)).weights

    def __init__(self, side: int) -> None:
        self._projection = torch.randn(3 * side * side, 2048, generator=torch.Generator().manual_seed(0)) / side

    def network(self) -> FeatureNetwork:
        def features(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (((pixels.flatten(1).float() / 255 - 0.5) @ self._projection).relu(),)

        return FeatureNetwork("inception", ("2048",), features, self.weights, 2048, "none")


@pytest.mark.full
def test_fid_of_2048_dimensions_is_that_of_scipys_root_in_float64(tmp_path, monkeypatch):
    """Of more pictures than dimensions, so that no covariance is singular."""
    network = Projected(8).network()
    monkeypatch.setattr(module, "find_weights", lambda name, given: None)
    monkeypatch.setattr(module, "build_network", lambda *_: network)
    ours = write_pictures(tmp_path / "ours", 2600, 5, size=(8, 8))
    theirs = write_pictures(tmp_path / "theirs", 2500, 6, blur=1.5, size=(8, 8))
    found = evaluate(ask(ours, theirs, "fid")).metrics["fid"]["value"]
    seen = []
    for folder in (ours, theirs):
        pictures = [torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.iterdir())]
        parts = torch.stack(pictures).permute(0, 3, 1, 2).split(64)  # float32 products depend on the batch
        seen.append(torch.cat([network.module(part)[0] for part in parts]).double().numpy())
    assert all(np.linalg.matrix_rank(np.cov(rows.T)) == 2048 for rows in seen)
    assert found > 1 and found == pytest.approx(frechet(*seen), abs=1e-6)


def test_each_metric_tells_the_resize_of_its_own_network(quick, many, others):
    told = {"inception": "to 299", "vgg16": "to 224"}
    network = lambda name, p, layers, *_: replace(stand_in(name, tuple(layers)), resize=told[name])  # noqa: E731
    with patch.object(module, "build_network", network):
        result = to_result(evaluate(ask(many, others, "fid", "prc", prc_network="vgg16")))
    assert {name: score["resize"] for name, score in result["metrics"].items()} == {
        "fid": "to 299",
        "precision": "to 224",
        "recall": "to 224",
    }


def test_each_metric_is_named_when_it_starts(quick, many, others, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    evaluate(ask(many, others, "is", "fid"))
    assert screen.getvalue().index("is: ") < screen.getvalue().index("fid: ")


def test_statistics_give_what_their_pictures_give(quick, many, others, tmp_path):
    metrics = ("fid", "kid", "prc")
    reference = make_reference(
        module.open_pictures(others), [stand_in("inception", ("2048",))], PAPER, CPU, keep=["inception"]
    )
    write_statistics(tmp_path / "others.npz", reference, features=True)
    one, two = evaluate(ask(many, others, *metrics)), evaluate(ask(many, tmp_path / "others.npz", *metrics))
    assert one.metrics == two.metrics
    assert two.reference.kind == "statistics" and two.reference.sha256 != one.reference.sha256


def test_the_authors_npz_gives_the_fid_of_its_pictures_and_a_note(quick, many, others, tmp_path):
    values = features_of(others).astype(np.float32)
    np.savez(tmp_path / "coco_256_val.npz", mu=values.mean(0), sigma=np.cov(values, rowvar=False))
    found = evaluate(ask(many, tmp_path / "coco_256_val.npz", "fid"))
    assert found.metrics["fid"]["value"] == pytest.approx(
        evaluate(ask(many, others, "fid")).metrics["fid"]["value"], abs=1e-6
    )
    assert any("coco_256_val.npz do not say which network" in warning for warning in found.warnings)
    with pytest.raises(
        DataError, match="hold no features of inception, which kid needs. Give the pictures, or make them"
    ):
        evaluate(ask(many, tmp_path / "coco_256_val.npz", "kid"))


def test_each_wrong_reference_is_refused_before_a_picture_is_seen(quick, many, others, tmp_path, monkeypatch):
    reference = make_reference(module.open_pictures(others), [stand_in("inception", ("2048",))], PAPER, CPU)
    write_statistics(tmp_path / "others.npz", reference, features=False)
    monkeypatch.setattr(module, "extract", None)
    refused = {
        "were made under protocol rq-paper, not clean": {"protocol": PROTOCOLS["clean"]},
        "are of inception, not of dinov2": {"metrics": ("fd-dinov2",)},
        "are of inception, not of vgg16": {"metrics": ("prc",), "prc_network": "vgg16"},
    }
    for message, changes in refused.items():
        with pytest.raises(DataError, match=message):
            evaluate(
                ask(many, tmp_path / "others.npz", "fid", **changes)
                if "metrics" not in changes
                else replace(ask(many, tmp_path / "others.npz", "fid"), **changes)
            )
    quick(sha256="1" * 64)
    with pytest.raises(
        DataError, match="were made with weights of inception of sha256 000000000000.., not 111111111111"
    ):
        evaluate(ask(many, tmp_path / "others.npz", "fid"))
    quick(dim=5)
    with pytest.raises(DataError, match="have 6 dimensions, the features of inception 5"):
        evaluate(ask(many, tmp_path / "others.npz", "fid"))
    larger = write_pictures(tmp_path / "larger", 4, 4, size=(9, 9))
    quick()
    with pytest.raises(
        DataError, match="the reference's pictures are 8x8, those to be scored 9x9. Make the reference at"
    ):
        evaluate(ask(larger, tmp_path / "others.npz", "fid"))
    with pytest.raises(DataError, match="the reference's pictures are 9x9, those to be scored 8x8. Make the"):
        evaluate(ask(many, larger, "fid"))
    single = write_pictures(tmp_path / "single", 1, 4, size=(8, 8))
    with pytest.raises(DataError, match="the reference .*single has 1 picture: give at least 2"):
        evaluate(ask(many, single, "fid"))
    oblong = write_pictures(tmp_path / "oblong", 2, 4, size=(9, 8))
    with pytest.raises(ConfigError, match="--reference-transform center makes squares, but .* are 9x8"):
        evaluate(ask(oblong, many, "fid", reference_transform="center"))
    with pytest.raises(ConfigError, match="--is-splits 41 of 40 pictures"):
        evaluate(ask(many, None, "is", settings=ScoreSettings(is_splits=41)))
    (single / "000.png").write_bytes(b"torn")
    for images, reference in ((single, many), (many, single)):
        with pytest.raises(DataError, match=r"picture .*single/000\.png: not a readable picture of 4 bytes"):
            evaluate(ask(images, reference, "fid"))


def test_a_reference_of_another_size_is_refused_or_brought_to_it(quick, many, tmp_path):
    larger = write_pictures(tmp_path / "larger", 5, 4, size=(12, 10))
    with pytest.raises(DataError, match="the reference's pictures are 12x10, those to be scored 8x8"):
        evaluate(ask(many, larger, "fid"))
    fids = {}
    for transform in ("center", "squeeze"):
        found = evaluate(ask(many, larger, "fid", reference_transform=transform))
        assert found.reference.size == (8, 8) and to_result(found)["reference"]["transform"] == transform
        fids[transform] = found.metrics["fid"]["value"]
        with pytest.raises(ConfigError, match=f"--reference-transform {transform} makes squares, but .* are 12x10"):
            evaluate(ask(larger, many, "fid", reference_transform=transform))
    assert fids["center"] != pytest.approx(fids["squeeze"], rel=1e-3)
    assert to_result(evaluate(ask(many, many, "fid")))["reference"]["transform"] is None


def test_intervals_lie_around_the_values(quick, many, others):
    found = evaluate(ask(many, others, "fid", "is", "kid", "prc", bootstrap=20)).metrics
    for name in ("fid", "is", "kid", "precision"):
        low, high = found[name]["interval"]
        assert low < found[name]["value"] < high and low + high == pytest.approx(2 * found[name]["value"]), name
    assert found["recall"]["interval"] is None
    assert evaluate(ask(many, others, "fid", bootstrap=20)).metrics["fid"] == found["fid"], "the seed decides"
    assert evaluate(ask(many, others, "fid")).metrics["fid"]["interval"] is None


def test_small_counts_are_warned_of(quick, many, others):
    warnings = evaluate(ask(many, others, "fid", "kid", settings=ScoreSettings())).warnings
    assert "fid: 40 pictures are too few, use 10000 or more." in warnings
    assert "fid: 30 reference pictures are too few, use 10000 or more." in warnings
    assert "kid: subsets of 30 pictures, not 1000: there are no more." in warnings


def test_each_metric_takes_its_own_network(quick, many, others):
    found = evaluate(ask(many, others, "fd-dinov2", "prc", "kid", prc_network="vgg16"))
    told = {name: (score["network"], score["layer"]) for name, score in found.metrics.items()}
    assert told == {
        "fd-dinov2": ("dinov2", "cls"),
        "precision": ("vgg16", "fc2_relu"),
        "recall": ("vgg16", "fc2_relu"),
        "kid": ("inception", "2048"),
    }
    assert set(found.networks) == {"dinov2", "vgg16", "inception"}


def test_the_inception_score_needs_no_reference(quick, many):
    found = evaluate(ask(many, None, "is"))
    assert found.reference is None and found.metrics["is"]["layer"] == "logits"
    result = to_result(found)
    assert result["reference"] is None and result["reference_sha256"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("fid", "lpips")}, "--metrics lpips: no such metric. Known: fid, is, kid, prc, clip, fd-dinov2."),
        ({"metrics": ()}, "--metrics is empty. Name some of fid, is"),
        ({"reference": None}, "no REFERENCE, which fid need. Give one after IMAGES"),
        ({"prc_network": "clip"}, "--prc-network clip: use one of inception, vgg16."),
        ({"reference_transform": "t2i"}, "--reference-transform t2i: use one of none, center, squeeze."),
        ({"batch_size": 0}, "--batch-size 0: use 1 or more."),
        ({"bootstrap": 1}, "--bootstrap 1: use 0 for no interval"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(replace(ask(tmp_path, tmp_path, "fid"), **changes))


def test_an_empty_folder_and_a_single_picture_are_refused(quick, many, tmp_path):
    (tmp_path / "empty").mkdir()
    for images, reference in ((tmp_path / "empty", many), (many, tmp_path / "empty")):
        with pytest.raises(DataError, match="no pictures in .*empty: nothing in it or below it ends in"):
            evaluate(ask(images, reference, "fid"))
    single = write_pictures(tmp_path / "single", 1, 0, size=(8, 8))
    with pytest.raises(DataError, match="fid of 1 picture: give at least 2"):
        evaluate(ask(single, many, "fid"))
    with pytest.raises(DataError, match="the reference .*single has 1 picture: give at least 2"):
        evaluate(ask(many, single, "fid"))


def write_set(folder: Path, prompts: list[str | None], ranker: dict[str, str] | None = None) -> Path:
    """A picture set of 8x8 pictures, one tar."""
    folder.mkdir()
    members = {}
    for index, prompt in enumerate(prompts):
        members[f"{index:08d}.png"] = picture(index, 8, 8)
        members[f"{index:08d}.json"] = json.dumps({"index": index, "prompt": prompt}).encode()
    write_tar(folder / "000000.tar", members)
    PictureSettings(
        count=len(prompts),
        pictures_per_tar=512,
        condition="text",
        seed=7,
        sampling={"top_k": 1024, "top_p": 0.95, "temperature": 1.0},
        batch_size=2,
        dtype="fp32",
        threads=1,
        model={"fingerprint": "f" * 64, "name": "tiny", "weights": "ema", "step": 10},
        items="0" * 64,
        keep_fraction=0.5,
        ranker=ranker,
        resolution=8,
    ).save(folder, True)
    return folder


class Words:
    """A stand-in for CLIP: the cosine is the length of the prompt in hundredths."""

    notes: tuple[str, ...] = ()
    resize = "to 1"

    class weights:  # noqa: N801
        sha256 = "c" * 64

    def view(self, image: Image.Image) -> torch.Tensor:
        return torch.zeros(1)

    def cosines(self, views: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([len(prompt) / 100 for prompt in prompts])


@pytest.fixture
def words(quick, monkeypatch):
    """Let CLIP be a stand-in."""
    monkeypatch.setattr(module, "Clip", lambda weights, device: Words())


def test_a_drawn_set_tells_of_its_model_in_the_result(words, tmp_path):
    drawn = write_set(tmp_path / "set", [f"{'x' * number}" for number in range(1, 21)])
    found = evaluate(ask(drawn, None, "clip", bootstrap=10))
    write_result(tmp_path / "out.json", to_result(found))
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["metrics"]["clip"]["value"] == pytest.approx(0.105) and result["metrics"]["clip"]["resize"] == "to 1"
    assert (result["seed"], result["ema"], result["step"], result["model_fingerprint"]) == (7, True, 10, "f" * 64)
    assert result["images"]["keep_fraction"] == 0.5 and result["images"]["sampling"]["top_k"] == 1024
    assert result["images"]["sampling"]["guidance"] == 1  # which sets of before there was guidance do not tell
    assert result["clip_scores"]["best"][0] == [19, pytest.approx(0.2)] and len(result["clip_scores"]["worst"]) == 16
    assert result["weights_sha256"] == {"clip": "c" * 64} and result["machine"]["cores"] >= 1
    assert "ffffffffffff, EMA, seed 7" in to_table(result) and "95% interval" in to_table(result)


@pytest.mark.parametrize(("sha256", "warned"), [("c" * 64, True), ("d" * 64, False)])
def test_the_ranker_of_a_set_is_told_and_a_clip_score_by_the_ranker_warned_of(words, tmp_path, sha256, warned):
    ranker = {"network": "clip", "sha256": sha256}
    result = to_result(evaluate(ask(write_set(tmp_path / "set", ["a", "b"], ranker), None, "clip")))
    assert (result["images"]["ranker"], result["images"]["dtype"]) == (ranker, "fp32")
    assert any("it measures the ranker" in warning for warning in result["warnings"]) == warned


def test_pictures_without_prompts_are_told_of_before_weights_are_asked_for(many):
    with pytest.raises(DataError, match="no prompt beside picture .*000.png, which the CLIP score needs"):
        evaluate(ask(many, None, "clip", weights={"clip": Path("nowhere.safetensors")}))


def test_a_file_for_a_network_that_nothing_uses_is_told_of(many):
    with pytest.raises(
        ConfigError, match="gives x.pth for inception, which --metrics clip does not use. Give clip=FIL"
    ):
        ask(many, None, "clip", weights={"inception": Path("x.pth")}).check()
    ask(many, None, "clip", weights={"inception": Path("x.pth"), "clip": Path("y.pth")}).check()


def test_pictures_without_prompts_have_no_clip_score(words, many, tmp_path):
    with pytest.raises(DataError, match="no prompt beside picture .*000.png, which the CLIP score needs"):
        evaluate(ask(many, None, "clip"))
    with pytest.raises(DataError, match="no prompt beside picture .*00000001, which"):
        evaluate(ask(write_set(tmp_path / "set", ["a cat", None]), None, "clip"))


def test_jpeg_pictures_are_told(quick, others, tmp_path):
    (tmp_path / "jpeg").mkdir()
    for number in range(4):
        (tmp_path / "jpeg" / f"{number}.jpg").write_bytes(picture(number, 8, 8, "JPEG"))
    assert any("JPEG or WebP" in warning for warning in evaluate(ask(tmp_path / "jpeg", others, "fid")).warnings)


def test_tars_are_scored_like_the_folder_of_their_pictures(quick, many, others, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted(many.iterdir()):
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            tar.addfile(info, io.BytesIO(path.read_bytes()))
    one, two = evaluate(ask(many, others, "fid")), evaluate(ask(tmp_path / "0.tar", others, "fid"))
    assert one.metrics == two.metrics and one.features.sha256 == two.features.sha256


def command(script: str) -> Any:
    """What a script of evaluation/ runs."""
    return runpy.run_path(str(Path(__file__).parents[3] / "evaluation" / script))["main"]


def test_commands_make_statistics_and_score_against_them(quick, many, others, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megarq.scoring.weights.find_weights", lambda name, given: None)
    monkeypatch.setattr(
        "megarq.scoring.networks.build_network", lambda name, p, layers, *_: stand_in(name, tuple(layers))
    )
    made, out = tmp_path / "others.npz", tmp_path / "out.json"
    common = ["--protocol", "clean", "--device", "cpu"]
    command("reference_stats.py")([str(others), *common, "--resolution", "8", "--output", str(made), "--features"])
    assert f"{made}: inception of 30 pictures of 8x8 under clean, pictures' sha256" in capsys.readouterr().out
    options = ["--metrics", "fid,is,kid,prc", "--json", str(out), "--bootstrap", "5", "--kid-subset-size", "20"]
    command("score.py")([str(many), str(made), *common, *options, "--is-splits", "2", "--seed", "3"])
    result = json.loads(out.read_text())
    assert set(result["metrics"]) == {"fid", "is", "kid", "precision", "recall"}
    assert (result["scored_seed"], result["bootstrap"], result["protocol"]["name"]) == (3, 5, "clean")
    printed = capsys.readouterr().out
    assert "precision" in printed and "warning: fid: 40 pictures are too few" in printed


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("reference_stats.py", ["--output", "x.pt"], "--output x.pt: name a file that ends in .npz."),
        ("reference_stats.py", ["--output", "x.npz", "--resolution", "0"], "--resolution 0: use 1 or more."),
        ("reference_stats.py", ["--output", "x.npz", "--networks", "clip"], "--networks clip: use some of inception"),
        ("score.py", ["--metrics", "fid"], "no REFERENCE, which fid need"),
    ],
)
def test_commands_refuse_what_they_cannot_do(script, arguments, message, many):
    with pytest.raises(ConfigError, match=message):
        command(script)([str(many), "--protocol", "clean", "--device", "cpu", *arguments])


COMMANDS = {
    "score.py": ["{many}", "--protocol", "clean", "--metrics", "is", "--is-splits", "2", "--device", "cpu", "--json"],
    "reference_stats.py": ["{many}", "--protocol", "clean", "--resolution", "8", "--device", "cpu", "--output"],
    "report.py": ["{result}", "--samples", "0", "--output"],
}


def unused(*_: Any, **__: Any) -> None:
    raise AssertionError("the work began")


@pytest.mark.parametrize("script", list(COMMANDS))
def test_commands_write_into_new_folders_and_say_at_once_where_they_cannot(
    quick, many, tmp_path, monkeypatch, capsys, script
):
    monkeypatch.setattr("megarq.scoring.weights.find_weights", lambda name, given: None)
    monkeypatch.setattr(
        "megarq.scoring.networks.build_network", lambda name, p, layers, *_: stand_in(name, tuple(layers))
    )
    write_result(tmp_path / "one.json", to_result(evaluate(ask(many, None, "is"))))
    options = [option.format(many=many, result=tmp_path / "one.json") for option in COMMANDS[script]]
    made = tmp_path / "new" / "deep" / "out.npz"
    command(script)([*options, str(made)])
    assert made.stat().st_size > 0
    for work in ("evaluate.evaluate", "evaluate.make_reference", "report.make_report"):
        monkeypatch.setattr(f"megarq.scoring.{work}", unused)
    blocked = tmp_path / "one.json" / "out.npz"
    assert cli.run(lambda: command(script)([*options, str(blocked)])) == 2
    assert f"error: {tmp_path / 'one.json'}: " in capsys.readouterr().err


@pytest.mark.parametrize("transform", ["center", "squeeze"])
def test_statistics_of_pictures_brought_to_a_size_are_those_of_the_pictures(
    quick, many, tmp_path, monkeypatch, transform
):
    monkeypatch.setattr("megarq.scoring.weights.find_weights", lambda name, given: None)
    monkeypatch.setattr(
        "megarq.scoring.networks.build_network", lambda name, p, layers, *_: stand_in(name, tuple(layers))
    )
    larger, made = write_pictures(tmp_path / "larger", 5, 4, size=(12, 10)), tmp_path / "made.npz"
    options = ["--protocol", "rq-paper", "--resolution", "8", "--device", "cpu", "--transform", transform]
    command("reference_stats.py")([str(larger), *options, "--output", str(made)])
    one = evaluate(ask(many, larger, "fid", reference_transform=transform))
    two = evaluate(ask(many, made, "fid"))
    assert one.metrics["fid"]["value"] == two.metrics["fid"]["value"]
    assert to_result(two)["reference"]["transform"] == transform


@pytest.mark.parametrize(("resolution", "warned"), [(8, False), (16, True)])
def test_enlarging_a_reference_is_warned_of(many, tmp_path, monkeypatch, caplog, resolution, warned):
    monkeypatch.setattr("megarq.scoring.weights.find_weights", lambda name, given: None)
    monkeypatch.setattr(
        "megarq.scoring.networks.build_network", lambda name, p, layers, *_: stand_in(name, tuple(layers))
    )
    options = ["--protocol", "clean", "--device", "cpu", "--resolution", str(resolution)]
    command("reference_stats.py")([str(many), *options, "--output", str(tmp_path / "made.npz")])
    assert ("pictures of 8x8 are enlarged to 16x16" in caplog.text) == warned


def test_statistics_are_made_under_a_protocol_of_ones_own(many, tmp_path):
    """The demo's, whose network the file brings; its weights are untrained here."""
    path = Path(__file__).parents[3] / "tools" / "demo" / "digit_protocol.py"
    torch.manual_seed(0)
    save_file(runpy.run_path(str(path))["DigitNetwork"]().state_dict(), tmp_path / "digits.safetensors")
    common = ["--protocol", str(path), "--feature-weights", f"digits={tmp_path / 'digits.safetensors'}"]
    common += ["--device", "cpu"]
    made, out = tmp_path / "made.npz", tmp_path / "out.json"
    command("reference_stats.py")([str(many), *common, "--transform", "none", "--output", str(made)])
    command("score.py")([str(many), str(made), *common, "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert result["metrics"]["fid"]["network"] == "digits" and result["protocol"]["name"] == "digits"
