"""The models answer what the authors' implementation answers (float32, CPU)."""

import torch

from megarq.config.run import ObjectiveConfig
from megarq.transformer.loss import objective

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def soft_targets(expected):
    soft = expected["soft_codes"].float()
    return soft / soft.sum(-1, keepdim=True)


def test_logits(reference):
    logits, _ = reference.model(reference.expected["codes"], reference.expected["cond"])
    torch.testing.assert_close(logits, reference.expected["logits"], **TOLERANCE)


def test_caption_logits(reference):
    _, caption_logits = reference.model(reference.expected["codes"], reference.expected["cond"])
    if "cond_logits" in reference.expected:
        torch.testing.assert_close(caption_logits, reference.expected["cond_logits"], **TOLERANCE)
    else:
        assert caption_logits is None


def test_hard_image_loss(reference):
    expected = reference.expected
    losses = reference.model(expected["codes"], expected["cond"], expected["codes"])
    terms = objective(*losses, expected["cond"], ObjectiveConfig())
    torch.testing.assert_close(terms.image, expected["hard_loss"], **TOLERANCE)


def test_soft_total_caption_losses_and_gradient_norm(reference):
    model, expected = reference
    model.zero_grad()
    losses = model(expected["codes"], expected["cond"], soft_targets(expected))
    terms = objective(*losses, expected["cond"], ObjectiveConfig())
    torch.testing.assert_close(terms.image, expected["soft_loss"], **TOLERANCE)
    torch.testing.assert_close(terms.total, expected["total_loss"], **TOLERANCE)
    if "cond_loss" in expected:
        torch.testing.assert_close(terms.caption, expected["cond_loss"], **TOLERANCE)
    terms.total.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    torch.testing.assert_close(norm.double(), expected["grad_norm"], atol=1e-3, rtol=1e-4)
