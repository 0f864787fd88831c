"""Recipes: learning from preferences and rewards.

The objectives are `dpo` (pairs of answers), `kto` (good and bad answers) and `grpo` (rewards of generated answers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mm_moslora.config.recipe_keys import positive, require
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
