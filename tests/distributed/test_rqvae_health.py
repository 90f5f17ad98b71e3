"""Stage 1 on one, two and four ranks: counted codes, the k-means start, pictures, and alarms of a run that goes on."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tiny_runs import CPU, metrics_of
from tiny_stage1_runs import BATCH, SIDE, tiny_stage1

from megarq.config.run import CodebookConfig, HealthConfig, RQVAERunConfig
from megarq.data.image_sources import open_images
from megarq.data.images import ImageLoader
from megarq.engine.codebook_start import start_codebook
from megarq.engine.finetuning import InitFrom, config_of_source
from megarq.engine.rqvae_run import train_rqvae
from megarq.engine.session import Session
from megarq.engine.start import resolve_and_place
from megarq.rqvae.health import CodeCounts
from megarq.rqvae.model import RQVAE

REFERENCE = Path(__file__).parents[1] / "reference" / "rqvae"
STEPS, EVERY, CODES, SHOWN = 4, 2, 32, 6
KMEANS = CodebookConfig(init="kmeans", init_batches=3, init_latents=300, init_iterations=4)
USES = [f"{name}{depth}" for name in ("usage", "perplexity", "dead") for depth in ("", "_1", "_2", "_3")]


def config_of(steps: int = STEPS, codebook: CodebookConfig | None = None, **model: Any) -> RQVAERunConfig:
    """A run without a discriminator, whose codes are looked at every second step."""
    config = tiny_stage1(steps, loss={"adversarial_weight": 0.0})
    config.model.codebook_size = CODES
    for name, value in model.items():
        setattr(config.model, name, value)
    config.codebook = codebook or CodebookConfig()
    config.health = HealthConfig(every=EVERY, smoothing=1)
    config.data.workers, config.data.transform = 0, "none"
    config.log.sample_every, config.log.sample_count = STEPS, SHOWN
    return config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty pictures, each of a colour and some noise."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        random = np.random.default_rng(number)
        pixels = random.integers(40, 216, 3) + random.integers(-40, 40, (SIDE, SIDE, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")
    return folder


def session_of(run: Path, config: RQVAERunConfig) -> Session:
    ds = {"zero_optimization": {"stage": 1}}
    resolved, topology = resolve_and_place(config, ds, dist.get_world_size(), dist.get_rank())
    return Session.open(config, resolved, topology, run, CPU)


def train(run: Path, data: Path, config: RQVAERunConfig, init: InitFrom | None = None, held_out: bool = True) -> str:
    """Train on the pictures, which by default are held out too, in as many FLOPs as steps; what rank 0 said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train_rqvae(session_of(run, config), [str(data)], [str(data)] * held_out, float, init_from=init)
    return said.getvalue()


def started(run: Path, data: Path, config: RQVAERunConfig) -> tuple[dict[str, torch.Tensor], bool]:
    """The codebooks after their start, and whether the loader's first batch is still its first."""
    session = session_of(run, config)
    topology = session.groups.topology
    torch.manual_seed(config.train.seed)
    model = RQVAE(config.model, session.groups.data, config.train.seed)
    loader = ImageLoader(
        open_images([str(data)]), "none", SIDE, BATCH, rank=topology.data_rank, world_size=topology.dp, seed=1
    )
    first = next(iter(loader)).images
    start_codebook(session, model, loader, new=True)
    unmoved = torch.equal(next(iter(loader)).images, first) and model.training
    return {name: buffer.clone() for name, buffer in model.quantizer.named_buffers()}, unmoved


