"""What a training run is told: one dataclass per component, one line under each field."""

from dataclasses import dataclass, field

from megarq.config.faults import FaultConfig
from megarq.config.models import RQTransformerConfig, RQVAEConfig
from megarq.config.preflight import PreflightConfig
from megarq.config.ranges import AMOUNT, COUNT, POSITIVE, RATE, SHARE, Range, check_ranges
from megarq.errors import ConfigError


@dataclass
class TrainConfig:
    """Length, batch, optimiser and precision of a run."""

    steps: int | None = None
    """Optimiser steps in all; overrides `epochs`."""
    epochs: float | None = None
    """Passes over the data, where `steps` is not given."""
    global_batch_size: int = 2048
    """Samples in one optimiser step, over all ranks."""
    micro_batch_size: int | None = None
    """Samples a rank holds at once; default: global batch / data-parallel size, without accumulation."""
    seed: int = 0
    """Seed of initialisation, data order, draws and dropout."""
    lr: float = 5e-4
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to `lr`."""
    warmup_epochs: float = 0.0
    """Warm-up in passes over the data, added to `warmup_steps`."""
    schedule: str = "cosine"
    """After warm-up: "cosine", reaching 0 where a step after the last would be, or "constant"."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's decay rates."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, on matrices only: not on biases, norms, embeddings and positions."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    precision: str = "bf16"
    """"bf16" (fp32 master weights, gradients reduced in fp32) or "fp32"."""
    activation_checkpointing: bool = False
    """Recompute each transformer block in the backward pass instead of storing its activations."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights; none by default."""
    kernels: str = "auto"
    """Of LayerNorm and AdamW: "torch", "apex" (NVIDIA's, on CUDA), or "auto": apex's where there is one."""
    compile: bool = False
    """Compile each transformer block with torch.compile."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"train.precision={self.precision!r}: use bf16 or fp32.")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"train.schedule={self.schedule!r}: use cosine or constant.")
        if self.kernels not in ("auto", "torch", "apex"):
            raise ConfigError(f"train.kernels={self.kernels!r}: use auto, torch or apex.")
        if self.steps is None and self.epochs is None:
            raise ConfigError("train.steps and train.epochs are both unset: give one, for example train.steps=50000.")
        if len(self.betas) != 2:
            raise ConfigError(f"train.betas={list(self.betas)}: give two numbers, such as [0.9,0.95].")
        counts = dict.fromkeys(("steps", "global_batch_size", "micro_batch_size"), COUNT)
        amounts = dict.fromkeys(("warmup_steps", "warmup_epochs", "weight_decay", "clip"), AMOUNT)
        decay = Range(0, 1, open_low=True, open_high=True)
        check_ranges("train", self, **counts, **amounts, epochs=POSITIVE, lr=POSITIVE, betas=RATE, ema_decay=decay)


@dataclass
class ParallelConfig:
    """How the model is cut over ranks; what is left of them is data-parallel."""

    tp: int = 1
    """Tensor-parallel size: ranks that share each layer."""
    pp: int = 1
    """Pipeline-parallel size: ranks that share the list of layers."""
    sequence: bool = False
    """Cut the tokens over the tensor-parallel ranks wherever the layers are not cut: LayerNorm, dropout, residuals."""
    sharded_init: bool = True
    """Under ZeRO-3, cut each parameter over the ranks as soon as its layer is built: no rank ever holds the model."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        check_ranges("parallel", self, tp=COUNT, pp=COUNT)
        if self.sequence and self.tp == 1:
            raise ConfigError(
                "parallel.sequence=true with parallel.tp=1: the tokens are cut over the tensor-parallel ranks. "
                "Set parallel.tp to 2 or more, or parallel.sequence=false."
            )

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that read different samples, of so many in all. Raises ConfigError where they cannot be arranged so."""
        if self.tp < 1 or self.pp < 1:
            raise ConfigError(f"parallel.tp={self.tp}, parallel.pp={self.pp}: use 1 or more for each.")
        model_parallel = self.tp * self.pp
        if world_size % model_parallel:
            raise ConfigError(
                f"parallel.tp={self.tp} x parallel.pp={self.pp} = {model_parallel} does not divide the {world_size} "
                f"ranks started. Start a multiple of {model_parallel} ranks or lower tp or pp."
            )
        return world_size // model_parallel


@dataclass
class ObjectiveConfig:
    """The RQ-Transformer's objective: weighted image and caption cross-entropy."""

    image_weight: float = 0.9
    """Weight of the image loss (a caption-free model uses the image loss alone)."""
    caption_weight: float = 0.1
    """Weight of the loss on the next caption token."""
    mask_padding: bool = False
    """Leave [PAD] out of the caption loss; the published objective averages over it."""
    targets: str = "draws"
    """"draws" (stochastic codes drawn beforehand), "argmin" codes, or "soft" (exact, needs stored latents)."""
    temperature: float = 0.5
    """Temperature of the soft targets Q; must be that of the code shards."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        if self.targets not in ("draws", "argmin", "soft"):
            raise ConfigError(f"objective.targets={self.targets!r}: use draws, argmin or soft.")
        check_ranges("objective", self, temperature=POSITIVE, image_weight=AMOUNT, caption_weight=AMOUNT)


@dataclass
class DataConfig:
    """How samples reach the model."""

    workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    prefetch: int = 2
    """Batches that the loader processes make ahead."""
    validation_shards: int = 0
    """Hold out this many of the last shards of each --data folder for validation."""
    bpe_dropout: float = 0.0
    """Rate of BPE dropout on training captions."""
    caption_dropout: float = 0.0
    """Share of training captions that are read as the empty one, which classifier-free guidance needs."""
    retry_seconds: float = 30
    """How long a shard that cannot be read in mid-run is waited for, but at most half of `faults.hang_seconds`; then
    other samples stand in for its own."""
    max_lost_rate: float = 0.01
    """Share of an epoch's samples that others may stand in for; the run ends where there are more."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        shares = dict.fromkeys(("bpe_dropout", "caption_dropout", "max_lost_rate"), SHARE)
        amounts = dict.fromkeys(("workers", "validation_shards", "retry_seconds"), AMOUNT)
        check_ranges("data", self, prefetch=COUNT, **amounts, **shares)


