"""What trains: adapters in the components that ask for them, whole components, last blocks; and a table of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mm_moslora import adapters
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.layers.base_weights import stop_repacking
from mm_moslora.config import AdapterConfig, ModelConfig
from mm_moslora.models.assembly import Parts
from mm_moslora.models.pretrained_vlm import decoder_path, tower_path
from mm_moslora.models.transformers_patches import wrap_checkpointing
from mm_moslora.models.vision.vision_tower import FusedVisionModel
from mm_moslora.models.vlm import is_multimodal, part_of
from mm_moslora.utils.errors import ConfigError, suggestion
from mm_moslora.utils.run_paths import adapter_folder
from mm_moslora.utils.untrusted_data import read_value


def attach_adapters(
    assembly: Parts, config: ModelConfig, adapter: AdapterConfig, *, seed: int = 0
) -> peft.PeftModel | None:
    """Put the adapter into the components with the mode `adapter`, and set what trains everywhere else.

    Args:
        seed: seeds the factors, so that every rank makes the same.

    Returns:
        The PEFT model, or None where no component carries adapters.
    """
    components = adapted_components(assembly.model, config)
    assembly.model.requires_grad_(False)
    stop_repacking(assembly.model)
    if components:
        # Not of all GPUs, on each of which this rank would open a context.
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(seed)
            # Factors live in the base's dtype; the engine keeps fp32 masters. PEFT's fp32 copies under a bf16 base cost
            # a third of the step.
            if adapter.peft:
                assembly.peft_model = adapters.add_method(
                    assembly.model, method_config(adapter), component=components, targets=adapter.targets
                )
            elif adapter.weights is not None:
                with warnings.catch_warnings():
                    # Under ZeRO-3 rank 0 has the values, and every weight of the other ranks would get a warning.
                    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
                    assembly.peft_model = adapters.load_adapter(
                        assembly.model, start_folder(adapter), trainable=True, autocast_adapter_dtype=False
                    )
            else:
                assembly.peft_model = adapters.add_moslora(
                    assembly.model,
                    moslora_config(adapter),
                    component=components,
                    targets=adapter.targets,
                    autocast_adapter_dtype=False,
                )
    _set_trainable(assembly, config)
    return assembly.peft_model


def start_folder(adapter: AdapterConfig) -> Path:
    """The adapter that `adapter.weights` names.

    Raises:
        AdapterError: it cannot be read.
        ConfigError: the recipe says what the run is, and the folder says otherwise.
    """
    assert adapter.weights is not None
    folder = adapter_folder(adapter.weights)
    stored = read_folder(folder, trainable=True).config
    if (stored.r, float(stored.lora_alpha)) != (adapter.rank, float(adapter.alpha)):
        raise ConfigError(
            f"adapter.weights: {folder} has rank {stored.r} and alpha {stored.lora_alpha:g}, but the recipe "
            f"says {adapter.rank} and {adapter.alpha:g}. Give adapter.rank and adapter.alpha the folder's numbers."
        )
    return folder


def adapted_components(model: PreTrainedModel, config: ModelConfig) -> list[str]:
    """Module paths of the components that carry adapters; "" is the whole language model."""
    if not is_multimodal(model):
        return [""] if config.language_mode == "adapter" else []
    paths = [decoder_path(model)] if config.language_mode == "adapter" else []
    if config.vision is not None and config.vision.mode == "adapter":
        paths.append(tower_path(model))
    return paths


def moslora_config(adapter: AdapterConfig, **more: Any) -> adapters.MoSLoRAConfig:
    """The PEFT configuration of a recipe's adapter, with more fields; the task type is that of a language model unless
    they name one."""
    return adapters.MoSLoRAConfig(
        r=adapter.rank,
        lora_alpha=cast(int, adapter.alpha),
        lora_dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        mixer_init=adapter.mixer_init,
        mixer_trainable=adapter.mixer_trainable,
        mixer_pattern=dict(adapter.mixer_pattern),
        factor_form=adapter.factor_form,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        **({"task_type": "CAUSAL_LM"} | more),
    )


def adapter_config(adapter: AdapterConfig) -> peft.PeftConfig:
    """The PEFT configuration of a recipe's adapter, MoSLoRA or another method.

    Raises:
        AdapterError: an impossible value.
        ConfigError: see `method_config`.
    """
    return method_config(adapter) if adapter.peft else moslora_config(adapter)


def method_config(adapter: AdapterConfig) -> peft.PeftConfig:
    """The PEFT configuration of the method that `adapter.peft` names.

    Raises:
        AdapterError: see `adapters.method_named` and `adapters.method_config`.
        ConfigError: the method has no such option, or the option is of another type.
    """
    method = adapters.method_named(adapter.peft["type"])
    fields, options = method.options, {key: value for key, value in adapter.peft.items() if key != "type"}
    for key in options:
        if key not in fields:
            raise ConfigError(
                f"adapter.peft.{key}: PEFT's {method.name} has no such option.{suggestion(key, fields)} It has: "
                f"{', '.join(fields)}."
            )
    values = {
        key: read_value(fields[key], value, source=f"PEFT's {method.name}", where=f"adapter.peft.{key}")
        for key, value in options.items()
    }
    return adapters.method_config(method, values, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout)


def _set_trainable(assembly: Parts, config: ModelConfig) -> None:
    model = assembly.model
    language = model.get_submodule(decoder_path(model)) if is_multimodal(model) else model
    _train_component(language, config.language_mode, config.language_last_n, what="model.language")
    if config.language_mode == "full" and (head := model.get_output_embeddings()) is not None:
        head.requires_grad_(True)  # lies beside the decoder of a vision-language model
    if is_multimodal(model):
        if config.vision is not None and config.vision.mode in ("full", "last_n"):
            tower = model.get_submodule(tower_path(model))
            _train_component(tower, config.vision.mode, config.vision.last_n, what="model.vision")
        for name, parameter in model.named_parameters():  # some projectors lie inside their towers
            if part_of(name) == "projector" and not adapters.is_adapter_parameter(name):
                parameter.requires_grad_(config.projector_trains)


def _train_component(component: nn.Module, mode: str, last_n: int, *, what: str) -> None:
    if mode == "full":
        component.requires_grad_(True)
    elif mode == "last_n":
        for part in component.towers if isinstance(component, FusedVisionModel) else [component]:
            lists = [list(module) for module in part.modules() if isinstance(module, nn.ModuleList)]
            if not lists:
                raise ConfigError("last_n needs a component with a list of blocks; this one has none. Use mode full.")
            blocks = max(lists, key=len)
            if last_n > len(blocks):
                raise ConfigError(f"{what}: last_n is {last_n}, but it has {len(blocks)} blocks.")
            for block in blocks[-last_n:]:
                block.requires_grad_(True)


def checkpoint_layers(component: PreTrainedModel, first: int | None = None) -> None:
    """Keep the inputs of a component's layers alone; the backward pass runs each layer again.

    Args:
        first: so many layers from the first, which the backward pass recomputes when all others are freed; None: all.

    Raises:
        ConfigError: see `refuse_checkpointing`.
    """
    layers = [module for module in component.modules() if isinstance(module, GradientCheckpointingLayer)]
    refuse_checkpointing(component, first, layers=len(layers))
    component.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers[first:] if first is not None else ():
        layer.gradient_checkpointing = False


def refuse_checkpointing(component: PreTrainedModel, first: int | None = None, *, layers: int) -> None:
    """Refuse to checkpoint a component that cannot be, also on the meta device, or more layers than it has."""
    if not component.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(component).__name__} has no gradient checkpointing. Leave train.gradient_checkpointing or "
            "train.vision_gradient_checkpointing off for it."
        )
    if first is not None and first > layers:
        raise ConfigError(
            f"train.gradient_checkpointing is {first}, but {type(component).__name__} has {layers} layers. Give "
            "fewer, or true for all."
        )


def offload_inputs(component: PreTrainedModel) -> None:
    """Keep the inputs of a component's checkpointed layers in pinned main memory until the backward pass."""

    def around(_: nn.Module, checkpoint: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(function: Callable[..., Tensor], *args: Any) -> Tensor:
            with save_on_cpu(pin_memory=True):  # the checkpoint's own hooks take what is inside
                return checkpoint(function, *args)

        return run

    wrap_checkpointing(component, around)


@dataclass(frozen=True, kw_only=True)
class ComponentRow:
    """One line of the table of what trains."""

    name: str
    total: int
    trainable: int


def component_table(assembly: Parts) -> list[ComponentRow]:
    """Parameters and trainable parameters by component."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in assembly.model.named_parameters():
        groups.setdefault(component_of(name), []).append(parameter)
    return [
        ComponentRow(
            name=name,
            total=sum(_count(parameter) for parameter in parameters),
            trainable=sum(_count(parameter) for parameter in parameters if parameter.requires_grad),
        )
        for name, parameters in groups.items()
    ]


def component_of(name: str) -> str:
    """Which component a parameter belongs to: mixer, adapter, projector, vision or language."""
    if "lora_mixer" in name:
        return "mixer"
    part = part_of(name)
    if not adapters.is_adapter_parameter(name):
        return part
    return "adapter" if part == "language" else "vision adapter"


def _count(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
