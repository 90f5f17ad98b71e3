"""torch-fidelity's Inception with random weights, in a file like the published one.

Features are of order one, and logits so large that the Inception Score tells their bias from none.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megarq.scoring.protocols import CleanInception


class Unloaded(CleanInception):
    """Inception with the weights that it was initialised with."""

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        return None


def write_inception(folder: Path) -> Path:
    """Write the file."""
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Unloaded("made up", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    with torch.no_grad():
        network.fc.weight *= 30
        network.fc.bias *= 100
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"