@dataclass
class CheckpointConfig:
    """When a run is saved, and how much of it is kept."""

    every: int = 1000
    """Steps between checkpoints (the last step is always saved)."""
    keep: int = 2
    """Newest checkpoints kept on disk; 0 keeps all."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, from a copy of it in CPU memory; where that is too small, wait."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        check_ranges("checkpoint", self, every=COUNT, keep=AMOUNT)


@dataclass
class LogConfig:
    """What a run tells while it goes."""

    console_every: int = 10
    """Steps between console lines (metrics.jsonl has every step)."""
    validate_every: int = 1000
    """Steps between validations, where validation data are given; 0 turns them off."""
    sample_every: int = 0
    """Steps between grids of pictures, in TensorBoard and as PNG in the run's folder; 0 turns them off."""
    sample_count: int = 16
    """Pictures in a grid."""
    sample_prompts: list[str] = field(default_factory=list)
    """What to draw for a grid, in turn; by default the first held-out captions. Classes: the first ones."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s for the MFU; by default looked up from the device's name."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        check_ranges(
            "log",
            self,
            **dict.fromkeys(("console_every", "sample_count"), COUNT),
            **dict.fromkeys(("validate_every", "sample_every"), AMOUNT),
            peak_tflops=POSITIVE,
        )


MOST_GUIDANCE = 1000.0


@dataclass
class SamplingConfig:
    """How pictures are drawn from the model, unless told otherwise."""

    top_k: int | None = None
    """Draw among the k likeliest codes; none: among all."""
    top_p: float = 1.0
    """Draw among the likeliest codes that hold this share of the probability."""
    temperature: float = 1.0
    """Divides the logits."""
    guidance: float = 1.0
    """Scale of classifier-free guidance by the caption; 1 is none."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        top_p, guidance = Range(0, 1, open_low=True), Range(0, MOST_GUIDANCE)
        check_ranges("sampling", self, top_k=COUNT, top_p=top_p, temperature=POSITIVE, guidance=guidance)


