"""Reconstructions measured: stand-ins for Inception, a random VGG16, and an RQ-VAE of 16x16 pictures."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_checkpoints import save_alone
from PIL import Image
from random_vgg import write_vgg
from scored_pictures import stand_in, write_pictures
from scripts import load_script

from megarq.checkpoint.format import Fragment
from megarq.config.models import RQVAEConfig
from megarq.errors import CheckpointError, ConfigError, DataError
from megarq.inference.pretrained import save_rqvae
from megarq.launch.environment import LaunchEnvironment
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.rqvae.perceptual import LPIPS
from megarq.scoring import evaluate as scoring
from megarq.scoring import reconstruction as module
from megarq.scoring.distortion import psnr, squared_error, ssim
from megarq.scoring.evaluate import Request, evaluate
from megarq.scoring.protocols import PROTOCOLS
from megarq.scoring.reconstruction import METRICS, Networks, Reconstructed, ReconstructionRequest, Share
from megarq.scoring.reconstruction_result import draw_sheet, to_result, to_table
from megarq.scoring.report import ReportRequest, make_report
from megarq.scoring.result import to_result as to_picture_result
from megarq.scoring.result import write_result

COMMAND = "evaluation/reconstruction.py"
CPU = torch.device("cpu")
ALONE = LaunchEnvironment(0, 1, 0, "127.0.0.1", 0, "none")
SIDE, DEPTH, COUNT = 16, 3, 11


def make_rqvae(side: int = SIDE) -> RQVAE:
    torch.manual_seed(0)
    config = RQVAEConfig(
        resolution=side,
        channels=32,
        channel_multipliers=[1, 1],
        res_blocks=1,
        attention_resolutions=[],
        latent_channels=8,
        codebook_dim=8,
        codebook_size=32,
        depth=DEPTH,
    )
    return RQVAE(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rqvae() -> RQVAE:
    return make_rqvae()


@pytest.fixture(scope="module")
def model(rqvae: RQVAE, files: Path) -> Path:
    save_rqvae(rqvae, files / "rqvae16")
    return files / "rqvae16"


@pytest.fixture(scope="module")
def data(files: Path) -> Path:
    return write_pictures(files / "eleven", COUNT, 5, size=(SIDE, SIDE))


@pytest.fixture(scope="module")
def vgg(files: Path) -> Path:
    return write_vgg(files)


@pytest.fixture
def ask(quick: Callable[..., None], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A request, whose feature network is a stand-in."""
    monkeypatch.setattr(module, "find_weights", lambda name, given: None)
    monkeypatch.setattr(module, "build_network", lambda name, p, layers, *_: stand_in(name, tuple(layers)))

    def make(*metrics: str, **changes: Any) -> ReconstructionRequest:
        asked = ReconstructionRequest(model, (str(data),), PROTOCOLS["rq-paper"], metrics, CPU, batch_size=4)
        return replace(asked, **changes)

    return make


def measure(request: ReconstructionRequest) -> Reconstructed:
    made = module.reconstruct(request, ALONE)
    assert made is not None
    return made


