"""The whole recipe, and what its sections ask of each other."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import yaml

from mm_moslora.config.data_config import DataConfig
from mm_moslora.config.model_config import AdapterConfig, ModelConfig
from mm_moslora.config.preference_config import TRAINERS, GrpoConfig, KtoConfig, Objective, PreferenceConfig
from mm_moslora.config.recipe_keys import (
    FREE,
    NO_NUMBERS,
    Facts,
    changed_keys,
    facts_at,
    kind_at,
    leaves,
    plain,
    require,
)
from mm_moslora.config.run_config import OPTIMIZERS, OptimConfig, TrackConfig, TrainConfig, ValidateConfig
from mm_moslora.config.usual_names import OF_OTHER_TRAINERS
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_data import build_strictly, parse_yaml


@dataclass(frozen=True, kw_only=True)
class YamlRecipe:
    """Base of recipe dataclasses: reading from YAML and plain data, and writing back."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default filled in."""
        return typing.cast(dict[str, Any], plain(self))

    def values(self, *, without: Facts) -> dict[str, Any]:
        """The values by dotted key, without the keys that have a fact."""
        found = leaves(self.to_dict())
        return {key: value for key, value in found.items() if not without.items() <= facts_at(type(self), key).items()}

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `from_yaml` reads it back equal."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "recipe") -> Self:
        """Build a recipe from plain data.

        Raises:
            ConfigError: an unknown key, a wrong type or an impossible value.
        """
        for path in leaves(data):
            here = OF_OTHER_TRAINERS.get(path.rpartition(".")[2])
            if here and kind_at(cls, path.split(".")) is None and kind_at(cls, here.split(".")) is not None:
                raise ConfigError(f"{source}: unknown key {path!r}. Did you mean {here!r}?")
        return build_strictly(cls, _at_home(data), source=source)

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "recipe") -> Self:
        """Build a recipe from YAML text; see `from_dict`."""
        return cls.from_dict(parse_yaml(text, source=source), source=source)


@dataclass(frozen=True, kw_only=True)
class Recipe(YamlRecipe):
    """The complete configuration of a run."""

    name: str = field(default="run", metadata=FREE)
    """Display name."""
    objective: Objective = "sft"
    """sft: learn the answers of records. With TRL: dpo from pairs of a chosen and a rejected answer (see `preference`),
    kto from good and bad answers (see `kto`), grpo from rewards of generated answers (see `grpo`)."""
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig, metadata={"objective": "dpo"})
    """objective dpo only."""
    kto: KtoConfig = field(default_factory=KtoConfig, metadata={"objective": "kto"})
    """objective kto only."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig, metadata={"objective": "grpo"})
    """objective grpo only."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig, metadata=FREE)
    track: TrackConfig = field(default_factory=TrackConfig, metadata=FREE | NO_NUMBERS)

    def __post_init__(self) -> None:
        for item in fields(self):
            objective, value = item.metadata.get("objective", self.objective), getattr(self, item.name)
            require(
                objective == self.objective or value == type(value)(),
                f"{item.name} is set, which only objective: {objective} reads. Set the objective, or leave it out.",
            )
        if self.objective != "sft":
            _refuse_unfit(self)
        model, adapter = self.model, self.adapter
        vision_trains = model.vision is not None and model.vision.mode != "frozen"
        require(
            model.language_mode != "frozen" or vision_trains or model.projector_trains,
            "Nothing would train: the language model, the vision encoder and the projector are all frozen. Set "
            "model.language_mode, model.vision.mode or model.projector.mode.",
        )
        mixers = model.has_adapters and not adapter.peft and adapter.factor_form != "mixed" and adapter.mixer_trainable
        require(
            self.optim.mixer_factor == 1 or mixers,
            f"optim.mixer_factor is {self.optim.mixer_factor:g}, which is of the mixers, and none trains. Leave it "
            "out, or set adapter.mixer_trainable.",
        )
        require(
            self.train.compile is None or self.model.kernels not in ("triton", "liger"),
            f"model.kernels is {self.model.kernels!r} and train.compile is {self.train.compile!r}: both would run "
            "between the matrix products of lean layers. Leave train.compile out, or set model.kernels to auto.",
        )
        require(
            self.data.train_on == "answers" or (self.model.vision is None and self.model.vlm is None),
            f"data.train_on is {self.data.train_on!r} and {'model.vlm' if self.model.vlm else 'model.vision'} is set: "
            "no loss can be on pictures. Leave data.train_on out.",
        )
        require(
            not self.data.endless or self.train.steps is not None,
            "a source of data.train has streaming without limit, so it has no end: set train.steps.",
        )
        budget, longest = self.train.micro_tokens, self.data.longest
        require(
            budget is None or budget >= longest,
            f"train.micro_tokens is {budget}, expected at least {self.data.longest_key} ({longest}): an example, or a "
            "packed row, is never cut. Raise it, lower the other, or leave it out.",
        )

    def for_ranks(self, world: int, *, before: str | None = None) -> Recipe:
        """The recipe with the preset that `train.zero: auto` chooses.

        Args:
            before: the preset of the checkpoint that the run continues; None: it starts. Plain torch, which runs one
                process, is not continued on several.
        """
        train = self.train
        if train.zero != "auto":
            return self
        takers = world // train.sequence_parallel
        several = train.micro_tokens is not None or train.global_batch > train.micro_batch * takers
        small = self.model.language_mode in ("adapter", "frozen")  # ZeRO-1 keeps all gradients on every rank
        earlier = None if before == "none" and world > 1 else before
        whole = bool(OPTIMIZERS[self.optim.optimizer].whole_because)
        chosen = earlier or ("zero0" if whole else "zero1" if several and small else "zero2")
        return replace(self, train=replace(train, zero=chosen))


