"""A protocol of one's own for evaluation/score.py: digits, seen by a small classifier in the place of Inception.

    python tools/demo/digit_protocol.py --output runs/demo/digits.safetensors              # trains it, in seconds
    python evaluation/score.py PICTURES REFERENCE --protocol tools/demo/digit_protocol.py \\
        --feature-weights digits=runs/demo/digits.safetensors --metrics fid,is,kid,prc

Inception has never seen an 8x8 scan. Scores under this protocol compare the demo with itself and nothing else.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from megarq import cli
from megarq.files import write_atomically
from megarq.scoring.networks import register_network
from megarq.scoring.protocols import Protocol
from megarq.scoring.weights import Network

WIDTH, STEPS = 64, 600


class DigitNetwork(nn.Module):
    """8x8 means of the grey levels, two hidden layers, ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, WIDTH), nn.GELU())
        self.digits = nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, 32, 32] -> hidden [B, 64] and logits [B, 10]."""
        means = F.adaptive_avg_pool2d(pixels.float().mean(1) / 255, 8).flatten(1)
        hidden = self.hidden(means)
        return {"hidden": hidden, "logits": self.digits(hidden)}


def build(state: Mapping[str, Tensor]) -> nn.Module:
    """The network of these tensors. Raises: RuntimeError where they do not fit."""
    network = DigitNetwork()
    network.load_state_dict(state)
    return network


register_network(
    "digits",
    Network(("digits.safetensors",), "tools/demo/digit_protocol.py, which trains it"),
    layer="hidden",
    dim=WIDTH,
    build=build,
)
PROTOCOL = Protocol(
    name="digits",
    input="uint8",
    resize="8x8 means of the grey levels",
    normalize="x / 255",
    statistics="mean and covariance in float64",
    logits="logits",
    network="digits",
)


def train() -> DigitNetwork:
    """A classifier of the training digits, the same every time on one kind of processor."""
    from digits import enlarged, split
    from torchvision.transforms.functional import pil_to_tensor

    torch.manual_seed(0)
    scans = split()["train"]
    pixels = torch.stack([pil_to_tensor(enlarged(scan)) for scan, _ in scans])
    labels = torch.tensor([digit for _, digit in scans])
    network = DigitNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(STEPS):
        chosen = torch.randint(len(labels), (128,))
        loss = F.cross_entropy(network(pixels[chosen])["logits"], labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Train the network and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of weights to write (.safetensors)")
    args = parser.parse_args(argv)
    write_atomically(args.output, save(train().state_dict()))
    print(f"digits' network in {args.output}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
