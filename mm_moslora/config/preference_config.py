"""Recipes: learning from preferences and rewards, and the settings that TRL's trainers do not follow.

The objectives are `dpo` (pairs of answers), `kto` (good and bad answers) and `grpo` (rewards of generated answers).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from mm_moslora.config.data_config import DataConfig
from mm_moslora.config.model_config import AdapterConfig, ModelConfig
from mm_moslora.config.run_config import OptimConfig, TrackConfig, TrainConfig, ValidateConfig
from mm_moslora.config.value_checks import positive, require
from mm_moslora.utils.errors import suggestion

Objective = Literal["sft", "dpo", "kto", "grpo"]
TRAINERS = {"dpo": "DPOTrainer", "kto": "KTOTrainer", "grpo": "GRPOTrainer"}
"""Objective -> the trainer of TRL that takes the steps."""
LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""Losses of TRL's DPOTrainer."""
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that read `label_smoothing`."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """`objective: dpo`: the loss on a chosen and a rejected answer. The reference is the model as the run begins."""

    beta: float = 0.1
    """Strength of the pull towards the reference: the implicit reward is beta times the log-ratio to it."""
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    """Losses of TRL's DPOTrainer, whose weighted sum is minimised: sigmoid is DPO; with bco_pair and sft it is MPO."""
    loss_weights: list[float] | None = None
    """One weight per loss (MPO: 0.8, 0.2, 1.0); None: 1 each."""
    label_smoothing: float = 0.0
    """robust, aot, aot_unpaired: probability that a pair is the wrong way round, below 0.5. exo_pair: its epsilon, more
    than 0."""

    def __post_init__(self) -> None:
        positive("preference.beta", self.beta)
        require(bool(self.loss_type), f"preference.loss_type is empty, expected any of {', '.join(LOSS_TYPES)}.")
        for name in self.loss_type:
            require(
                name in LOSS_TYPES,
                f"preference.loss_type holds {name!r}, expected any of {', '.join(LOSS_TYPES)}."
                f"{suggestion(name, LOSS_TYPES)}",
            )
        weights = self.loss_weights
        require(
            weights is None or len(weights) == len(self.loss_type),
            f"preference.loss_weights has {len(weights or ())} numbers and preference.loss_type {len(self.loss_type)} "
            "losses, expected one weight per loss.",
        )
        require(
            weights is None or (all(0 <= weight < math.inf for weight in weights) and any(weights)),
            f"preference.loss_weights is {weights}, expected 0 or more, finite, and one above 0.",
        )
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, f"preference.label_smoothing is {smoothing}, expected 0 to below 0.5.")
        require(
            smoothing == 0 or not {*SMOOTHED}.isdisjoint(self.loss_type),
            f"preference.label_smoothing is {smoothing}, which {', '.join(self.loss_type)} does not read. Leave it "
            f"out, or add any of {', '.join(SMOOTHED)} to preference.loss_type.",
        )
        require(
            smoothing > 0 or "exo_pair" not in self.loss_type,
            "preference.label_smoothing is 0, and exo_pair needs more than 0, such as 0.001.",
        )


