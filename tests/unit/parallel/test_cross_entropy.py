"""Cross-entropy in one process; tests/distributed has it over many."""

import pytest
import torch
import torch.nn.functional as F

from megarq.parallel.cross_entropy import cross_entropy


@pytest.fixture
def logits():
    return torch.randn(2, 3, 7, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_hard_targets(logits):
    targets = torch.tensor([[0, 3, 6], [1, 1, 5]])
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_soft_targets(logits):
    targets = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1)).softmax(-1)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none").view(2, 3)
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_one_hot_soft_targets_are_hard_targets(logits):
    targets = torch.tensor([[0, 3, 6], [1, 1, 5]])
    soft = F.one_hot(targets, 7).float()
    for loss in (cross_entropy(logits, targets), cross_entropy(logits, soft)):
        logits.grad = None
        loss.sum().backward()
        torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - soft)


def test_masked_logits_with_zero_targets_cost_nothing():
    logits = torch.tensor([[0.5, 1.5, -1e6]])
    targets = torch.tensor([[0.25, 0.75, 0.0]])
    torch.testing.assert_close(cross_entropy(logits, targets), cross_entropy(logits[:, :2], targets[:, :2]))


def test_half_targets_are_computed_in_fp32(logits):
    targets = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1)).softmax(-1).bfloat16()
    assert cross_entropy(logits.bfloat16(), targets).dtype == torch.float32
