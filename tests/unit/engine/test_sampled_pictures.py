"""Pictures that a training run of captions samples for its log follow `sampling`, guidance included."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_models, write_tokenizer

from megarq.config.run import LogConfig, RQTransformerRunConfig, SamplingConfig
from megarq.engine.transformer_task import TransformerTask
from megarq.inference.sampling import Guidance, sample_codes
from megarq.parallel.topology import ProcessGroups, Topology
from megarq.text.tokenizer import TextTokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_pictures_are_guided_by_the_empty_caption(tmp_path: Path, scale: float) -> None:
    models, tokenizer = build_models(), TextTokenizer.load(write_tokenizer(tmp_path))
    sampling = SamplingConfig(top_k=7, temperature=1.5, guidance=scale)
    config = RQTransformerRunConfig(
        model=models.transformer.config, log=LogConfig(sample_count=4, sample_prompts=["a seven"]), sampling=sampling
    )
    task = TransformerTask(
        SimpleNamespace(zero_optimization_stage=lambda: 1),
        module=models.transformer,
        config=config,
        rqvae=models.rqvae,
        tokenizer=tokenizer,
        validation=None,
        groups=ProcessGroups.build(Topology()),
        device=CPU,
        samples_per_epoch=1000,
    )
    shown = task.pictures()
    assert shown is not None
    asked, null = (torch.tensor(tokenizer.encode(text, 4)) for text in ("a seven", ""))
    codes = sample_codes(models.transformer, asked.expand(4, -1), 7, 1.0, 1.5, guidance=Guidance(scale, null))
    with torch.no_grad():
        pictures = models.rqvae.decode(codes).clamp(-1, 1).add(1).div(2)
    side = pictures.shape[-1]
    assert torch.equal(shown[0][:, 2 : 2 + side, 2 : 2 + side], pictures[0])
    plain = sample_codes(models.transformer, asked.expand(4, -1), 7, 1.0, 1.5)
    assert torch.equal(codes, plain) == (scale == 1)