@dataclass(frozen=True, kw_only=True)
class KtoConfig:
    """`objective: kto`: the loss on single answers that are good or bad. The reference is as for `PreferenceConfig`."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto compares with an estimate of the divergence, from the answers to other questions of a micro-batch."""
    desirable_weight: float = 1.0
    """Of good answers in the loss. Weight times number should not differ much between good and bad answers."""
    undesirable_weight: float = 1.0
    """Of bad answers in the loss."""

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            positive(f"kto.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """`objective: grpo`: the model answers every question several times, and learns from the rewards of its answers."""

    rewards: list[str] = field(default_factory=lambda: ["exact"])
    """Names of `mm_moslora.preferences.rewards.REWARDS`, to which `--import FILE.py` adds."""
    reward_weights: list[float] | None = None
    """One weight per reward; None: 1 each."""
    generations: int = 8
    """Answers to every question; their mean reward is what each of them is compared with."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 1.0
    """Of sampling."""
    beta: float = 0.0
    """Strength of the pull towards the reference, which is as for `PreferenceConfig`; 0: there is none."""
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo"
    """How tokens are averaged: over a step (dapo), over each answer (grpo), over a micro-batch (bnpo), or by
    `max_new_tokens` (dr_grpo)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation by which advantages are divided."""

    def __post_init__(self) -> None:
        require(bool(self.rewards), "grpo.rewards is empty, expected the name of a reward, such as exact.")
        require(len({*self.rewards}) == len(self.rewards), f"grpo.rewards is {self.rewards}: a name stands twice.")
        weights = self.reward_weights
        require(
            weights is None or len(weights) == len(self.rewards),
            f"grpo.reward_weights has {len(weights or ())} numbers and grpo.rewards {len(self.rewards)} names, "
            "expected one weight per reward.",
        )
        require(
            weights is None or (all(map(math.isfinite, weights)) and any(weights)),
            f"grpo.reward_weights is {weights}, expected finite numbers, and one other than 0.",
        )
        require(self.generations >= 2, f"grpo.generations is {self.generations}, expected 2 or more to compare.")
        require(self.max_new_tokens >= 1, f"grpo.max_new_tokens is {self.max_new_tokens}, expected 1 or more.")
        positive("grpo.temperature", self.temperature)
        require(0 <= self.beta < math.inf, f"grpo.beta is {self.beta}, expected 0 or more, and finite.")


_NOT_FOLLOWED = {
    "model": ("attention", "lean_layers", "kernels"),
    "adapter": ("peft", "dropout"),
    "data": ("mixing", "epoch_records", "train_on", "supervise", "cache", "shuffle_buffer"),
    "optim": ("optimizer",),
    "train": ("micro_tokens", "sequence_parallel", "activation_offload", "vision_gradient_checkpointing", "compile",
              "rehearsal"),
    "validate": ("samples", "tasks", "forgetting", "general_text", "best", "patience"),
    "track": ("mixers_every",),
}  # fmt: skip
"""Section -> keys of the project's own training loop."""


def refuse_unfit(
    objective: Objective,
    *,
    model: ModelConfig,
    adapter: AdapterConfig,
    data: DataConfig,
    optim: OptimConfig,
    train: TrainConfig,
    validate: ValidateConfig,
    track: TrackConfig,
    kto: KtoConfig,
    grpo: GrpoConfig,
) -> None:
    """Refuse settings that a trainer of TRL cannot follow, before anything is loaded."""
    sections = {
        "model": model,
        "adapter": adapter,
        "data": data,
        "optim": optim,
        "train": train,
        "validate": validate,
        "track": track,
    }
    changed = [f"{name}.{key}" for name, keys in _NOT_FOLLOWED.items() for key in _changed(sections[name], keys)]
    changed += ["data.pack_tokens"] if data.pack_tokens and objective != "dpo" else []
    changed += [f"data.train.{index}.weight" for index, source in enumerate(data.train) if source.weight != 1]
    require(
        not changed,
        f"{', '.join(changed)} {'is' if len(changed) == 1 else 'are'} set, which objective: {objective} does not "
        f"follow (TRL's {TRAINERS[objective]} trains). Leave it out.",
    )
    for problem in _problems(model, data, train):
        require(False, f"objective is {objective}, and {problem}")
    require(
        objective != "kto" or kto.loss_type != "kto" or train.micro_batch > 1,
        f"objective is kto, and train.micro_batch is {train.micro_batch}: the divergence is estimated from the other "
        "answers of a micro-batch. Set it to 2 or more, or kto.loss_type to apo_zero_unpaired.",
    )
    require(
        objective != "grpo" or train.global_batch % grpo.generations == 0,
        f"objective is grpo, and train.global_batch is {train.global_batch}, which counts answers: expected a multiple "
        f"of grpo.generations ({grpo.generations}).",
    )


def _problems(model: ModelConfig, data: DataConfig, train: TrainConfig) -> Iterator[str]:
    """Values that are impossible with this objective, and what to do."""
    vision = "frozen" if model.vision is None else model.vision.mode
    if model.language_mode != "adapter":
        yield f"{_only_adapters(f'model.language_mode is {model.language_mode}')} Set it to adapter."
    if vision not in ("frozen", "adapter"):
        yield f"{_only_adapters(f'model.vision.mode is {vision}')} Set it to frozen or adapter."
    if model.projector_trains:
        yield f"{_only_adapters('the projector trains')} Set model.projector.mode to frozen, and name its weights."
    if model.vision is not None and model.vision.feature_cache is not None:
        yield "model.vision.feature_cache is set, which TRL's trainer does not read. Leave it out."
    if data.too_long == "truncate":
        yield "data.too_long is truncate: an answer that is cut is another answer. Choose refuse or drop."
    if 0 < data.pack_tokens < 2 * data.max_length:
        yield (
            f"data.pack_tokens is {data.pack_tokens}: a row holds both answers of a pair, of up to data.max_length "
            f"tokens each. Set it to {2 * data.max_length} or more, lower data.max_length, or leave it out."
        )
    if data.endless:
        yield "a source of data.train has streaming without limit. Set limit and limit_by: first."
    if data.order not in ("grouped", "random"):
        yield f"data.order is {data.order}: records are always drawn at random. Leave it out."
    if train.precision == "fp16":
        yield "train.precision is fp16. Choose bf16 or fp32."
    if type(train.gradient_checkpointing) is int:
        yield f"train.gradient_checkpointing is {train.gradient_checkpointing}. Set it to true or false."


def _only_adapters(found: str) -> str:
    return f"{found}: the reference is this model with the adapter of the start, so nothing but adapters may train."


def _changed(section: Any, keys: tuple[str, ...]) -> list[str]:
    """The keys of a section that do not have their default."""
    defaults = {
        item.name: item.default_factory() if item.default_factory is not MISSING else item.default
        for item in fields(section)
    }
    return [key for key in keys if getattr(section, key) != defaults[key]]
