"""Recipes of diffusion runs: which pipeline, which pictures, how to train. Needs neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from mm_moslora.config import AdapterConfig, Precision, TrackConfig, YamlRecipe, read_recipe
from mm_moslora.config.recipe_keys import ANY_METHOD, FREE, MODEL, OUTPUT, PATH, ROUNDING, at_least, positive, require

DIFFUSION_RECIPES = Path(__file__).with_name("recipes")
ATTENTION = "attention"  # value of `adapter.targets`: the attention projections, as in diffusers' own scripts


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The pipeline that is tuned."""

    base: str = field(metadata=MODEL)
    """Folder or hub id of a Stable Diffusion 1 or 2, SDXL, Stable Diffusion 3 or Flux pipeline."""
    revision: str | None = None
    """Revision on the hub."""
    variant: str | None = None
    """Suffix of the weight files, such as fp16."""
    vae: str | None = field(default=None, metadata=MODEL)
    """Folder or hub id of another VAE, which runs in the precision of the run. The pipeline's own runs in fp32, since
    SDXL's overflows in fp16."""


@dataclass(frozen=True, kw_only=True)
class DiffusionAdapterConfig(AdapterConfig):
    """The adapter of the denoiser, its UNet or transformer."""

    rank: int = field(default=4, metadata=ANY_METHOD)
    """r, the size of the mixer."""
    alpha: float = field(default=4.0, metadata=ANY_METHOD)
    """s = alpha / rank (or alpha / sqrt(rank) with use_rslora)."""
    targets: str | list[str] = field(default=ATTENTION, metadata=ANY_METHOD)
    """attention, all-linear, or names of layers of the denoiser."""
    factor_init: Literal["gaussian", "kaiming"] = "gaussian"
    """How A starts. gaussian: standard deviation 1 / rank, as in diffusers' scripts; kaiming: PEFT's default."""

    def __post_init__(self) -> None:
        require(not self.peft, f"adapter.peft is {self.peft}, which diffusion recipes do not take. Leave it out.")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Prior preservation (DreamBooth, 2208.12242): pictures of the class keep the model from forgetting it."""

    prompt: str
    """Prompt of the class: a photo of a cat."""
    pictures: str = field(metadata=PATH)
    """Folder of pictures of the class, such as ones that the untuned pipeline drew."""
    weight: float = 1.0
    """Weight of their loss."""

    def __post_init__(self) -> None:
        positive("data.prior.weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """The pictures and their prompt."""

    pictures: str = field(metadata=PATH)
    """Folder of pictures."""
    prompt: str
    """Prompt of every picture."""
    resolution: int | None = None
    """Side of the square that is trained on, pixels; a multiple of 8 or 16. None: the pipeline's own."""
    crop: Literal["centre", "random"] = "centre"
    """Which square is cut out, once the shorter side has that length."""
    flip: bool = False
    """Mirror half of the pictures."""
    cache_latents: bool = False
    """Encode each picture once: one crop and flip for the run. Latents are still sampled anew in every step."""
    prior: PriorConfig | None = None
    """Prior preservation; None: off."""

    def __post_init__(self) -> None:
        at_least("data.resolution", 8 if self.resolution is None else self.resolution, 8)


@dataclass(frozen=True, kw_only=True)
class DenoisingLossConfig:
    """The loss: the squared error of the prediction, of what the pipeline's scheduler says (noise, v or a flow)."""

    min_snr_gamma: float | None = None
    """Weight timesteps by min(SNR, gamma) / SNR, or / (SNR + 1) for v-prediction (2303.09556). Not for flows."""
    flow_weighting: Literal["logit_normal", "none", "mode", "sigma_sqrt", "cosmap"] = "logit_normal"
    """Flows only: how timesteps are drawn and weighted (2403.03206). diffusers' Flux script has none by default."""
    flux_guidance: float = 1.0
    """Guidance that a distilled Flux gets in training."""

    def __post_init__(self) -> None:
        positive("loss.min_snr_gamma", 1.0 if self.min_snr_gamma is None else self.min_snr_gamma)


@dataclass(frozen=True, kw_only=True)
class DiffusionOptimConfig:
    """AdamW."""

    lr: float = 1e-4
    """Peak learning rate."""
    mixer_lr: float | None = None
    """Peak learning rate of the mixers; None: lr."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the factors."""
    mixer_weight_decay: float = 0.0
    """Weight decay of the mixers."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate rises linearly."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str):
                at_least(f"optim.{name}", value or 0, 0)


@dataclass(frozen=True, kw_only=True)
class DiffusionTrainConfig:
    """The run, in one process."""

    zero: ClassVar[str] = "none"
    background_save: ClassVar[bool] = False
    keep_every: ClassVar[int] = 0
    output: str = field(default="runs/run", metadata=OUTPUT | FREE)
    """Run folder."""
    steps: int = 500
    """Optimiser steps."""
    batch: int = 1
    """Pictures per forward pass; prior preservation adds as many of the class."""
    accumulation: int = 4
    """Forward passes per optimiser step."""
    precision: Precision = "auto"
    """auto: bf16 on hardware with fast bf16, else fp32. Adapters keep fp32 weights. fp16 needs a GPU."""
    gradient_checkpointing: bool = field(default=False, metadata=ROUNDING)
    """Recompute activations in the backward pass."""
    seed: int = 0
    """Seeds initialisation, order, crops, noise and timesteps."""
    deterministic: bool = field(default=False, metadata=ROUNDING)
    """On a GPU: kernels that always add up in the same order, so that a resumed run gives the same digits."""
    save_every: int = field(default=0, metadata=FREE)
    """Optimiser steps between checkpoints; 0: only the last step is saved."""
    keep_last: int = field(default=2, metadata=FREE)
    """Checkpoints to keep; 0 keeps all."""
    log_every: int = field(default=1, metadata=FREE)
    """Optimiser steps between metric records."""
    timeout_minutes: float = field(default=30.0, metadata=FREE)
    """Time limit of a step and of a save. At the limit the run ends, and the error shows its stacks."""

    @property
    def step_timeout_minutes(self) -> float:
        """See `TrainConfig.step_timeout_minutes`."""
        return self.timeout_minutes

    def __post_init__(self) -> None:
        positive("train.timeout_minutes", self.timeout_minutes)
        for name in ("steps", "batch", "accumulation", "log_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("save_every", "keep_last"):
            at_least(f"train.{name}", getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(YamlRecipe):
    """The complete configuration of a diffusion run."""

    name: str = field(default="diffusion", metadata=FREE)
    """Display name."""
    model: PipelineConfig
    adapter: DiffusionAdapterConfig = field(default_factory=DiffusionAdapterConfig)
    data: PicturesConfig
    loss: DenoisingLossConfig = field(default_factory=DenoisingLossConfig)
    optim: DiffusionOptimConfig = field(default_factory=DiffusionOptimConfig)
    train: DiffusionTrainConfig = field(default_factory=DiffusionTrainConfig)
    track: TrackConfig = field(default_factory=TrackConfig, metadata=FREE)


def load_diffusion_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> DiffusionRecipe:
    """Read a recipe by path or by the name of a shipped recipe; see `mm_moslora.config.load_recipe`."""
    return read_recipe(DiffusionRecipe, name_or_path, overrides, presets=DIFFUSION_RECIPES)
