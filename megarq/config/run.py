"""What a training run is told: one dataclass per component, one line under each field."""

from dataclasses import dataclass, field

from megarq.config.models import RQTransformerConfig, RQVAEConfig
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
    """After warm-up: "cosine" to 0 at the last step, or "constant"."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's decay rates."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, on matrices only: not on biases, norms, embeddings and positions."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    precision: str = "bf16"
    """"bf16" (fp32 master weights, gradients reduced in fp32) or "fp32"."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights; none by default."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"train.precision={self.precision!r}: use bf16 or fp32.")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"train.schedule={self.schedule!r}: use cosine or constant.")
        if self.steps is None and self.epochs is None:
            raise ConfigError("train.steps and train.epochs are both unset: give one, for example train.steps=50000.")
        for name in ("steps", "epochs", "global_batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"train.{name}={value}: use a number above 0.")
        if self.lr <= 0:
            raise ConfigError(f"train.lr={self.lr}: use a number above 0.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay={self.ema_decay}: use a decay between 0 and 1, such as 0.9999.")


@dataclass
class ParallelConfig:
    """How the model is cut over ranks; what is left of them is data-parallel."""

    tp: int = 1
    """Tensor-parallel size: ranks that share each layer."""
    pp: int = 1
    """Pipeline-parallel size: ranks that share the list of layers."""


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
        if self.temperature <= 0:
            raise ConfigError(f"objective.temperature={self.temperature}: use a temperature above 0.")


@dataclass
class DataConfig:
    """How samples reach the model."""

    workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    validation_shards: int = 0
    """Hold out this many of the last shards of the first --data folder for validation."""
    bpe_dropout: float = 0.0
    """Rate of BPE dropout on training captions."""


@dataclass
class CheckpointConfig:
    """When a run is saved, and how much of it is kept."""

    every: int = 1000
    """Steps between checkpoints (the last step is always saved)."""
    keep: int = 2
    """Newest checkpoints kept on disk; 0 keeps all."""


@dataclass
class LogConfig:
    """What a run tells while it goes."""

    console_every: int = 10
    """Steps between console lines (metrics.jsonl has every step)."""
    validate_every: int = 1000
    """Steps between validations, where validation data are given; 0 turns them off."""
    sample_every: int = 0
    """Steps between sample grids in TensorBoard; 0 turns them off."""
    sample_count: int = 16
    """Pictures in a grid."""
    sample_prompts: list[str] = field(default_factory=list)
    """What to draw for a grid, in turn; the first classes where the condition is a class."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s for the MFU; by default looked up from the device's name."""


@dataclass
class SamplingConfig:
    """How pictures are drawn from the model, unless told otherwise."""

    top_k: int | None = None
    """Draw among the k likeliest codes; none: among all."""
    top_p: float = 1.0
    """Draw among the likeliest codes that hold this share of the probability."""
    temperature: float = 1.0
    """Divides the logits."""


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
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def validate(self) -> None:
        """Raise ConfigError where anything in the run cannot be run."""
        self.model.validate()
        self.objective.validate()
        self.train.validate()


@dataclass
class RQVAELossConfig:
    """The RQ-VAE's objective."""

    reconstruction: str = "mse"
    """"mse" or "l1"."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS."""
    adversarial_weight: float = 0.75
    """Weight of the generator's loss, times the adaptive lambda."""

    def validate(self) -> None:
        """Raise ConfigError where a value cannot be run."""
        if self.reconstruction not in ("mse", "l1"):
            raise ConfigError(f"loss.reconstruction={self.reconstruction!r}: use mse or l1.")


@dataclass
class RQVAEDataConfig:
    """How images reach the RQ-VAE."""

    transform: str = "center"
    """Named transform from a picture to a square: see megarq.data.images.TRANSFORMS."""
    workers: int = 2
    """Decoding processes per rank."""


@dataclass
class RQVAERunConfig:
    """Everything `megarq/train_rqvae.py` is told."""

    architecture: str = "rq-vae"
    """Which network a configuration file describes."""
    model: RQVAEConfig = field(default_factory=RQVAEConfig)
    loss: RQVAELossConfig = field(default_factory=RQVAELossConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            global_batch_size=128, lr=4e-5, betas=[0.5, 0.9], weight_decay=0.0, clip=0.0, schedule="constant"
        )
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: RQVAEDataConfig = field(default_factory=RQVAEDataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def validate(self) -> None:
        """Raise ConfigError where anything in the run cannot be run."""
        self.model.validate()
        self.loss.validate()
        self.train.validate()
