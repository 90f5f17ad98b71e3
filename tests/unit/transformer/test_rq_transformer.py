"""What the RQ-Transformer sees, refuses and starts from; its answers are checked in test_reference.py."""

from dataclasses import replace
from math import sqrt

import pytest
import torch
from torch import Tensor

from megarq.config.models import RQTransformerConfig, StackConfig
from megarq.errors import ConfigError
from megarq.transformer.parameters import decayed
from megarq.transformer.rq_transformer import RQTransformer

TEXT = RQTransformerConfig(
    code_shape=[2, 3, 3],
    codebook_size=16,
    codebook_dim=8,
    embed_dim=32,
    body=StackConfig(layers=2, heads=4),
    head=StackConfig(layers=2, heads=2),
    cond_length=4,
    cond_vocab_size=12,
    dropout=0.0,
)
CLASS = replace(TEXT, cond_length=1)
NONE = replace(TEXT, cond_length=1, cond_vocab_size=1)
RAGGED = replace(
    TEXT,
    codebook_sizes=[16, 5, 9],
    body_input="learned",
    head_input="learned",
    shared_embedding=False,
    shared_classifier=False,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(config: RQTransformerConfig = TEXT, **options: bool) -> RQTransformer:
    model = RQTransformer(config, **options)
    model.initialize(0)
    for parameter in model.parameters():  # far from the small first weights, so that every input matters
        parameter.data.add_(0.2 * normal(*parameter.shape, seed=parameter.numel()))
    if config.uses_codebook:
        model.load_codebook(normal(16, 8))
    return model.eval()


def inputs(config: RQTransformerConfig = TEXT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(size, (2, *config.code_shape[:2]), generator=generator) for size in config.sizes]
    cond = torch.randint(config.cond_vocab_size, (2, config.cond_length), generator=generator)
    return torch.stack(codes, dim=-1), cond


@pytest.mark.parametrize("config", [TEXT, CLASS, NONE, RAGGED], ids=["text", "class", "none", "ragged"])
def test_shapes_of_the_logits(config):
    logits, caption = built(config)(*inputs(config))
    assert logits.shape == (2, 2, 3, 3, 16)
    assert (caption is None) if config.cond_length == 1 else (caption.shape == (2, 3, 12))


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("depth", range(3))
def test_a_code_is_seen_by_later_codes_alone(position, depth):
    model, (codes, cond) = built(), inputs()
    changed = codes.flatten(1, 2).clone()
    changed[:, position, depth] = (changed[:, position, depth] + 1) % 16
    before, caption_before = model(codes, cond)
    after, caption_after = model(changed.view_as(codes), cond)
    difference = (after - before).abs().amax(dim=(0, -1)).flatten() > 1e-6  # over positions and depths, in order
    place = 3 * position + depth
    assert not difference[: place + 1].any()
    assert difference[place + 1 :].all()
    assert torch.equal(caption_before, caption_after)


@pytest.mark.parametrize("token", range(4))
def test_a_caption_token_is_seen_by_later_tokens_and_all_codes(token):
    model, (codes, cond) = built(), inputs()
    changed = cond.clone()
    changed[:, token] = (changed[:, token] + 1) % 12
    before, caption_before = model(codes, cond)
    after, caption_after = model(codes, changed)
    difference = (caption_after - caption_before).abs().amax(dim=(0, -1)) > 1e-6
    assert difference.tolist() == [position >= token for position in range(3)]
    assert ((after - before).abs().amax(dim=-1) > 1e-6).all()


def test_codes_that_a_depth_does_not_have_are_masked():
    logits, _ = built(RAGGED)(*inputs(RAGGED))
    for depth, size in enumerate(RAGGED.sizes):
        assert (logits[..., depth, size:] == -1e6).all()
        assert (logits[..., depth, :size].abs() < 1e3).all()


def test_recomputed_activations_give_the_same_loss_and_gradients():
    gradients = []
    for recompute in (False, True):
        model = built(replace(TEXT, dropout=0.2), activation_checkpointing=recompute).train()
        torch.manual_seed(3)
        logits, caption = model(*inputs())
        (logits.square().mean() + caption.square().mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bf16_weights_work_beside_an_fp32_codebook():
    """DeepSpeed casts parameters and leaves buffers as they are."""
    model, reference = built(), built()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    logits, _ = model(*inputs())
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - reference(*inputs())[0]).norm() < 0.05 * reference(*inputs())[0].norm()


def test_a_condition_is_filled_in_where_there_is_none():
    model, (codes, _) = built(NONE), inputs(NONE)
    assert torch.equal(model(codes)[0], model(codes, torch.zeros(2, 1, dtype=torch.int64))[0])


@pytest.mark.parametrize(("config", "kind"), [(TEXT, "text"), (CLASS, "class")])
def test_a_missing_condition_is_refused(config, kind):
    with pytest.raises(ConfigError, match=f"the model is conditioned on {kind}, but cond is None"):
        built(config)(inputs(config)[0])


def test_a_condition_of_another_length_is_refused():
    with pytest.raises(ConfigError, match=r"cond has shape \[2, 3\]: give \[2, 4\]"):
        built()(inputs()[0], torch.zeros(2, 3, dtype=torch.int64))


def test_a_codebook_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"codebook is \[9, 8\], the model's \[16, 8\]"):
        built().load_codebook(torch.zeros(9, 8))