def read(folder: Path) -> torch.Tensor:
    """uint8 [N, 3, R, R] of a folder."""
    pictures = [np.array(Image.open(path)) for path in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def give_back(rqvae: RQVAE, pixels: torch.Tensor, depth: int = DEPTH) -> torch.Tensor:
    """uint8 [N, 3, R, R] of the first depths, computed plainly in the batches of the request."""
    batches = [rqvae.quantize(rqvae.encode(part / 127.5 - 1)) for part in pixels.float().split(4)]
    images = torch.cat([rqvae.decode(codes, depth) for codes in batches])
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def test_values_of_each_picture_are_those_of_its_reconstruction(ask, rqvae, data, vgg):
    x = read(data)
    y = give_back(rqvae, x)
    metrics = to_result(measure(ask("psnr", "ssim", "lpips", perceptual_weights=vgg)))["metrics"]
    values = {"psnr": psnr(squared_error(x, y), SIDE), "ssim": ssim(x, y)}
    for name, expected in values.items():
        assert metrics[name] == {
            "value": pytest.approx(float(expected.mean())),
            "std": pytest.approx(float(expected.std())),
            "interval": None,
        }
    whole = LPIPS(vgg)(y / 127.5 - 1, x / 127.5 - 1)
    assert metrics["lpips"]["value"] == pytest.approx(float(whole), rel=1e-5) and whole > 0.001
    assert metrics["lpips"]["network"] == "vgg16"


def test_rfid_is_the_fid_that_score_gives_of_the_saved_reconstructions(ask, rqvae, data, tmp_path):
    for index, pixels in enumerate(give_back(rqvae, read(data))):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{index:03d}.png")
    theirs = scoring.evaluate(scoring.Request(str(tmp_path), str(data), PROTOCOLS["rq-paper"], ("fid",), CPU))
    result = to_result(measure(ask("rfid")))
    assert result["metrics"]["rfid"]["value"] == pytest.approx(theirs.metrics["fid"]["value"], abs=1e-9)
    assert result["metrics"]["rfid"]["value"] > 1e-3 and result["metrics"]["rfid"]["layer"] == "2048"
    assert f"rfid: {COUNT} pictures are too few, use 10000 or more." in result["warnings"]


def test_each_depth_is_measured_and_the_last_is_the_reconstruction(ask, rqvae, data):
    x = read(data)
    result = to_result(measure(ask("ssim", depths=True)))
    assert [row["depths"] for row in result["depths"]] == [1, 2, 3]
    for row in result["depths"]:
        y = give_back(rqvae, x, row["depths"])
        assert row["mse"] == pytest.approx(float(squared_error(x, y).mean()))
        assert row["psnr"] == pytest.approx(float(psnr(squared_error(x, y), SIDE).mean()))
        assert row["ssim"] == pytest.approx(float(ssim(x, y).mean()))
    assert result["depths"][-1]["ssim"] == result["metrics"]["ssim"]["value"]
    assert len({row["mse"] for row in result["depths"]}) == DEPTH
    assert to_result(measure(ask("ssim")))["depths"] is None


def test_the_codebooks_use_is_that_of_the_codes(ask, rqvae, data):
    codes = torch.cat([rqvae.quantize(rqvae.encode(part / 127.5 - 1)) for part in read(data).float().split(4)])
    codebook = to_result(measure(ask("psnr")))["codebook"]
    assert (codebook["codes"], codebook["sizes"], codebook["shared"]) == (COUNT * 8 * 8, [32] * DEPTH, True)
    for depth in range(DEPTH):
        used = len(codes[..., depth].unique())
        assert (codebook["usage"][depth], codebook["dead"][depth]) == (used / 32, 32 - used)
        shares = np.unique(codes[..., depth], return_counts=True)[1] / (COUNT * 64)
        assert codebook["perplexity"][depth] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert codebook["all"]["dead"] == 32 - len(codes.unique())


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_a_rank_sees_its_pictures_as_one_alone_does(ask, rqvae, ranks):
    request = ask("rfid", "psnr", "ssim", depths=True, shown=3)
    pictures = module.open_pictures(*request.data)
    networks = Networks(stand_in("inception", ("2048",)), None, {}, [])
    whole = module.look(request, pictures, Share(COUNT, 4), rqvae, networks)
    counts = torch.zeros_like(whole.counts)
    seen: list[int] = []
    for rank in range(ranks):
        share = Share(COUNT, 4, rank, ranks)
        places = share.places(rank)
        part = module.look(request, pictures, share, rqvae, networks)
        for name in ("values", "features", "digests"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[places]), name
        mine = [index for index, place in enumerate([0, 3, 7]) if place in places]
        assert torch.equal(part.shown, whole.shown[mine])
        counts += part.counts
        seen += places
    assert sorted(seen) == list(range(COUNT)) and torch.equal(counts, whole.counts)


def test_a_crop_gives_what_cropped_pictures_give(ask, tmp_path):
    larger = write_pictures(tmp_path / "larger", 4, 1, size=(SIDE + 5, SIDE))
    cropped = tmp_path / "cropped"
    cropped.mkdir()
    for path in larger.iterdir():
        Image.open(path).crop((2, 0, 2 + SIDE, SIDE)).save(cropped / path.name)
    one = to_result(measure(ask("rfid", "psnr", data=(str(larger),), transform="center")))
    two = to_result(measure(ask("rfid", "psnr", data=(str(cropped),))))
    assert one["metrics"] == two["metrics"] and one["images"]["sha256"] == two["images"]["sha256"]
    assert one["reference_sha256"] != two["reference_sha256"]
    assert (one["reference"]["transform"], two["reference"]["transform"]) == ("center", None)


def test_fewer_pictures_are_spread_over_the_data(ask, data):
    made = measure(ask("psnr", count=4))
    names = [Path(made.pictures[index].name).name for index in range(4)]
    assert names == ["000.png", "002.png", "005.png", "008.png"] and to_result(made)["count"] == 4


def test_equal_reconstructions_count_with_a_finite_psnr_and_a_note(ask, monkeypatch):
    monkeypatch.setattr(RQVAE, "decode", lambda self, codes, depth=None: torch.zeros(len(codes), 3, SIDE, SIDE))
    monkeypatch.setattr(module, "_to_pixels", lambda images: torch.full(images.shape, 128, dtype=torch.uint8))
    made = measure(ask("psnr"))
    made.measured.values[3:5] = 0.0
    result = to_result(made)
    assert np.isfinite(result["metrics"]["psnr"]["value"])
    assert any("psnr: 2 reconstructions equal their pictures" in note for note in result["warnings"])


def test_the_sheet_has_originals_reconstructions_and_first_depths(ask, rqvae, data):
    made = measure(ask("psnr", shown=4))
    chosen = [0, 2, 5, 8]
    assert torch.equal(made.measured.shown[:, 0], read(data)[chosen])
    levels = (made.measured.shown[:, -1].int() - give_back(rqvae, read(data))[chosen].int()).abs()
    assert levels.max() <= 1 and levels.float().mean() < 1e-3  # a rounding apart
    pixels = np.asarray(draw_sheet(made.measured))
    rows = made.measured.shown[:, [0, DEPTH, 1, 2]].permute(1, 0, 3, 4, 2).numpy()
    for row in range(4):
        for column in range(4):
            top, left = 4 + 14 + row * (SIDE + 18), 4 + column * (SIDE + 4)
            assert np.array_equal(pixels[top : top + SIDE, left : left + SIDE], rows[row, column])


def test_the_result_tells_what_it_depends_on(ask, model, rqvae, data, vgg):
    result = json.loads(json.dumps(to_result(measure(ask(*METRICS, perceptual_weights=vgg, depths=True)))))
    assert (result["format"], result["version"], list(result["metrics"])) == ("megarq-scores", 1, list(METRICS))
    assert result["model_fingerprint"] == fingerprint(rqvae) and result["count"] == COUNT
    assert result["weights_sha256"]["inception"] == "0" * 64 and len(result["weights_sha256"]["vgg16"]) == 64
    assert result["reference"]["path"] == str(data) and result["images"]["kind"] == "reconstructions"
    assert any("lpips: the weights of vgg16 have sha256" in note for note in result["warnings"])
    table = to_table(result)
    for line in ("rfid  ", "codes, depth 3", "codes, all depths", "first 2", "warning: rfid:", "protocol  "):
        assert line in table, line


def test_a_report_shows_the_numbers_of_reconstructions_beside_the_scores_of_pictures(ask, tmp_path, data):
    write_result(tmp_path / "rqvae.json", to_result(measure(ask("rfid", "psnr", "ssim"))))
    asked = Request(str(data), str(data), PROTOCOLS["rq-paper"], ("fid",), CPU)
    write_result(tmp_path / "pictures.json", to_picture_result(evaluate(asked)))
    page = make_report(ReportRequest([str(tmp_path / name) for name in ("rqvae.json", "pictures.json")], samples=3))
    for name, better in (("rFID", "lower"), ("PSNR, dB", "higher"), ("SSIM", "higher"), ("FID", "lower")):
        assert f"{name}<small>{better} is better" in page
    assert page.count("<img") == 2 * 3  # the scored pictures and their references: reconstructions are not kept
    alone = make_report(ReportRequest([str(tmp_path / "rqvae.json")]))
    assert "rFID" in alone and "<img" not in alone


def test_a_runs_checkpoint_tells_its_step_and_weights(ask, rqvae, tmp_path):
    trained = dict(rqvae.named_parameters())
    tensors: dict[str, tuple[Fragment, torch.Tensor]] = {}
    for name, tensor in rqvae.state_dict().items():
        fragment = Fragment(tuple(tensor.shape))
        kinds = {"param": tensor * 1.1, "ema": tensor} if name in trained else {"buffer": tensor}
        tensors |= {f"{kind}/{name}": (fragment, values.flatten().clone()) for kind, values in kinds.items()}
    metadata = {"architecture": "rq-vae", "config": {"model": asdict(rqvae.config)}}
    save_alone(tmp_path, 7, tensors, metadata | {"step": 7})
    averaged = to_result(measure(ask("psnr", model=tmp_path)))
    assert (averaged["step"], averaged["ema"]) == (7, True) and averaged["model_fingerprint"] == fingerprint(rqvae)
    assert averaged["metrics"] == to_result(measure(ask("psnr")))["metrics"]
    last = to_result(measure(ask("psnr", model=tmp_path, step=7, model_weights="param")))
    assert (last["step"], last["ema"]) == (7, False) and last["metrics"] != averaged["metrics"]
    assert ", EMA, step 7" in to_table(averaged) and ", no EMA, step 7" in to_table(last)
    with pytest.raises(CheckpointError, match="step-00000008 does not exist: the run keeps step-00000007"):
        measure(ask("psnr", model=tmp_path, step=8))


def test_few_codes_are_warned_of(ask):
    assert any("64 codes at each depth are few for a codebook of 32" in note for note in few(ask, 1))
    assert not any(note.startswith("codebook") for note in few(ask, 5))


def few(ask: Callable[..., Any], count: int) -> list[str]:
    return to_result(measure(ask("psnr", count=count)))["warnings"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("fid",)}, "--metrics fid: no such metric. Known: rfid, psnr, ssim, lpips."),
        ({"metrics": ()}, "--metrics is empty. Name some of rfid"),
        ({"transform": "ffhq"}, "--transform ffhq: use one of none, center."),
        ({"batch_size": 0}, "--batch-size 0: use 1 or more."),
        ({"count": 0}, "--count 0: use 1 or more."),
        ({"count": 12}, "--count 12 of the 11 pictures of .*eleven. Give at most 11."),
        ({"step": 3}, "--step and --weights choose among a run's checkpoints, and .*rqvae16 is an exported model"),
    ],
)
def test_what_cannot_be_asked_is_refused(ask, changes, message):
    with pytest.raises(ConfigError, match=message):
        measure(ask("psnr", **changes)) if "metrics" not in changes else measure(replace(ask(), **changes))