@dataclass
class RQTransformerRunConfig:
    """Everything `megarq/train.py` is told."""

    architecture: str = "rq-transformer"
    """Which network a configuration file describes."""
    model: RQTransformerConfig = field(default_factory=RQTransformerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def validate(self) -> None:
        """Raise ConfigError where anything in the run cannot be run."""
        for section in (
            *(self.model, self.objective, self.train, self.parallel),
            *(self.data, self.checkpoint, self.log, self.faults, self.preflight, self.sampling),
        ):
            section.validate()
        if self.data.caption_dropout and self.model.condition != "text":
            raise ConfigError(
                f"data.caption_dropout={self.data.caption_dropout}, but the model has no captions "
                f"(model.cond_length={self.model.cond_length}). Set data.caption_dropout=0."
            )
        if self.sampling.guidance != 1 and self.model.condition != "text":
            raise ConfigError(
                f"sampling.guidance={self.sampling.guidance}, but the model has no captions "
                f"(model.cond_length={self.model.cond_length}). Set sampling.guidance=1."
            )


@dataclass
class RQVAELossConfig:
    """The RQ-VAE's objective."""

    reconstruction: str = "mse"
    """"mse" or "l1"."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS; 0 trains without it, and without VGG16's weights."""
    adversarial_weight: float = 0.75
    """Weight of the generator's loss, times the adaptive lambda; 0 trains without a discriminator."""
    adversarial: str = "hinge"
    """Loss of the discriminator: "hinge" or "vanilla" (cross-entropy)."""
    discriminator_weight: float = 0.75
    """Weight of the discriminator's own loss."""
    discriminator_lr: float | None = None
    """Peak learning rate of the discriminator, in the run's schedule, after a warm-up that begins when it joins in;
    by default `train.lr`."""
    discriminator_start: int = 0
    """Optimiser steps before the discriminator joins in."""
    discriminator_warmup: int = 0
    """Steps after it joined in which the generator's loss rises linearly to its weight."""
    discriminator_layers: int = 2
    """Convolutions of the discriminator that halve the resolution."""
    discriminator_channels: int = 64
    """Filters of its first convolution."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        if self.reconstruction not in ("mse", "l1"):
            raise ConfigError(f"loss.reconstruction={self.reconstruction!r}: use mse or l1.")
        if self.adversarial not in ("hinge", "vanilla"):
            raise ConfigError(f"loss.adversarial={self.adversarial!r}: use hinge or vanilla.")
        weights = ("commitment_weight", "perceptual_weight", "adversarial_weight", "discriminator_weight")
        check_ranges(
            "loss",
            self,
            **dict.fromkeys((*weights, "discriminator_start", "discriminator_warmup"), AMOUNT),
            **dict.fromkeys(("discriminator_layers", "discriminator_channels"), COUNT),
            discriminator_lr=POSITIVE,
        )


@dataclass
class CodebookConfig:
    """How the codebook of a new run starts."""

    init: str = "random"
    """"random" (small vectors, most of which the first step replaces by latents) or "kmeans" of the first batches."""
    init_batches: int = 8
    """Batches that k-means sees; training then starts with the first of them as always."""
    init_latents: int = 131072
    """Most latents of them that are looked at: all ranks hold them in fp32, 128 MiB for 131,072 of 256 numbers."""
    init_iterations: int = 20
    """Iterations of k-means."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        if self.init not in ("random", "kmeans"):
            raise ConfigError(f"codebook.init={self.init!r}: use random or kmeans.")
        check_ranges("codebook", self, **dict.fromkeys(("init_batches", "init_latents"), COUNT), init_iterations=AMOUNT)


@dataclass
class HealthConfig:
    """What is watched while an RQ-VAE trains, and when to warn."""

    every: int = 100
    """Steps over which codes are counted before usage, perplexity and dead codes are told."""
    usage_floor: float = 0.5
    """Warn where a codebook uses fewer codes than this share of the most that it has used; 0 turns it off."""
    perplexity_floor: float = 0.1
    """Warn where a codebook's perplexity is below this share of its codes, or that of a depth of a shared one below
    this share of its own best, from the second look on; 0 turns both off."""
    smoothing: int = 100
    """Steps over which the losses and logits below are averaged; nothing is judged before there are so many."""
    reconstruction_rise: float | None = 2.0
    """Warn where the averaged reconstruction loss is above so many times its best; null turns it off."""
    logits: float | None = None
    """Warn where the averaged logits of real and reconstructed pictures are more than twice this apart;
    by default 1 with the hinge loss, which ends there, and 4 with the vanilla one."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        counts = dict.fromkeys(("every", "smoothing"), COUNT)
        floors = dict.fromkeys(("usage_floor", "perplexity_floor"), SHARE)
        check_ranges("health", self, **counts, **floors, reconstruction_rise=Range(1), logits=POSITIVE)


@dataclass
class RQVAEDataConfig:
    """How images reach the RQ-VAE."""

    transform: str = "center"
    """Named transform from a picture to a square: see megarq.data.transforms."""
    workers: int = 2
    """Decoding processes per rank."""
    max_bad_rate: float = 0.01
    """Share of unreadable pictures above which the run stops; those below are logged and skipped."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        check_ranges("data", self, workers=AMOUNT, max_bad_rate=SHARE)


@dataclass
class RQVAERunConfig:
    """Everything `megarq/train_rqvae.py` is told."""

    architecture: str = "rq-vae"
    """Which network a configuration file describes."""
    finetuned_from: str | None = None
    """Whose weights a new run is to start from, by `--init-from`; without them it warns."""
    model: RQVAEConfig = field(default_factory=RQVAEConfig)
    loss: RQVAELossConfig = field(default_factory=RQVAELossConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            global_batch_size=128, lr=4e-5, betas=[0.5, 0.9], weight_decay=0.0, clip=0.0, schedule="constant"
        )
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    data: RQVAEDataConfig = field(default_factory=RQVAEDataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=lambda: LogConfig(sample_every=1000, sample_count=8))
    faults: FaultConfig = field(default_factory=FaultConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    def validate(self) -> None:
        """Raise ConfigError where anything in the run cannot be run."""
        for section in (
            *(self.model, self.loss, self.train, self.parallel),
            *(self.codebook, self.health, self.data, self.checkpoint, self.log, self.faults, self.preflight),
        ):
            section.validate()