def test_the_codebook_is_no_part_of_the_state_dict():
    assert not any("vectors" in name for name in built().state_dict())


def test_separate_codebooks_are_looked_up_by_depth():
    model = RQTransformer(replace(TEXT, codebook_size=4), shared_codebook=False)
    tables = [normal(4, 8, seed=depth) for depth in range(3)]
    model.load_codebook(tables)
    codes = torch.tensor([[1, 2, 3]])
    expected = torch.stack([tables[depth][code] for depth, code in enumerate([1, 2, 3])])
    assert torch.equal(model.body_input.codes(codes)[0], expected)


def test_first_weights_depend_on_the_seed_alone():
    models = [RQTransformer(TEXT) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(id(model) % 1000)
        model.initialize(seed)
    first, same, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_first_weights_follow_gpt2():
    model = RQTransformer(replace(TEXT, embed_dim=256, body=StackConfig(layers=8, heads=4)))
    model.initialize(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln" in name or ".norm." in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 10_000:
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            layers = {"body": 8, "head": 2}.get(name.partition(".")[0], 0)
            expected = 0.02 / sqrt(2 * layers) if residual else 0.02
            assert float(parameter.std()) == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("config", [TEXT, RAGGED], ids=["codebook", "learned"])
def test_weight_decay_is_for_matrices(config):
    model = RQTransformer(config)
    for name, parameter in model.named_parameters():
        embedding = name.startswith(("body_input.condition", "body_input.codes", "head_input.codes"))
        expected = parameter.ndim > 1 and not name.endswith(("positions", "bias")) and not embedding
        assert decayed(name) == expected, name


def test_two_sides_with_learned_embeddings_share_one_table():
    model = RQTransformer(replace(TEXT, body_input="learned", head_input="learned"))
    assert model.body_input.codes is model.head_input.codes


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_losses_do_not_depend_on_how_many_logits_are_held_at_once(soft):
    torch.manual_seed(0)
    model = RQTransformer(replace(TEXT, dropout=0.0))
    model.initialize(0)
    codes = torch.randint(TEXT.codebook_size, (3, *TEXT.code_shape))
    cond = torch.randint(TEXT.cond_vocab_size, (3, TEXT.cond_length))
    targets = torch.randn(*codes.shape, TEXT.codebook_size).softmax(-1) if soft else codes
    results = []
    for at_once in (1, 5 * TEXT.depth * TEXT.codebook_size, 2**30):
        model.outputs.logits_at_once = at_once
        model.zero_grad()
        image, caption = model(codes, cond, targets)
        (image.sum() + 2 * caption.sum()).backward()
        results.append((image, caption, *(p.grad.clone() for p in model.parameters())))
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], rtol=1e-4, atol=1e-5)


def saved_logits(logits_at_once: int) -> int:
    """Numbers kept for the backward pass whose last dimension is that of the logits."""
    model = RQTransformer(replace(TEXT, codebook_size=19, cond_vocab_size=19))
    model.initialize(0)
    model.outputs.logits_at_once = logits_at_once
    codes, saved = torch.zeros((3, *TEXT.code_shape), dtype=torch.int64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(codes, torch.zeros(3, TEXT.cond_length, dtype=torch.int64), codes)
    return sum(tensor.numel() for tensor in saved if tensor.shape[-1:] == (19,) and tensor.ndim > 1)


def test_logits_in_parts_are_not_kept_for_the_backward_pass():
    assert saved_logits(logits_at_once=1) == 0
    assert saved_logits(logits_at_once=2**30) > 0