LAYOUTS = {"shared": {}, "per depth": {"shared_codebook": False}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_kmeans_of_ranks_is_that_of_one(rank_group, tmp_path, pictures, ranks, layout):
    config = config_of(codebook=KMEANS, **LAYOUTS[layout])
    alone, _ = rank_group(1).run(started, tmp_path / "alone", pictures, config)[0]
    found = rank_group(ranks).run(started, tmp_path / "together", pictures, config)
    for name, tensor in found[0][0].items():
        assert all(torch.equal(tensor, buffers[name]) for buffers, _ in found[1:]), name
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_kmeans_is_not_the_random_start(rank_group, tmp_path, pictures):
    random, _ = rank_group(1).run(started, tmp_path / "random", pictures, config_of())[0]
    kmeans, _ = rank_group(1).run(started, tmp_path / "kmeans", pictures, config_of(codebook=KMEANS))[0]
    assert not torch.equal(random["codebooks.0.weight"], kmeans["codebooks.0.weight"])
    assert (random["codebooks.0.cluster_size_ema"] == 0).all() and (kmeans["codebooks.0.cluster_size_ema"] >= 2).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_kmeans_leaves_the_loader_at_its_first_batch(rank_group, run, pictures, ranks):
    assert all(unmoved for _, unmoved in rank_group(ranks).run(started, run, pictures, config_of(codebook=KMEANS)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_skipped_pictures_are_counted_over_all_ranks(rank_group, run, pictures, tmp_path, ranks):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    for number in range(2 * BATCH - 1, 20):  # an epoch is two batches
        (folder / f"{number}.png").unlink()
    (folder / "broken.png").write_bytes(b"no picture")
    said = rank_group(ranks).run(train, run, folder, config_of(), None, False)[0]
    assert sum(line["skipped_pictures"] for line in metrics_of(run)) == STEPS // 2
    told = [line.partition(": ")[2] for line in said.splitlines() if "pictures skipped" in line]
    assert told == [f"pictures skipped: 1, {total} since the start" for total in (1, 2)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_use_of_codes_is_counted_over_all_ranks(rank_group, tmp_path, pictures, ranks):
    config = config_of(codebook=KMEANS)
    rank_group(1).run(train, tmp_path / "alone", pictures, config)
    said = rank_group(ranks).run(train, tmp_path / "together", pictures, config)[0]
    alone, together = metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "together")
    assert ["usage_1" in line for line in together] == [False, True] * (STEPS // EVERY)
    for mine, theirs in zip(together, alone, strict=True):
        if "usage_1" in theirs:
            # Ranks round sums otherwise than one alone, which moves a latent between two codes that are equally near.
            for name in USES:
                one_code = 1.5 / CODES if name.startswith("usage") else 1.5
                assert mine[name] == pytest.approx(theirs[name], abs=one_code), name
            assert theirs["usage"] >= theirs["usage_1"] > 0.1
    assert f"step {EVERY}: codes over {EVERY} steps, by depth: used " in said
    assert "codebook: k-means of 300 latents of the first 3 batches\n" in said


def train_and_count(run: Path, data: Path, config: RQVAERunConfig) -> list[list[int]]:
    """The codes of each depth that were counted, of each window of a training."""
    windows: list[list[int]] = []
    take = CodeCounts.take

    def remembered(self: CodeCounts, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
        counts = take(self, group)
        windows.append([int(depth.sum()) for depth in counts])
        return counts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodeCounts, "take", remembered)
        train(run, data, config)
    return windows


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_codes_of_all_micro_batches_and_ranks_are_counted(rank_group, tmp_path, pictures, ranks):
    config = config_of()
    config.train.micro_batch_size = 2
    height, width, depth = config.model.code_shape
    expected = [[EVERY * config.train.global_batch_size * height * width] * depth] * (STEPS // EVERY)
    for windows in rank_group(ranks).run(train_and_count, tmp_path / "run", pictures, config):
        assert windows == expected


@pytest.mark.parametrize(("micro_batch", "weight", "told"), [(2, 0.75, True), (None, 0.75, False), (2, 0.0, False)])
def test_what_micro_batches_change_for_a_discriminator_is_told(rank_group, run, pictures, micro_batch, weight, told):
    config = config_of(1)
    config.train.micro_batch_size, config.loss.adversarial_weight = micro_batch, weight
    said = rank_group(2).run(train, run, pictures, config)[0]
    assert ("BatchNorm are those of each of 2 micro-batches, of 4 pictures on all ranks" in said) == told


def test_the_mfu_has_the_flops_of_its_step(rank_group, run, pictures):
    config = config_of()
    config.log.peak_tflops = 1e-12
    rank_group(2).run(train, run, pictures, config)
    steps = [line for line in metrics_of(run) if "loss" in line]
    assert [line["mfu"] for line in steps] == [
        pytest.approx(line["step"] * line["images_per_second"] / 2) for line in steps
    ]


@pytest.fixture
def grid(tmp_path, rank_group, pictures):
    """The grid of a run on so many ranks."""

    def train_and_show(ranks: int) -> np.ndarray:
        run = tmp_path / f"{ranks}"
        rank_group(ranks).run(train, run, pictures, config_of())
        assert [path.name for path in (run / "pictures").iterdir()] == [f"step-{STEPS:08d}.png"]
        with Image.open(run / "pictures" / f"step-{STEPS:08d}.png") as image:
            return np.asarray(image).astype(int)

    return train_and_show


def test_the_pictures_of_two_ranks_are_those_of_one(grid):
    assert np.abs(grid(1) - grid(2)).max() <= 2


def test_the_pictures_are_originals_reconstructions_and_those_of_fewer_depths(grid, pictures):
    shown = grid(1)
    rows = 1 + 3  # the first depths of three are one and two
    assert shown.shape[0] == rows * (SIDE + 2) + 2
    first = next(iter(ImageLoader(open_images([str(pictures)]), "center", SIDE, BATCH, seed=3))).images[:SHOWN]
    expected = first.add(1).mul(127.5).round()
    left = shown.shape[1] - SHOWN * (SIDE + 2)
    row = [shown[2:][:SIDE, left + place * (SIDE + 2) :][:, :SIDE] for place in range(SHOWN)]
    assert np.array_equal(np.stack(row), expected.permute(0, 2, 3, 1).int().numpy())
    assert len({shown[2 + index * (SIDE + 2) :][:SIDE, left:].tobytes() for index in range(rows)}) == rows


def test_without_held_out_pictures_those_of_training_are_shown(rank_group, run, pictures):
    rank_group(1).run(train, run, pictures, config_of(), None, False)
    with Image.open(run / "pictures" / f"step-{STEPS:08d}.png") as image:
        assert image.height == (1 + 3) * (SIDE + 2) + 2 and len(np.unique(np.asarray(image))) > 50


def test_a_run_that_goes_on_is_judged_by_its_metrics_of_before(rank_group, run, pictures):
    rank_group(2).run(train, run, pictures, config_of())
    lines = metrics_of(run)
    lines[0]["reconstruction_loss"] = 1e-6
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(STEPS + 2)
    config.log.sample_every = 0
    said = rank_group(2).run(train, run, pictures, config)[0]
    assert "WARNING" not in said  # it was told before: by the metrics, the second step rang

    lines[0]["reconstruction_loss"], lines[-1]["reconstruction_loss"] = 1e-6, 1e-6
    other = run.with_name("other")
    rank_group(2).run(train, other, pictures, config_of())
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = rank_group(2).run(train, other, pictures, config)[0]
    assert said.count("WARNING: reconstruction_loss is") == 1 and "it was 1e-06 at best" in said
    assert "it was 1e-06 at best" in metrics_of(other)[STEPS]["warning"]


def test_the_codebook_of_first_weights_is_kept(rank_group, run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        Image.fromarray(np.full((32, 32, 3), 50 * number, dtype=np.uint8)).save(data / f"{number}.png")
    overrides = (
        *(
            "train.steps=1",
            "train.global_batch_size=4",
            "train.precision=fp32",
            "data.workers=0",
            "data.transform=none",
        ),
        *("loss.perceptual_weight=0", "loss.adversarial_weight=0", "codebook.init=kmeans", "log.sample_every=0"),
    )
    init = InitFrom(str(REFERENCE))
    config = config_of_source(init, str(run), overrides)
    said = rank_group(1).run(train, run, data, config, init)[0]
    assert "codebook.init=kmeans is not used: the codebook comes with the first weights" in said
