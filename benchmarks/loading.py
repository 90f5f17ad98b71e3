"""Memory and time of loading an exported model and drawing a batch from it, each form of its weights in a new process.

The folder has random weights in bf16, in files of at most 5 GB as tools/export.py writes them. On a CPU memory is what
the process itself holds (RssAnon): the files' pages, which are mapped while they are read, belong to the page cache.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megarq import cli
from megarq.config.load import load_config
from megarq.files import write_atomically
from megarq.inference.generator import ImageGenerator
from megarq.inference.model_folder import ModelInfo, write_info
from megarq.inference.options import DRAWING_DTYPES
from megarq.inference.pretrained import write_rqvae, write_transformer
from megarq.launch.machine import describe_machine
from megarq.planning.counts import transformer_parameters
from megarq.rqvae.model import RQVAE, fingerprint
from megarq.transformer.rq_transformer import RQTransformer

EXAMPLE = "example:\n  python benchmarks/loading.py --model t2i-3.9b --json benchmarks/results/loading.json"
FORMS = ("bf16", "int8")
GIB = 2**30


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="t2i-3.9b", help="a configuration by name or path (default t2i-3.9b)")
    parser.add_argument("--rqvae", default="rqvae-8x8x4", help="of its RQ-VAE (default rqvae-8x8x4)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures of the batch (default 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the model is made; default: the temporary folder")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    parser.add_argument("--here", nargs=2, metavar=("FORM", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(argv)
    if args.here:
        form, folder = args.here
        print(json.dumps(measure(Path(folder), form, args)))
        return
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "command": f"python benchmarks/loading.py {shlex.join(sys.argv[1:])}".strip(),
        "device": args.device,
        "model": args.model,
        "parameters": transformer_parameters(load_config(args.model, [], "rq-transformer").model).total,
        "batch_size": args.batch_size,
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_model(Path(folder), args)
        for form in FORMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--here", form, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result[form] = json.loads(done.stdout.splitlines()[-1])
            print(form, result[form], flush=True)
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=2) + "\n")


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """An exported model without tokenizer, of random weights."""
    config = load_config(args.model, [], "rq-transformer").model
    torch.manual_seed(0)
    rqvae = RQVAE(load_config(args.rqvae, [], "rq-vae").model)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in RQTransformer(config).named_parameters()}
    write_rqvae(rqvae, folder)
    write_transformer(folder, config, lambda name: torch.randn(shapes[name]) * 0.02, torch.bfloat16)
    write_info(folder, ModelInfo(rqvae.config, fingerprint(rqvae), config))


def measure(folder: Path, form: str, args: argparse.Namespace) -> dict[str, float]:
    """Load the model and draw a batch."""
    peak = PeakMemory(args.device)
    start = time.perf_counter()
    generator = ImageGenerator.from_pretrained(folder, args.device, DRAWING_DTYPES[form], args.batch_size)
    loaded = time.perf_counter() - start
    measured = {"loading_seconds": loaded, "loading_peak_gib": peak.gib()}
    config = generator.transformer.config
    cond = torch.randint(config.cond_vocab_size, (args.batch_size, config.cond_length))
    start = time.perf_counter()
    generator.decode(generator.sample_codes(cond, top_k=1024, top_p=0.95))
    return measured | {"drawing_seconds": time.perf_counter() - start, "peak_gib": peak.gib()}


class PeakMemory:
    """The most memory so far: allocated on a GPU; elsewhere the process's own, looked at every 10 ms."""

    def __init__(self, device: str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._most = 0.0
        if not self._on_gpu:
            threading.Thread(target=self._watch, daemon=True).start()

    def gib(self) -> float:
        """So far."""
        return (torch.cuda.max_memory_allocated() if self._on_gpu else self._most) / GIB

    def _watch(self) -> None:
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self._most = max(self._most, int(status["RssAnon"].split()[0]) * 1024)
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(cli.run(main))