def test_an_lmdb_and_several_sources_give_what_one_folder_gives(ask, data, make_lmdb, tmp_path):
    paths = sorted(data.iterdir())
    database = make_lmdb("val_lmdb", {path.name.encode(): path.read_bytes() for path in paths})
    parts = [tmp_path / name for name in ("first", "second")]
    for path in paths:
        part = parts[path.name > paths[3].name]
        part.mkdir(exist_ok=True)
        shutil.copy(path, part)
    whole, *others = (
        to_result(measure(ask("rfid", "psnr", data=tuple(map(str, given))))) for given in ([data], [database], parts)
    )
    for other in others:
        assert other["metrics"] == whole["metrics"] and other["reference_sha256"] == whole["reference_sha256"]
        assert other["count"] == COUNT
    assert others[1]["reference"]["path"] == f"{parts[0]} {parts[1]}"


def test_data_that_cannot_be_measured_are_refused(ask, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in .*empty"):
        measure(ask("psnr", data=(str(tmp_path / "empty"),)))
    with pytest.raises(DataError, match="rfid of 1 picture: give at least 2, and rather 10000."):
        measure(ask("rfid", count=1))
    larger = write_pictures(tmp_path / "larger", 2, 1, size=(20, 18))
    with pytest.raises(
        DataError, match="larger/000.png is 20x18, the RQ-VAE's are 16x16. Use --transform center, or pictures"
    ):
        measure(ask("psnr", data=(str(larger),)))
    mixed = write_pictures(tmp_path / "mixed", 2, 1, size=(SIDE, SIDE))
    (larger / "000.png").rename(mixed / "900.png")
    with pytest.raises(DataError, match="900.png: a picture of 20x18 with transform none at resolution 16"):
        measure(ask("psnr", data=(str(mixed),)))
    (mixed / "900.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="900.png: not a readable picture of 10 bytes"):
        measure(ask("psnr", data=(str(mixed),)))


def test_a_folder_without_an_rqvae_is_refused(ask, tmp_path):
    with pytest.raises(CheckpointError, match="holds no RQ-VAE: give the --output of train_rqvae.py"):
        measure(ask("psnr", model=tmp_path))
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        measure(ask("psnr", model=tmp_path / "nowhere"))


def test_an_rqvae_that_has_diverged_is_refused(ask, rqvae, monkeypatch):
    monkeypatch.setattr(RQVAE, "decode", lambda self, codes, depth=None: torch.full((4, 3, SIDE, SIDE), torch.nan))
    with pytest.raises(CheckpointError, match="makes numbers of picture .*000.png that are not finite: its training"):
        measure(ask("psnr"))


@pytest.mark.parametrize(("metric", "least"), [("ssim", 11), ("lpips", 16)])
def test_pictures_too_small_for_a_metric_are_refused(ask, tmp_path, metric, least):
    save_rqvae(make_rqvae(8), tmp_path)
    with pytest.raises(ConfigError, match=f"--metrics {metric} needs pictures of {least}x{least} or more, .* 8x8"):
        measure(ask(metric, model=tmp_path))


def test_missing_networks_are_named_with_their_published_files(ask, tmp_path, monkeypatch):
    from megarq.scoring.weights import find_weights

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(module, "find_weights", find_weights)
    with pytest.raises(CheckpointError, match="no weights of inception .* weights-inception-2015-12-05-6726825d.pth"):
        measure(ask("rfid"))
    with pytest.raises(ConfigError, match="vgg16-397923af.pth, .* --perceptual-weights FILE, or leave lpips out of"):
        measure(ask("lpips"))
    measure(ask("psnr", "ssim"))


def test_the_command_writes_the_result_and_the_sheet_without_any_network(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    options = ["--metrics", "psnr,ssim", "--count", "3", "--device", "cpu", "--local_rank=0", "--depths"]
    places = ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "more" / "tiny.json")]
    load_script(COMMAND).main(["--model", str(model), "--data", str(data), *options, *places])
    printed = capsys.readouterr().out
    assert "psnr  " in printed and "first 1" in printed and "protocol" not in printed
    assert (tmp_path / "out/scores.json").read_bytes() == (tmp_path / "more/tiny.json").read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scores.json", "reconstructions.png"}
    assert Image.open(tmp_path / "out/reconstructions.png").height == (DEPTH + 1) * (SIDE + 18) + 4


def test_the_command_takes_several_data(model, data, tmp_path):
    more = write_pictures(tmp_path / "more", 2, 9, size=(SIDE, SIDE))
    options = ["--metrics", "psnr", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    load_script(COMMAND).main(["--model", str(model), "--data", str(data), str(more), *options])
    assert json.loads((tmp_path / "out.json").read_text())["count"] == COUNT + 2


@pytest.mark.parametrize("option", ["--output", "--json"])
def test_the_command_says_at_once_where_it_cannot_write(model, data, tmp_path, monkeypatch, option):
    script = load_script(COMMAND)
    monkeypatch.setattr(script, "reconstruct", lambda *_: pytest.fail("the work began"))
    blocked = tmp_path / "scores.json"
    blocked.mkdir()
    place = tmp_path if option == "--output" else blocked
    with pytest.raises(IsADirectoryError, match=r"scores\.json"):
        script.main(["--model", str(model), "--data", str(data), "--metrics", "psnr", option, str(place)])
