"""Parameter groups, each with its own learning rate."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mm_moslora.adapters.mixer import Mixer
from mm_moslora.adapters.tree import is_adapter_parameter
from mm_moslora.config import OptimConfig
from mm_moslora.models.vlm import part_of
from mm_moslora.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    """adapter, mixer, projector, vision, vision mixer or language; biases and norms get the suffix `/no_decay`, and
    what Muon leaves to AdamW gets `/adamw`."""
    peak_lr: float
    """Learning rate at the end of the warm-up."""
    weight_decay: float
    """Decoupled weight decay."""
    names: tuple[str, ...]
    """Parameter names, in the model's order."""
    parameters: tuple[nn.Parameter, ...]
    """The parameters, in the order of `names`."""
    matrices: bool = False
    """Whether they are the weights of linear layers; set for Muon alone."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The recipe's settings for the optimiser and clipping."""

    name: str = "adamw"
    """The recipe's `optim.optimizer`."""
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float

    @classmethod
    def of(cls, config: OptimConfig) -> OptimizerSettings:
        """Those of a recipe."""
        return cls(name=config.optimizer, betas=config.betas, eps=config.eps, max_grad_norm=config.max_grad_norm)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[ParameterGroup]:
    """Sort the trainable parameters into groups.

    Raises:
        ConfigError: no parameter is trainable, or there is a rate for B or for mixers, and an adapter without them.
    """
    sorted_in: dict[tuple[str, float, float, bool], list[tuple[str, nn.Parameter]]] = {}
    linear = _linear_weights(model) if config.optimizer == "muon" else set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            label, lr, decay = _group_of(name, parameter, config)
            matrices = id(parameter) in linear
            label += "/adamw" if config.optimizer == "muon" and not matrices else ""
            sorted_in.setdefault((label, lr, decay, matrices), []).append((name, parameter))
    if not sorted_in:
        raise ConfigError("The model has no trainable parameter.")
    adapters = [name for members in sorted_in.values() for name, _ in members if is_adapter_parameter(name)]
    rates = {
        "lora_plus_ratio": (config.lora_plus_ratio, _is_lora_b, "of LoRA's B, and the adapter trains none"),
        "mixer_factor": (config.mixer_factor, _is_mixer, "of the mixers, and no layer has one that trains"),
    }
    for key, (factor, is_part, what) in rates.items():
        if factor != 1.0 and adapters and not any(map(is_part, adapters)):
            raise ConfigError(f"optim.{key} is {factor:g}, which is {what}. Leave it out.")
    return [
        ParameterGroup(
            name=label, peak_lr=lr, weight_decay=decay, matrices=matrices,
            names=tuple(name for name, _ in members), parameters=tuple(parameter for _, parameter in members),
        )
        for (label, lr, decay, matrices), members in sorted_in.items()
    ]  # fmt: skip


def _linear_weights(model: nn.Module) -> set[int]:
    """Ids of the weights of linear layers, which map hidden features to others; A, B and mixers are such layers."""
    # Other tensors of two dimensions have a row for each token, place or expert, or hold several matrices beside each
    # other.
    linear, others = set(), set[int]()
    for module in model.modules():
        inside: list[nn.Module | None] = []
        if isinstance(module, nn.Linear | Conv1D | nn.MultiheadAttention | Mixer):
            linear |= {id(parameter) for parameter in module.parameters(recurse=False) if parameter.ndim == 2}
        elif isinstance(module, nn.Embedding):
            inside.append(module)
        elif isinstance(module, ParamWrapper):
            inside += [module.lora_A, module.lora_B]
        elif isinstance(module, PreTrainedModel):
            inside.append(module.get_output_embeddings())
            with suppress(NotImplementedError):  # some towers name none
                inside.append(module.get_input_embeddings())
        others |= {id(parameter) for part in inside if part is not None for parameter in part.parameters()}
    return linear - others


def _group_of(name: str, parameter: nn.Parameter, config: OptimConfig) -> tuple[str, float, float]:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    is_bias = "bias" in name.rpartition(".")[2].split("_")  # experts have several, ``[E, D]``
    decay = config.weight_decay if len(shape) > 1 and not is_bias else 0.0
    part = part_of(name)
    if part == "projector" and not is_adapter_parameter(name):
        label, lr = "projector", _or(config.projector_lr, config.lr)
    elif part != "language":  # adapters of a projector inside the tower count as the tower's
        label, lr = "vision", _or(config.vision_lr, config.lr)
    else:
        label, lr = "adapter" if is_adapter_parameter(name) else "language", config.lr
    if _is_mixer(name):
        # The scale of the initial mixer matters, and weight decay shrinks it, so it is a key of its own.
        label = "mixer" if label == "adapter" else f"{label} mixer"
        return label, _or(config.mixer_lr, lr * config.mixer_factor), config.mixer_weight_decay
    if _is_lora_b(name) and config.lora_plus_ratio != 1.0:
        label, lr = f"{label} B", lr * config.lora_plus_ratio
    return (label if decay == config.weight_decay else f"{label}/no_decay"), lr, decay


def _is_mixer(name: str) -> bool:
    return "lora_mixer" in name


def _is_lora_b(name: str) -> bool:
    """Whether a parameter is LoRA's B, of an embedding, too."""
    return "lora_B" in name or "lora_embedding_B" in name


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
