"""Recipes of diffusion runs: which pipeline, which pictures, how to train. Needs neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mm_moslora.config import AdapterConfig, Precision, TrackConfig, YamlRecipe, read_recipe
from mm_moslora.config.value_checks import at_least, check_adam, check_mixer_rate, require

DIFFUSION_RECIPES = Path(__file__).with_name("recipes")
ATTENTION = "attention"
"""Value of `adapter.targets`: the attention projections, as diffusers' own LoRA scripts choose them."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The pipeline that is tuned."""

    base: str
    """Folder or hub id of a Stable Diffusion 1 or 2, SDXL, Stable Diffusion 3 or Flux pipeline; or tiny-sd, tiny-sdxl,
    tiny-sd3, tiny-flux: random weights from a config, for a trial on a CPU."""
    revision: str | None = None
    """Revision on the hub."""
    variant: str | None = None
    """Suffix of the weight files, such as fp16."""
    vae: str | None = None
    """Folder or hub id of another VAE. It then runs in the precision of the run (SDXL: madebyollin/sdxl-vae-fp16-fix);
    the pipeline's own VAE runs in fp32, since SDXL's overflows in fp16."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the denoiser predicts. auto: as the pipeline's scheduler says. Another value must agree with the scheduler,
    which draws the pictures later. Models that match flows have no choice."""
    text_encoders: Literal["frozen", "adapter"] = "frozen"
    """adapter: CLIP's text encoders carry an adapter, too. T5 is always frozen."""


@dataclass(frozen=True, kw_only=True)
class DiffusionAdapterConfig(AdapterConfig):
    """The adapter of the denoiser, and of the text encoders where they train."""

    rank: int = 4
    """r, the size of the mixer."""
    alpha: float = 4.0
    """s = alpha / rank (or alpha / sqrt(rank) with use_rslora)."""
    targets: str | list[str] = ATTENTION
    """attention, all-linear, or names of layers of the denoiser. The patterns above are of its paths, too."""
    text_encoder_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj"])
    """Names of layers of the text encoders."""
    factor_init: Literal["gaussian", "kaiming"] = "gaussian"
    """How A starts. gaussian: standard deviation 1 / rank, as in diffusers' scripts; kaiming: PEFT's default."""

    def __post_init__(self) -> None:
        require(
            not self.peft,
            f"adapter.peft is {self.peft}, which `mm-moslora train` and `compare` take. Leave it out of a diffusion "
            "recipe.",
        )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Prior preservation (DreamBooth, 2208.12242): pictures of the class keep the model from forgetting it."""

    prompt: str
    """Prompt of the class: a photo of a cat."""
    pictures: str | None = None
    """Folder of pictures of the class. None: `pictures/class` in the run folder."""
    count: int = 100
    """Pictures of the class. Missing ones, of an empty folder all, are drawn with the untuned model, by
    validate.sampling_steps and validate.guidance."""
    weight: float = 1.0
    """Weight of their loss."""

    def __post_init__(self) -> None:
        at_least("data.prior.count", self.count, 1)
        require(self.weight > 0, f"data.prior.weight is {self.weight}, expected more than 0. Leave data.prior out.")


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """The pictures and their prompts."""

    pictures: str
    """Folder of pictures, or drawn: a few drawn ones, for a trial."""
    prompt: str | None = None
    """Prompt of every picture. Give this or caption_column."""
    caption_column: str | None = None
    """Column of the folder's metadata.jsonl (lines with file_name) that holds each picture's prompt."""
    resolution: int | None = None
    """Side of the square that is trained on, pixels. None: the pipeline's own."""
    crop: Literal["centre", "random"] = "centre"
    """Which square is cut out, once the shorter side has that length."""
    flip: bool = False
    """Mirror half of the pictures."""
    repeats: int = 1
    """Times that each picture occurs in an epoch, each with a crop and a flip of its own."""
    cache_latents: bool = False
    """Encode each picture (and repeat) once; its crop and flip then stay the same over epochs. Mean and deviation are
    kept, so latents are sampled anew in every step, as without the cache."""
    long_prompts: Literal["refuse", "truncate"] = "refuse"
    """What happens with prompts beyond a text encoder's window: an error, or a warning with their number."""
    prior: PriorConfig | None = None
    """Prior preservation; None: off."""

    def __post_init__(self) -> None:
        require(
            (self.prompt is None) != (self.caption_column is None),
            "data: give one of prompt (one for all pictures) and caption_column (of metadata.jsonl), not both or none.",
        )
        at_least("data.repeats", self.repeats, 1)
        require(
            self.resolution is None or (self.resolution >= 8 and self.resolution % 8 == 0),
            f"data.resolution is {self.resolution}, expected a multiple of 8.",
        )


@dataclass(frozen=True, kw_only=True)
class DenoisingLossConfig:
    """The loss: the squared error of the prediction."""

    min_snr_gamma: float | None = None
    """Weight timesteps by min(SNR, gamma) / SNR (2303.09556), for v-prediction by min(SNR, gamma) / (SNR + 1). None:
    all weigh the same. Not for flows."""
    flow_weighting: Literal["logit_normal", "none", "mode", "sigma_sqrt", "cosmap"] = "logit_normal"
    """Flows only: how timesteps are drawn and weighted (2403.03206), by diffusers' functions. Its Flux script has none
    by default. Its SD3 script multiplies this loss by sigma^2 (it compares latents, not velocities)."""
    logit_mean: float = 0.0
    """Of logit_normal."""
    logit_std: float = 1.0
    """Of logit_normal."""
    mode_scale: float = 1.29
    """Of mode."""
    flux_guidance: float = 1.0
    """Guidance that a distilled Flux gets in training."""

    def __post_init__(self) -> None:
        gamma = self.min_snr_gamma
        require(gamma is None or gamma > 0, f"loss.min_snr_gamma is {gamma}, expected more than 0, or null.")
        at_least("loss.logit_std", self.logit_std, 0)


