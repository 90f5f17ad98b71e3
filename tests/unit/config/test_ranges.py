"""A number that cannot be run is refused when the configuration is read, with its key and what it may be."""

import pytest

from megarq.config.load import load_config
from megarq.errors import ConfigError

REFUSED = {
    "demo": [
        *(
            "checkpoint.every=0",
            "checkpoint.keep=-1",
            "log.console_every=0",
            "log.sample_count=0",
            "log.sample_every=-1",
        ),
        *("sampling.top_k=0", "sampling.top_p=0", "sampling.temperature=0", "data.workers=-1", "data.bpe_dropout=3"),
        *("data.caption_dropout=1.1", "sampling.guidance=-1", "sampling.guidance=1001"),
        *("data.validation_shards=-1", "train.betas=[1.5,0.9]", "train.weight_decay=-1", "train.clip=-1"),
        *(
            "train.warmup_steps=-5",
            "train.steps=0",
            "train.lr=0",
            "train.ema_decay=1",
            "parallel.tp=0",
            "parallel.pp=-1",
        ),
        *("model.embed_dim=0", "model.cond_length=0", "model.codebook_size=0", "model.body.layers=-1"),
        *("model.body.heads=0", "model.dropout=1", "objective.image_weight=-1", "objective.temperature=0"),
    ],
    "rqvae-demo": [
        *("model.codebook_dim=0", "model.depth=0", "model.decay=2", "model.res_blocks=0", "data.max_bad_rate=2"),
        *("loss.commitment_weight=-1", "train.global_batch_size=0"),
        *("codebook.init_batches=0", "codebook.init_latents=0", "codebook.init_iterations=-1"),
        *("health.every=0", "health.smoothing=0", "health.usage_floor=2", "health.reconstruction_rise=0.5"),
        *("health.logits=0", "health.perplexity_floor=2"),
    ],
}


@pytest.mark.parametrize(
    ("model", "change"), [(model, change) for model, changes in REFUSED.items() for change in changes]
)
def test_a_number_out_of_range(model, change):
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}=.*: use a number (above|of)"):
        load_config(model, [change])


@pytest.mark.parametrize(
    ("model", "change", "remedy"),
    [
        ("demo", "train.betas=[0.9]", "give two numbers"),
        ("imagenet-480m", "sampling.guidance=2", r"the model has no captions .*Set sampling.guidance=1\."),
        ("rqvae-demo", "model.channel_multipliers=[]", "give one multiplier"),
        ("rqvae-demo", "model.attention_resolutions=[7]", "Choose among them"),
        ("rqvae-demo", "codebook.init=k-means", "use random or kmeans"),
    ],
)
def test_a_value_that_does_not_fit(model, change, remedy):
    with pytest.raises(ConfigError, match=remedy):
        load_config(model, [change])
