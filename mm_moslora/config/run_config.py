"""Recipes: the optimiser, the run, validation and trackers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mm_moslora.config.recipe_keys import (
    ENGINE,
    FREE,
    NO_NUMBERS,
    OUTPUT,
    OWN_LOOP,
    PATH,
    ROUNDING,
    TASK,
    at_least,
    require,
)
from mm_moslora.utils.errors import suggestion

OptimizerName = Literal["adamw", "adamw_8bit", "muon"]

_BLOCKS = 2 * 4 / 256
"""Bytes of the largest value of every block, of two states: a block has 256 values."""


@dataclass(frozen=True, kw_only=True)
class OptimizerTraits:
    """What is known of an optimiser without importing it."""

    state_bytes: float
    """Of its state, per trained value; masters are not counted."""
    package: str = ""
    """Distribution that has it, and its name for imports; empty: torch."""
    whole_because: str = ""
    """Why it cannot step the flat parts of parameters that ZeRO-1 to 3 give a rank; empty: it can."""


OPTIMIZERS: dict[str, OptimizerTraits] = {
    "adamw": OptimizerTraits(state_bytes=8),
    "adamw_8bit": OptimizerTraits(
        state_bytes=2 + _BLOCKS, package="bitsandbytes",
        whole_because="its blocks are of whole parameters, so that any number of ranks reads a checkpoint",
    ),
    "muon": OptimizerTraits(
        state_bytes=4, whole_because="it orthogonalises whole matrices",
    ),
}  # fmt: skip
"""`optim.optimizer`; the names are those of transformers' `optim`, where it has one."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser, one learning rate per kind of parameter, linear warm-up."""

    optimizer: OptimizerName = field(default="adamw", metadata=OWN_LOOP)
    """adamw_8bit: bitsandbytes, moments in 8 bits. muon: weights of linear layers by Muon, all else by AdamW."""
    lr: float = 2e-4
    """Peak learning rate of adapter factors A and B (and of fully trained language layers)."""
    mixer_lr: float | None = None
    """Peak learning rate of the mixers; None: mixer_factor times that of A."""
    mixer_factor: float = 1.0
    """Learning rate of the mixers divided by that of A (lr; in the encoder vision_lr), which it follows through a grid
    of rates, as mixer_lr does not."""
    projector_lr: float | None = None
    """Peak learning rate of the projector; None: lr."""
    vision_lr: float | None = None
    """Peak learning rate of trained vision layers and of adapters in the encoder; None: lr."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B divided by that of A (LoRA+, 2402.12354)."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never applied to biases and norms."""
    mixer_weight_decay: float = 0.0
    """Weight decay of the mixers."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moving averages; Muon itself has a momentum of 0.95."""
    eps: float = 1e-8
    """Adam's epsilon; Muon itself has torch's."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up, down to min_lr_ratio."""
    warmup: float = 0.03
    """Below 1: share of all steps; 1 or more: number of steps."""
    min_lr_ratio: float = 0.0
    """Last learning rate divided by the peak."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name in ("lr", "mixer_lr", "projector_lr", "vision_lr"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"optim.{name} is {value}, expected 0 or more.")
        for name in ("weight_decay", "mixer_weight_decay", "warmup", "max_grad_norm"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        require(self.eps > 0, f"optim.eps is {self.eps}, expected more than 0.")
        require(
            all(0 <= beta < 1 for beta in self.betas), f"optim.betas is {self.betas}, expected two numbers from 0 to 1."
        )
        require(
            self.optimizer in OPTIMIZERS,
            f"optim.optimizer is {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}."
            f"{suggestion(self.optimizer, OPTIMIZERS)}",
        )
        require(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio is {self.min_lr_ratio}, expected 0 to 1.")
        require(self.lora_plus_ratio > 0, f"optim.lora_plus_ratio is {self.lora_plus_ratio}, expected more than 0.")
        factor = self.mixer_factor
        require(0 < factor < math.inf, f"optim.mixer_factor is {factor}, expected a finite number of more than 0.")
        require(
            self.mixer_lr is None or factor == 1,
            f"optim.mixer_lr {self.mixer_lr} and optim.mixer_factor {factor:g} both set the rate of the mixers. Set "
            "one.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    output: str = field(default="runs/run", metadata=OUTPUT | FREE | NO_NUMBERS)
    """Run folder."""
    epochs: float = 1.0
    """Passes over the training data; ignored when steps is set."""
    steps: int | None = None
    """Optimiser steps; None: computed from epochs."""
    global_batch: int = 16
    """Examples per optimiser step, over all ranks and accumulation."""
    micro_batch: int = field(default=4, metadata=ROUNDING)
    """Most examples per forward pass and rank."""
    micro_tokens: int | None = field(default=None, metadata=ROUNDING | OWN_LOOP)
    """Most tokens per forward pass and rank, at least data.max_length (data.pack_tokens of packed rows). A step is cut
    into as many micro-batches as this takes. None: on a GPU as many as surely fit into its memory, by the estimate of
    `plan`; on a CPU any number."""
    zero: str = field(default="auto", metadata=ENGINE | ROUNDING)
    """DeepSpeed preset (zero0, zero1, zero2, zero3, ...), path of a DeepSpeed JSON file, or `none` for plain torch.
    auto: zero0 where optim.optimizer is another than adamw; zero1, which reduces gradients once in a step, where
    adapters train and ranks take several micro-batches in a step; else zero2. A resumed run keeps its stage."""
    sequence_parallel: int = field(default=1, metadata=ROUNDING | OWN_LOOP)
    """Ranks that compute every packed row together, each a part of its tokens (DeepSpeed's Ulysses): for examples too
    long for one GPU. A divisor of the number of ranks and of the attention heads."""
    precision: Precision = "auto"
    """auto: bf16 on hardware with fast bf16, else fp32."""
    gradient_checkpointing: bool | int = field(default=False, metadata=ROUNDING)
    """Recompute activations in the language model's backward pass: true in all decoder layers, a number in so many from
    the first."""
    vision_gradient_checkpointing: bool = field(default=False, metadata=OWN_LOOP)
    """Recompute activations in the vision encoder's backward pass; pays only when the encoder trains."""
    activation_offload: bool = field(default=False, metadata=ROUNDING | OWN_LOOP)
    """Keep the inputs of checkpointed layers in pinned main memory until the backward pass: for micro-batches of very
    many tokens. No use on a CPU."""
    compile: str | None = field(default=None, metadata=ROUNDING | OWN_LOOP)
    """Backend of torch.compile for decoder layers (inductor). Of lean layers the operators between the matrix products
    are compiled, of all others the whole layer. None: no compilation. Works with gradient_checkpointing, not with
    ZeRO-3."""
    seed: int = 0
    """Seeds initialisation, data order and dropout."""
    deterministic: bool = field(default=False, metadata=ROUNDING)
    """On a GPU: kernels that always add up in the same order, so that a repeated or resumed run gives the same digits.
    Slower; an operator without such a kernel is an error that names it. CPUs do so anyway."""
    save_every: int = field(default=0, metadata=FREE)
    """Optimiser steps between checkpoints; 0: only the last step is saved."""
    keep_last: int = field(default=2, metadata=FREE)
    """Checkpoints to keep; older ones are deleted once a newer one is verified. 0 keeps all."""
    keep_every: int = field(default=0, metadata=FREE)
    """Also keep the checkpoint of every step that is a multiple of this; 0: none."""
    background_save: bool = field(default=True, metadata=FREE)
    """Write checkpoints in the background, from a copy in main memory."""
    rehearsal: bool = field(default=True, metadata=FREE | OWN_LOOP)
    """Before the first step: run the largest micro-batch, and write a trial checkpoint."""
    validate_every: int = field(default=0, metadata=FREE)
    """Optimiser steps between validations; 0: only at the end."""
    log_every: int = field(default=1, metadata=FREE)
    """Optimiser steps between metric records."""
    max_skipped_steps: int = 5
    """Stop after this many consecutive steps with a loss or gradient that is not finite."""
    timeout_minutes: float = field(default=30.0, metadata=FREE)
    """Time limit of a collective operation between ranks, of the first step, and of a save or a validation."""
    step_timeout_minutes: float = field(default=10.0, metadata=FREE)
    """Time limit of one optimiser step after the first. At the limit the run ends, and the error names the rank that
    hangs and shows its stacks."""

    def __post_init__(self) -> None:
        at_least("train.global_batch", self.global_batch, 1)
        at_least("train.micro_batch", self.micro_batch, 1)
        at_least("train.sequence_parallel", self.sequence_parallel, 1)
        require(
            self.sequence_parallel == 1 or self.zero != "none",
            f"train.sequence_parallel is {self.sequence_parallel}, and train.zero none is plain torch in one process. "
            "Set train.zero to zero2 or zero3.",
        )
        at_least("train.gradient_checkpointing", self.gradient_checkpointing, 0)
        require(
            bool(not self.activation_offload or self.gradient_checkpointing or self.vision_gradient_checkpointing),
            "train.activation_offload moves the inputs of checkpointed layers to main memory, and no layer is "
            "checkpointed. Set train.gradient_checkpointing to true, or leave it out.",
        )
        below = self.global_batch // self.micro_batch * self.micro_batch
        require(
            below == self.global_batch,
            f"train.global_batch is {self.global_batch}, expected a multiple of train.micro_batch "
            f"({self.micro_batch}), such as {f'{below} or ' if below else ''}{below + self.micro_batch}.",
        )
        require(self.steps is None or self.steps >= 1, f"train.steps is {self.steps}, expected 1 or more.")
        require(self.epochs > 0, f"train.epochs is {self.epochs}, expected more than 0.")
        for name in ("timeout_minutes", "step_timeout_minutes"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}, expected more than 0.")
        for name in ("keep_last", "keep_every", "save_every", "validate_every"):
            at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("log_every", "max_skipped_steps"):
            at_least(f"train.{name}", getattr(self, name), 1)

    def total_steps(self, per_epoch: float) -> int:
        """Optimiser steps of the run."""
        return self.steps or max(1, math.ceil(round(per_epoch * self.epochs, 6)))


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Measurements every `train.validate_every` steps, besides the held-out loss."""

    samples: int = field(default=0, metadata=OWN_LOOP)
    """Number of held-out records (data.validation) for which answers are generated and kept with their images."""
    sample_tokens: int = 64
    """Longest generated answer, tokens."""
    tasks: list[str] = field(default_factory=list, metadata=TASK | OWN_LOOP)
    """Tasks and groups of the evaluation package, as for `mm-moslora eval run`; each task gives metrics named
    `eval/TASK/METRIC`."""
    task_limit: int = 64
    """Documents per task; 0: all."""
    forgetting: Literal["auto", "always", "never"] = field(default="auto", metadata=OWN_LOOP)
    """Compare the model before the first step and at the end: on `general_text` and on `tasks`. auto: what takes less
    than a tenth of the run, as measured by one batch."""
    general_text: str | None = field(default=None, metadata=PATH | OWN_LOOP)
    """Text whose log-likelihood shows forgetting: a `.txt` file with empty lines between its documents, or records.
    None: a short English text that comes with the package."""
    best: str | None = field(default=None, metadata=OWN_LOOP)
    """Metric that chooses the best checkpoint, which is kept: validation_loss, or eval/TASK/METRIC."""
    best_is: Literal["auto", "lowest", "highest"] = "auto"
    """auto: lowest for losses and perplexities, highest for all others."""
    patience: int = field(default=0, metadata=OWN_LOOP)
    """Stop after this many consecutive validations without a better `best`; 0: never."""

    def __post_init__(self) -> None:
        for name in ("samples", "task_limit", "patience"):
            at_least(f"validate.{name}", getattr(self, name), 0)
        at_least("validate.sample_tokens", self.sample_tokens, 1)
        require(
            self.patience == 0 or self.best is not None,
            f"validate.patience is {self.patience}, but validate.best names no metric. Set it: validation_loss.",
        )


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Trackers that a recipe may name; each is also the name of its Python package."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Trackers that get the metrics; metrics.jsonl is always written."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Any of tensorboard, wandb, trackio, mlflow."""
    project: str | None = None
    """Project, or MLflow's experiment; None: the tracker's environment variable (WANDB_PROJECT,
    MLFLOW_EXPERIMENT_NAME), else mm_moslora."""
    entity: str | None = None
    """wandb entity; None: WANDB_ENTITY, else the account's own."""
    name: str | None = None
    """Run name; None: WANDB_NAME, else the run folder's name with its parent's."""
    group: str | None = None
    """Group of runs, such as the seeds of one setting; None: WANDB_RUN_GROUP."""
    job_type: str | None = None
    """Role of the run within its group; None: WANDB_JOB_TYPE."""
    notes: str | None = None
    """Longer description; None: WANDB_NOTES."""
    tags: list[str] = field(default_factory=list)
    """Short labels for searching; empty: WANDB_TAGS."""
    mixers_every: int = field(default=0, metadata=OWN_LOOP)
    """Steps between records of what the adapter learned (`mixer/...`, see docs/adapters.md), besides those at
    `train.save_every` and at the end; 0: only those."""

    def __post_init__(self) -> None:
        at_least("track.mixers_every", self.mixers_every, 0)
        for name in self.trackers:
            require(
                name in TRACKERS,
                f"track.trackers holds {name!r}, expected any of {', '.join(TRACKERS)}.{suggestion(name, TRACKERS)} "
                "metrics.jsonl needs no entry: it is always written.",
            )