def _refuse_unfit(recipe: Recipe) -> None:
    """Refuse settings that a trainer of TRL cannot follow."""
    objective = recipe.objective
    idle = [key for key, facts in changed_keys(recipe) if "trl" in facts and facts["trl"] != objective]
    require(
        not idle,
        f"{', '.join(idle)} {'is' if len(idle) == 1 else 'are'} set, which objective: {objective} does not follow "
        f"(TRL's {TRAINERS[objective]} trains). Leave it out.",
    )
    for problem in _problems(recipe):
        raise ConfigError(f"objective is {objective}, and {problem}")


def _problems(recipe: Recipe) -> Iterator[str]:
    """Values that are impossible with an objective of TRL, and what to do."""
    model, data, train = recipe.model, recipe.data, recipe.train
    vision = "frozen" if model.vision is None else model.vision.mode
    if model.language_mode != "adapter":
        yield f"{_only_adapters(f'model.language_mode is {model.language_mode}')} Set it to adapter."
    if vision not in ("frozen", "adapter"):
        yield f"{_only_adapters(f'model.vision.mode is {vision}')} Set it to frozen or adapter."
    if model.projector_trains:
        yield f"{_only_adapters('the projector trains')} Set model.projector.mode to frozen, and name its weights."
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
    if recipe.objective == "kto" and recipe.kto.loss_type == "kto" and train.micro_batch == 1:
        yield (
            "train.micro_batch is 1: the divergence is estimated from the other answers of a micro-batch. Set it to 2 "
            "or more, or kto.loss_type to apo_zero_unpaired."
        )
    if recipe.objective == "grpo" and train.global_batch % recipe.grpo.generations:
        yield (
            f"train.global_batch is {train.global_batch}, which counts answers: expected a multiple of "
            f"grpo.generations ({recipe.grpo.generations})."
        )


def _only_adapters(found: str) -> str:
    return f"{found}: the reference is this model with the adapter of the start, so nothing but adapters may train."


def require_sft(recipe: Recipe, verb: str) -> None:
    """Refuse a recipe that learns from preferences, for a verb that is about tuning."""
    require(
        recipe.objective == "sft",
        f"`{verb}` takes recipes with objective: sft, and objective is {recipe.objective}. What it would say holds for "
        "tuning alone.",
    )


def _at_home(data: Any) -> Any:
    """Plain data with a leading `~` expanded to the home folder."""
    if isinstance(data, str) and data.startswith("~/"):
        return str(Path(data).expanduser())
    if isinstance(data, Mapping):
        return {key: _at_home(item) for key, item in data.items()}
    return [_at_home(item) for item in data] if isinstance(data, list) else data
