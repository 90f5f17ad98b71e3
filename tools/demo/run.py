"""The whole walk on one machine: 1,797 handwritten digits in, digits drawn from captions out. `make demo` runs it.

    python tools/demo/run.py --output runs/demo

Every step is one of the commands that a user types; they are printed as they run. At the end stand a table,
OUTPUT/report.html, OUTPUT/report.json and OUTPUT/samples.png. An interrupted demo goes on where it was; a finished one
starts afresh.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from digits import WORDINGS, caption, enlarged, split
from judge import DigitClassifier, Pictures, compare, grey
from PIL import Image, ImageDraw

from megarq import ImageGenerator, cli
from megarq.config.load import load_config
from megarq.config.run import RQTransformerRunConfig
from megarq.data.code_shards import CodeShards
from megarq.data.pictures import decode_plain, open_pictures
from megarq.errors import MegarqError
from megarq.files import write_atomically
from megarq.launch.machine import describe_machine

ROOT = Path(__file__).resolve().parents[2]
DRAWS, TEMPERATURE = 8, 0.01
PICTURES, PROMPTS = 200, "prompts.json"
SEED = 0


def walk(output: Path, shuffle_captions: bool) -> dict[str, list[str]]:
    """The commands, in order: name of the step and what is typed."""
    at = {name: str(output / name) for name in ("images", "shards", "codes", "rqvae", "rqtransformer", "model")}
    tokenizer = str(output / "tokenizer.json")
    shards = shard_patterns(output)

    def make_shards(part: str) -> list[str]:
        files = ["--images", f"{at['images']}/{part}", "--captions", f"{at['images']}/{part}.csv"]
        return ["tools/make_shards.py", *files, "--output", at["shards"], "--prefix", f"{part}-"]

    python = [sys.executable]
    shuffle = ["--shuffle-captions"] if shuffle_captions else []
    return {
        "images": [*python, "tools/demo/digits.py", "--output", at["images"], *shuffle],
        "shards": [*python, *make_shards("train"), "--samples-per-shard", "400"],
        "validation shards": [*python, *make_shards("validation")],
        "tokenizer": [
            *[*python, "tools/train_text_tokenizer.py", "--data", shards[0]],
            *["--vocab-size", "128", "--output", tokenizer],
        ],
        "rqvae": [
            *[*deepspeed(), "megarq/train_rqvae.py", "--ds_config", "zero1.json", "--model", "rqvae-demo"],
            *["--data", shards[0], "--validation-data", shards[1], "--output", at["rqvae"]],
        ],
        "codes": pretokenize(output, output / "codes", DRAWS, TEMPERATURE),
        "rqtransformer": train(output, output / "codes", output / "rqtransformer"),
        "export": export(output / "rqtransformer", output / "model"),
        **evaluation(output),
    }


def evaluation(output: Path) -> dict[str, list[str]]:
    """The commands that draw a set of pictures, score it, and show both on a page."""
    pictures, network, scores = (str(output / name) for name in ("pictures", "digits.safetensors", "scores.json"))
    config = load_config("demo", [], "rq-transformer")
    assert isinstance(config, RQTransformerRunConfig)
    top_k = config.sampling.top_k or max(config.model.sizes)
    sampling = ["--top-k", str(top_k), "--top-p", str(config.sampling.top_p), "--seed", str(SEED)]
    real = shard_patterns(output)[1]
    python = [sys.executable]
    return {
        "pictures": [
            *[*python, "evaluation/coco.py", "--model", str(output / "model"), "--items", str(output / PROMPTS)],
            *["--count", str(PICTURES), "--output", pictures, *sampling],
        ],
        "digits' network": [*python, "tools/demo/digit_protocol.py", "--output", network],
        "scores": [
            *[*python, "evaluation/score.py", pictures, real, "--protocol", "tools/demo/digit_protocol.py"],
            *["--feature-weights", f"digits={network}", "--metrics", "fid,is,prc", "--json", scores],
        ],
        "report": [
            *[*python, "evaluation/report.py", scores, "--output", str(output / "report.html"), "--reference", real],
            *["--title", "Digits from captions"],
        ],
    }


def shard_patterns(demo: Path) -> list[str]:
    """The image shards of both parts."""
    return [str(demo / "shards" / f"{part}-*.tar") for part in ("train", "validation")]


def deepspeed() -> list[str]:
    """DeepSpeed's launcher on the GPUs of this machine, two at most, or as two CPU processes."""
    ranks = torch.cuda.device_count() if torch.cuda.is_available() else 2
    return [str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_accelerators", str(min(2, ranks))]


def pretokenize(demo: Path, codes: Path, draws: int, temperature: float) -> list[str]:
    """What is typed to encode the demo's pictures."""
    files = ["--rqvae", str(demo / "rqvae"), "--data", *shard_patterns(demo), "--output", str(codes)]
    settings = ["--transform", "none", "--draws", str(draws), "--temperature", str(temperature)]
    return [sys.executable, "tools/pretokenize.py", *files, *settings]


def train(demo: Path, codes: Path, run: Path) -> list[str]:
    """What is typed to train on codes of the demo's pictures."""
    files = ["--data", str(codes), "--tokenizer", str(demo / "tokenizer.json"), "--output", str(run)]
    return [*deepspeed(), "megarq/train.py", "--ds_config", "zero3.json", "--model", "demo", *files]


def export(run: Path, model: Path) -> list[str]:
    """What is typed to export a run."""
    return [sys.executable, "tools/export.py", str(run), "--output", str(model)]


def run_step(number: int, count: int, name: str, command: list[str]) -> float:
    """Run one command, its output on the screen; returns seconds. Raises MegarqError where it fails."""
    shown = [Path(word).name if word.startswith(str(Path(sys.executable).parent)) else word for word in command]
    print(f"\n[{number}/{count}] {name}\n$ {shlex.join(shown)}", flush=True)
    start = time.monotonic()
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        raise MegarqError(f"the step {name!r} of the demo ended with status {status}: its message stands above.")
    return time.monotonic() - start


def prompts() -> tuple[list[str], list[int]]:
    """Prompts with digits and wordings in balance, and the digit that each asks for."""
    pairs = [(number % 10, (number // 10 + number) % len(WORDINGS)) for number in range(PICTURES)]
    return [caption(digit, wording) for digit, wording in pairs], [digit for digit, _ in pairs]


def drawn_pictures(output: Path) -> list[Image.Image]:
    """The pictures of the set that was drawn."""
    return [decode_plain(picture.data) for picture in open_pictures(output / "pictures")]


def real_pictures() -> dict[str, tuple[Pictures, list[int]]]:
    """The real digits of both parts, with what they show."""
    return {
        part: (grey([enlarged(scan) for scan, _ in scans]), [digit for _, digit in scans])
        for part, scans in split().items()
    }


def reconstruct(generator: ImageGenerator, pictures: Pictures) -> Pictures:
    """Held-out pictures after the RQ-VAE."""
    images = torch.from_numpy(pictures).float().mul(2).sub(1).unsqueeze(1).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        decoded = generator.rqvae.decode(generator.rqvae.quantize(generator.rqvae.encode(images)))
    return decoded.mean(1).add(1).div(2).clamp(0, 1).double().numpy()


def draw_sheet(path: Path, texts: list[str], images: list[Image.Image], columns: int = 10, side: int = 64) -> None:
    """Pictures in rows, each row's prompt beside it."""
    left = 260
    sheet = Image.new("RGB", (left + columns * side, side * (len(images) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        if column == 0:
            pen.text((8, row * side + side // 2 - 6), texts[row], fill="black")
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left + column * side, row * side))
    sheet.save(path)


def judge(output: Path) -> dict[str, object]:
    """Compare the pictures drawn with real digits, and draw some more to look at."""
    generator = ImageGenerator.from_pretrained(output / "model")
    _, asked = prompts()
    images = drawn_pictures(output)
    real = real_pictures()
    comparison = compare((grey(images), asked), real["train"], real["validation"])
    classifier = DigitClassifier(*real["train"])
    rebuilt = reconstruct(generator, real["validation"][0])
    shown = [f"{caption(digit, digit % len(WORDINGS))}" for digit in range(10)]
    rows = [text for text in shown for _ in range(10)]
    draw_sheet(output / "samples.png", shown, generator.generate(prompts=rows, seed=SEED + PICTURES))
    settings = CodeShards.open(output / "codes").manifest
    return {
        **asdict(comparison),
        "reconstruction_accuracy": classifier.accuracy(rebuilt, real["validation"][1]),
        "validation_loss": last_validation(output / "rqtransformer" / "metrics.jsonl"),
        "digit_scores": digit_scores(output / "scores.json"),
        "pictures": PICTURES,
        "sampling": asdict(generator.info.sampling),
        "temperature": TEMPERATURE,
        "perplexity_of_q": settings.perplexity,
    }


def digit_scores(scores: Path) -> dict[str, float]:
    """FID and the others under the demo's protocol."""
    return {name: score["value"] for name, score in json.loads(scores.read_bytes())["metrics"].items()}


def last_validation(metrics: Path) -> float:
    """The newest validation loss in a run's metrics."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return float(next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line))


def show(report: dict[str, object], output: Path) -> None:
    """The table at the end."""
    print()
    for name in (
        "prompt_accuracy",
        "shuffled_accuracy",
        "real_accuracy",
        "reconstruction_accuracy",
        "distinct_images",
        "diversity",
        "novelty",
        "validation_loss",
    ):
        value = report[name]
        print(f"  {name:<24} {value if isinstance(value, int) else f'{value:.3f}'}")
    scores, seconds = report["digit_scores"], report["seconds"]
    assert isinstance(scores, dict) and isinstance(seconds, dict)
    for name, value in scores.items():
        print(f"  {f'{name}, of digits':<24} {value:.3f}")
    print(f"  {'seconds':<24} {sum(seconds.values()):.0f}\n")
    print(f"{output}/report.html  {output}/report.json  {output}/samples.png")
    print(
        f"Draw your own: .venv/bin/python tools/sample.py {output}/model --prompt '{caption(7, 0)}' --output seven.png"
    )


def main(argv: list[str] | None = None) -> None:
    """Run the walk and judge what it draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--shuffle-captions", action="store_true", help="the control: captions of other pictures")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    if (output / "report.json").exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / PROMPTS, json.dumps(prompts()[0], indent=1))
    shown = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
    steps = walk(shown, args.shuffle_captions)
    seconds = {
        name: run_step(number, len(steps) + 1, name, command)
        for number, (name, command) in enumerate(steps.items(), start=1)
    }
    print(f"\n[{len(steps) + 1}/{len(steps) + 1}] judge {PICTURES} pictures", flush=True)
    start = time.monotonic()
    report = judge(output)
    seconds["judge"] = time.monotonic() - start
    report["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    report["machine"] = describe_machine()
    write_atomically(output / "report.json", json.dumps(report, indent=2) + "\n")
    show(report, shown)


if __name__ == "__main__":
    sys.exit(cli.run(main))