@dataclass(frozen=True, kw_only=True)
class DiffusionOptimConfig:
    """AdamW."""

    lr: float = 1e-4
    """Peak learning rate of the denoiser's adapter."""
    text_encoder_lr: float | None = None
    """Peak learning rate of the text encoders' adapters; None: lr."""
    mixer_lr: float | None = None
    """Peak learning rate of all mixers; None: mixer_factor times that of their factors."""
    mixer_factor: float = 1.0
    """Learning rate of the mixers divided by that of their factors."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: moments in 8 bits, by bitsandbytes."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the factors."""
    mixer_weight_decay: float = 0.0
    """Weight decay of the mixers."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moving averages."""
    eps: float = 1e-8
    """Adam's epsilon."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate rises linearly."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        decays = ("weight_decay", "mixer_weight_decay")
        for name in ("lr", *decays, "warmup", "max_grad_norm", "text_encoder_lr", "mixer_lr"):
            at_least(f"optim.{name}", getattr(self, name) or 0, 0)
        check_adam(self.betas, self.eps)
        check_mixer_rate(self.mixer_lr, self.mixer_factor)


@dataclass(frozen=True, kw_only=True)
class DiffusionTrainConfig:
    """The run."""

    output: str = "runs/run"
    """Run folder."""
    steps: int = 500
    """Optimiser steps."""
    batch: int = 1
    """Pictures per forward pass and process; prior preservation adds as many of the class."""
    accumulation: int = 4
    """Forward passes per optimiser step and process."""
    zero: Literal["none", "zero1", "zero2"] = "none"
    """Shard the optimiser's state (zero2: and gradients) over the processes, by DeepSpeed through accelerate."""
    precision: Precision = "auto"
    """auto: bf16 on hardware with fast bf16, else fp32. Adapters keep fp32 weights. fp16 needs a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    seed: int = 0
    """Seeds initialisation, order, crops, noise and timesteps."""
    deterministic: bool = False
    """On a GPU: kernels that always add up in the same order, so that a resumed run gives the same digits. CPUs do so
    anyway."""
    save_every: int = 0
    """Optimiser steps between checkpoints; 0: only the last step is saved."""
    keep_last: int = 2
    """Checkpoints to keep; 0 keeps all."""
    log_every: int = 1
    """Optimiser steps between metric records."""
    max_skipped_steps: int = 5
    """Stop after so many consecutive steps without a finite loss and gradient."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "log_every", "max_skipped_steps"):
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("save_every", "keep_last"):
            at_least(f"train.{name}", getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class ValidationPicturesConfig:
    """Pictures that are drawn while training, each beside the untuned model's with the same noise."""

    prompts: list[str] = field(default_factory=list)
    """Prompts; none: no pictures."""
    every_epochs: float = 0.0
    """Passes over the pictures between validations; 0: only at the end."""
    pictures: int = 1
    """Pictures of each prompt."""
    sampling_steps: int = 25
    """Denoising steps of a picture."""
    guidance: float | None = None
    """Guidance scale; None: the pipeline's default."""
    seed: int = 0
    """Seed of the first noise."""
    dino: str | None = None
    """Folder or cached hub id of a DINO encoder (facebook/dino-vits16): scores the subject's likeness at the end."""
    clip: str | None = None
    """Folder or cached hub id of CLIP (openai/clip-vit-base-patch32): scores likeness and agreement with the prompt."""

    def __post_init__(self) -> None:
        at_least("validate.every_epochs", self.every_epochs, 0)
        require(
            self.pictures >= 1,
            f"validate.pictures is {self.pictures}, expected at least 1. To draw nothing: validate.prompts: [].",
        )
        at_least("validate.sampling_steps", self.sampling_steps, 1)


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(YamlRecipe):
    """The complete configuration of a diffusion run."""

    name: str = "diffusion"
    """Display name."""
    model: PipelineConfig
    adapter: DiffusionAdapterConfig = field(default_factory=DiffusionAdapterConfig)
    data: PicturesConfig
    loss: DenoisingLossConfig = field(default_factory=DenoisingLossConfig)
    optim: DiffusionOptimConfig = field(default_factory=DiffusionOptimConfig)
    train: DiffusionTrainConfig = field(default_factory=DiffusionTrainConfig)
    validate: ValidationPicturesConfig = field(default_factory=ValidationPicturesConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        scored = self.validate.dino or self.validate.clip
        require(
            not scored or bool(self.validate.prompts),
            "validate.dino or validate.clip scores validation pictures, but validate.prompts is empty. Name prompts.",
        )


def load_diffusion_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> DiffusionRecipe:
    """Read a recipe by path or by the name of a shipped preset; see `mm_moslora.config.load_recipe`."""
    return read_recipe(DiffusionRecipe, name_or_path, overrides, presets=DIFFUSION_RECIPES)
