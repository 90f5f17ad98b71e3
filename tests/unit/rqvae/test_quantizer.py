import pytest
import torch
from torch import Tensor

from megarq.errors import ConfigError
from megarq.rqvae.quantizer import ResidualQuantizer

DIM = 4


def make(sizes: tuple[int, ...] = (16, 16, 16), shared: bool = True, **options: object) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(sizes, DIM, shared=shared, **options).eval()
    for index, book in enumerate(quantizer.codebooks):
        book.weight[:-1] = torch.randn(book.size, DIM, generator=seeded(index)) / (index + 1)
    return quantizer


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(batch: int = 6, seed: int = 3) -> Tensor:
    return torch.randn(batch, 2, 2, DIM, generator=seeded(seed))


def test_each_depth_quantizes_what_the_depths_before_leave() -> None:
    quantizer, z = make(), latents()
    weight = quantizer.codebook(0).weight[:-1]
    residual, expected = z.clone(), []
    for _ in range(3):
        expected.append((residual.unsqueeze(-2) - weight).square().sum(-1).argmin(-1))
        residual -= weight[expected[-1]]
    assert torch.equal(quantizer.quantize(z), torch.stack(expected, dim=-1))


def test_shared_codebook_is_one_module() -> None:
    quantizer = make()
    assert len(quantizer.codebooks) == 1 and quantizer.codebook(0) is quantizer.codebook(2)


def test_depths_of_different_size_search_their_own_codebooks() -> None:
    quantizer, z = make((4, 8, 16), shared=False), latents(200)
    largest = quantizer.quantize(z).flatten(0, 2).amax(0).tolist()
    assert largest == [3, 7, 15]


def test_depths_of_different_size_embed_from_their_own_codebooks() -> None:
    quantizer = make((4, 8, 16), shared=False)
    embedded = quantizer.embed(torch.tensor([3, 7, 15]))
    assert torch.equal(embedded, torch.stack([book.weight[-2] for book in quantizer.codebooks]))


def test_soft_codes_of_a_smaller_codebook_end_in_zeros() -> None:
    soft = make((4, 8, 16), shared=False).soft_codes(latents(), 0.5)
    assert soft.shape == (6, 2, 2, 3, 16)
    assert soft[..., 0, 4:].max() == 0
    torch.testing.assert_close(soft.sum(-1), torch.ones(6, 2, 2, 3))


def test_soft_codes_are_the_softmax_of_negative_distances() -> None:
    quantizer, z = make(), latents()
    weight = quantizer.codebook(0).weight[:-1]
    residual = z - weight[quantizer.quantize(z)[..., 0]]
    expected = torch.softmax(-(residual.unsqueeze(-2) - weight).square().sum(-1) / 0.7, dim=-1)
    torch.testing.assert_close(quantizer.soft_codes(z, 0.7)[..., 1, :], expected)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="temperature=0"):
        make().soft_codes(latents(), 0)


def test_drawn_codes_follow_q() -> None:
    quantizer = make((8, 8))
    z = latents(1)[:, :1, :1].expand(20000, 1, 1, DIM)
    codes, soft = quantizer.draw_codes(z, 1.0, seeded(5))
    frequencies = torch.bincount(codes[..., 0].flatten(), minlength=8) / 20000
    torch.testing.assert_close(frequencies, soft[0, 0, 0, 0], rtol=0, atol=0.015)


def test_second_draw_follows_q_of_the_residual_that_the_first_draw_left() -> None:
    quantizer = make((8, 8))
    z = latents(1)[:, :1, :1].expand(20000, 1, 1, DIM)
    codes, soft = quantizer.draw_codes(z, 1.0, seeded(5))
    weight = quantizer.codebook(1).weight[:-1]
    first = int(codes[..., 0].mode(0).values)
    after = codes[:, 0, 0, 0] == first
    expected = torch.softmax(-(z[0, 0, 0] - weight[first] - weight).square().sum(-1), dim=-1)
    frequencies = torch.bincount(codes[after, 0, 0, 1], minlength=8) / after.sum()
    torch.testing.assert_close(soft[after][0, 0, 0, 1], expected)
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.03)


def test_draws_never_leave_a_smaller_codebook() -> None:
    quantizer = make((2, 16), shared=False)
    assert quantizer.draw_hard_codes(latents(500), 100.0, seeded(0))[..., 0].max() == 1


def test_same_generator_draws_the_same_codes() -> None:
    quantizer, z = make(), latents()
    assert torch.equal(quantizer.draw_codes(z, 1.0, seeded(1))[0], quantizer.draw_codes(z, 1.0, seeded(1))[0])


