"""LayerNorm is torch's, with a kernel that can be replaced."""

import torch
import torch.nn.functional as F
from torch import nn

from megarq.parallel.norms import LayerNorm


def test_it_equals_torchs():
    ours, theirs = LayerNorm(8), nn.LayerNorm(8)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    for name, parameter in ours.named_parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))


def test_it_starts_as_torchs():
    ours, theirs = LayerNorm(8).state_dict(), nn.LayerNorm(8).state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_kernel_takes_the_place_of_torchs():
    norm, calls = LayerNorm(8), []

    def kernel(x, shape, weight, bias, eps):
        calls.append((tuple(shape), weight is norm.weight, bias is norm.bias, eps))
        return F.layer_norm(x, shape, weight, bias, eps)

    norm.kernel = kernel
    norm(torch.ones(2, 8))
    assert calls == [((8,), True, True, 1e-5)]
