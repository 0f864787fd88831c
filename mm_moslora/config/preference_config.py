"""Recipes: learning from preferences (`objective: dpo`), and the settings that its trainer does not follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from mm_moslora.config.data_config import DataConfig
from mm_moslora.config.model_config import AdapterConfig, ModelConfig
from mm_moslora.config.run_config import OptimConfig, TrainConfig, ValidateConfig
from mm_moslora.config.value_checks import require
from mm_moslora.utils.errors import suggestion

Objective = Literal["sft", "dpo"]
LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""Losses of TRL's DPOTrainer."""


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
    """robust: probability that a pair is the wrong way round, below 0.5. exo_pair: its epsilon, more than 0."""

    def __post_init__(self) -> None:
        require(self.beta > 0, f"preference.beta is {self.beta}, expected more than 0.")
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
            weights is None or (min(weights) >= 0 and max(weights) > 0),
            f"preference.loss_weights is {weights}, expected 0 or more, and one above 0.",
        )
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, f"preference.label_smoothing is {smoothing}, expected 0 to below 0.5.")
        require(
            smoothing > 0 or "exo_pair" not in self.loss_type,
            "preference.label_smoothing is 0, and exo_pair needs more than 0, such as 0.001.",
        )


_NOT_FOLLOWED = {
    "model": ("quantisation", "attention", "lean_layers", "kernels"),
    "adapter": ("peft", "dropout"),
    "data": ("mixing", "epoch_records", "train_on", "supervise", "cache", "shuffle_buffer", "pack_tokens"),
    "optim": ("optimizer",),
    "train": ("micro_tokens", "sequence_parallel", "activation_offload", "vision_gradient_checkpointing", "compile"),
    "validate": ("samples", "tasks", "forgetting", "general_text", "best", "patience"),
}  # fmt: skip
"""Section -> keys of the project's own training loop."""


def refuse_unfit(
    *,
    model: ModelConfig,
    adapter: AdapterConfig,
    data: DataConfig,
    optim: OptimConfig,
    train: TrainConfig,
    validate: ValidateConfig,
) -> None:
    """Refuse settings that learning from preferences cannot follow, before anything is loaded.

    Args:
        model: section of the recipe, as are the others.
        adapter: see `model`.
        data: see `model`.
        optim: see `model`.
        train: see `model`.
        validate: see `model`.

    Raises:
        ConfigError: names the key and what to do.
    """
    sections = {"model": model, "adapter": adapter, "data": data, "optim": optim, "train": train, "validate": validate}
    changed = [f"{name}.{key}" for name, keys in _NOT_FOLLOWED.items() for key in _changed(sections[name], keys)]
    changed += [f"data.train.{index}.weight" for index, source in enumerate(data.train) if source.weight != 1]
    require(
        not changed,
        f"{', '.join(changed)} {'is' if len(changed) == 1 else 'are'} set, which objective: dpo does not follow "
        "(TRL's DPOTrainer trains). Leave it out.",
    )
    for problem in _problems(model, data, train):
        require(False, f"objective is dpo, and {problem}")


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
        yield "data.too_long is truncate: a pair whose answers are cut compares nothing. Choose refuse or drop."
    if data.endless:
        yield "a source of data.train has streaming without limit. Set limit and limit_by: first."
    if data.order not in ("grouped", "random"):
        yield f"data.order is {data.order}: pairs are always drawn at random. Leave it out."
    if train.zero not in ("auto", "none"):
        yield f"train.zero is {train.zero}: adapters are trained data-parallel, without DeepSpeed. Leave it out."
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