def test_other_generator_draws_other_codes() -> None:
    quantizer, z = make(), latents()
    assert not torch.equal(quantizer.draw_codes(z, 1.0, seeded(1))[0], quantizer.draw_codes(z, 1.0, seeded(2))[0])


def test_hard_codes_are_those_of_draw_codes() -> None:
    quantizer, z = make(), latents()
    assert torch.equal(quantizer.draw_hard_codes(z, 1.0, seeded(1)), quantizer.draw_codes(z, 1.0, seeded(1))[0])


def test_own_generators_make_draws_independent_of_the_batch() -> None:
    quantizer, z = make(), latents()
    together = quantizer.draw_hard_codes(z, 1.0, [seeded(i) for i in range(6)])
    alone = quantizer.draw_hard_codes(z[4:5], 1.0, [seeded(4)])
    assert torch.equal(together[4:5], alone)


def test_one_generator_serves_consecutive_batches_as_it_serves_one() -> None:
    quantizer, z, generator = make(), latents(), seeded(1)
    parts = [quantizer.draw_hard_codes(part, 1.0, generator) for part in (z[:1], z[1:4], z[4:])]
    assert torch.equal(torch.cat(parts), quantizer.draw_hard_codes(z, 1.0, seeded(1)))


def test_gradient_passes_straight_through() -> None:
    z = latents().requires_grad_()
    weights = torch.randn(z.shape, generator=seeded(9))
    (make()(z).latents * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_quantized_latents_are_the_sum_of_embeddings() -> None:
    quantizer, z = make(), latents()
    torch.testing.assert_close(quantizer(z).latents, quantizer.embed(quantizer.quantize(z)).sum(-2))


def test_commitment_loss_averages_the_partial_sums() -> None:
    quantizer, z = make(), latents()
    partial = quantizer.embed(quantizer.quantize(z)).cumsum(-2)
    expected = torch.stack([(z - partial[..., depth, :]).square().mean() for depth in range(3)]).mean()
    torch.testing.assert_close(quantizer(z).commitment_loss, expected)


def test_commitment_gradient_reaches_the_latents() -> None:
    quantizer, z = make((16,)), latents().requires_grad_()
    quantizer(z).commitment_loss.backward()
    expected = 2 * (z - quantizer.embed(quantizer.quantize(z)).sum(-2)) / z.numel()
    torch.testing.assert_close(z.grad, expected)


def test_shared_codebook_moves_between_depths() -> None:
    quantizer, z = make().train(), latents(40)
    first = quantizer.codebook(0)
    seen = []
    moved = first.update
    first.update = lambda vectors, codes, span, generator: (  # type: ignore[method-assign]
        seen.append((first.weight.clone(), vectors, codes)),
        moved(vectors, codes, span, generator),
    )
    quantizer(z)
    for weight, vectors, codes in seen:
        assert torch.equal((vectors.unsqueeze(1) - weight[:-1]).square().sum(-1).argmin(1), codes)
    assert not torch.equal(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[1][1], seen[0][1] - seen[0][0][seen[0][2]])


def test_evaluation_leaves_every_buffer() -> None:
    quantizer = make()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(latents())
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


def test_training_counts_its_steps() -> None:
    quantizer = make().train()
    for _ in range(3):
        quantizer(latents())
    assert quantizer.state_dict()["steps"] == 3


def test_training_goes_on_from_a_saved_state() -> None:
    whole, half = make().train(), make().train()
    for seed in range(2):
        whole(latents(seed=seed)), half(latents(seed=seed))
    resumed = ResidualQuantizer((16, 16, 16), DIM)
    resumed.load_state_dict(half.state_dict())
    whole(latents(seed=7)), resumed(latents(seed=7))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_another_seed_starts_another_codebook() -> None:
    weights = [ResidualQuantizer((16,), DIM, seed=seed).codebook(0).weight for seed in (0, 1)]
    assert not torch.equal(*weights)


def test_first_training_step_fills_the_codebook_with_the_batch() -> None:
    quantizer = ResidualQuantizer((32,), DIM).train()
    z = 5 + latents(40)
    quantizer(z)
    assert torch.cdist(quantizer.codebook(0).weight[:-1], z.reshape(-1, DIM)).min(1).values.max() < 1.0


def test_search_is_fp32_under_autocast() -> None:
    quantizer, z = make((512, 512, 512)), latents(100)
    expected = quantizer.quantize(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.quantize(z), expected)


def test_bf16_latents_are_searched_in_fp32() -> None:
    quantizer, z = make((512, 512, 512)), latents(100).bfloat16()
    assert torch.equal(quantizer.quantize(z), quantizer.quantize(z.float()))
