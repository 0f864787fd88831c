"""The methods of PEFT by name: their options, their layers in a model, their folders.

Names come from PEFT's registry, options from its configuration classes. LORA here is stock PEFT's, without a mixer.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, cast

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm_moslora.adapters.adapter_targets import chosen_paths, resolve_in
from mm_moslora.adapters.folder_format import STOCK_CONFIG, STOCK_WEIGHTS, bare_name, read_json
from mm_moslora.adapters.folders.permitted_options import permitted_options
from mm_moslora.adapters.tree import adapted_layers, base_model
from mm_moslora.utils.errors import AdapterError, reason_of, suggestion
from mm_moslora.utils.files import staging
from mm_moslora.utils.identity import check_stored
from mm_moslora.utils.run_paths import writing

_COMMON = {item.name for item in dataclasses.fields(peft.PeftConfig)} | {"target_modules"}
"""Fields of every configuration, which follow from the model and the recipe."""
_FROM_DATA = ("eva", "corda", "lora_ga")
"""PEFT's starts of LORA that need passes of the model over samples."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of PEFT."""

    name: str
    """As in PEFT's registry, such as HIRA."""
    config: type[peft.PeftConfig]
    tuner: type[BaseTuner]

    @property
    def options(self) -> dict[str, Any]:
        """Its own options with their types, as annotations have them."""
        hints = typing.get_type_hints(self.config)
        return {
            item.name: _open_words(hints[item.name])
            for item in dataclasses.fields(self.config)
            if item.name not in _COMMON and item.init
        }

    @property
    def shared(self) -> dict[str, str]:
        """Its options for rank, alpha and dropout, where it has them."""
        own = self.name.lower()
        wanted = {
            "rank": ("r",), "alpha": ("lora_alpha", f"{own}_alpha", "alpha"),
            "dropout": ("lora_dropout", f"{own}_dropout", "dropout"),
        }  # fmt: skip
        defaults = {item.name: item.default for item in dataclasses.fields(self.config)}
        shared = {}
        for key, names in wanted.items():
            # None or 0: another option decides (the block size of OFT), or the method has no such part.
            present = [name for name in names if isinstance(value := defaults.get(name), int | float) and value >= 0]
            if present and (key == "dropout" or defaults[present[0]]):
                shared[key] = present[0]
        return shared


def _open_words(hint: Any) -> Any:
    """A type in which any text replaces words with a pattern, such as `pissa_niter_[number of iters]`."""
    if typing.get_origin(hint) is Literal:
        return str if any("[" in str(word) for word in typing.get_args(hint)) else hint
    if typing.get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_open_words(item) for item in typing.get_args(hint))]  # noqa: UP007  (made from parts)
    return hint


def method_names() -> list[str]:
    """Names of the methods that can be taken."""
    return sorted(kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING if why_not_method(kind) is None)


def why_not_method(kind: peft.PeftType) -> str | None:
    """The reason why a method of PEFT cannot be trained as an adapter of layers here; None where it can."""
    config, tuner = PEFT_TYPE_TO_CONFIG_MAPPING[kind], PEFT_TYPE_TO_TUNER_MAPPING[kind]
    if issubclass(config, peft.PromptLearningConfig):
        return "it learns what stands before the input and changes no layer"
    takes_targets = "target_modules" in {item.name for item in dataclasses.fields(_stock_config(kind))}
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)) or not takes_targets:
        return "it does not wrap the layers that it is given"
    if tuner.forward is not BaseTuner.forward:
        return "a part of it is PEFT's own forward pass around the model, which training here does not run"
    if hasattr(tuner, "update_and_allocate"):
        return "it needs a call after every step (update_and_allocate), which training here does not make"
    return None


def _stock_config(kind: peft.PeftType) -> type[peft.PeftConfig]:
    """The configuration class; of LORA stock PEFT's, whose entry in the registry reads folders with mixers, too."""
    return peft.LoraConfig if kind is peft.PeftType.LORA else PEFT_TYPE_TO_CONFIG_MAPPING[kind]


def _lora_starts() -> set[str]:
    """The words for PEFT's starts of LORA."""
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    words = [word for part in typing.get_args(hint) for word in typing.get_args(part)]
    return {word for word in words if isinstance(word, str)}


def method_named(name: str) -> Method:
    """A method by its name in PEFT's registry.

    Raises:
        AdapterError: PEFT has none of this name, or it cannot be trained as an adapter of layers here.
    """
    kinds = {kind.value: kind for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    kind = kinds.get(name.upper())
    if kind is None and name.lower() in _lora_starts():
        raise AdapterError(
            f"{name} is a start of PEFT's LORA: write peft:LORA@init_lora_weights={name.lower()} (in a recipe, type: "
            f"LORA and init_lora_weights: {name.lower()})."
        )
    if kind is None:
        raise AdapterError(
            f"PEFT {peft.__version__} has no method {name!r}.{suggestion(name.upper(), kinds)} It has: "
            f"{', '.join(method_names())}."
        )
    if reason := why_not_method(kind):
        raise AdapterError(f"PEFT's {kind.value} cannot be taken: {reason}. Take one of {', '.join(method_names())}.")
    return Method(name=kind.value, config=_stock_config(kind), tuner=PEFT_TYPE_TO_TUNER_MAPPING[kind])


def method_config(method: Method, options: Mapping[str, Any], **shared: float) -> peft.PeftConfig:
    """A method's configuration, without targets.

    Args:
        shared: rank, alpha and dropout, for methods that have them and for which `options` do not name them.

    Raises:
        AdapterError: PEFT refuses the options, a part of them does nothing here, an option may name a file
            (`permitted_options`), or the start reads data or comes out otherwise when the folder is loaded.
    """
    permitted_options(method.config, options, "adapter.peft")
    if idle := [key for key in options if hasattr(method.tuner, f"_get_{key.removesuffix('_config')}_loss")]:
        raise AdapterError(
            f"adapter.peft.{idle[0]} adds to the loss what training here does not ask PEFT for. Leave it out."
        )
    if options.get("bias", "none") != "none":
        raise AdapterError(
            f"adapter.peft.bias is {options['bias']}, which would train biases outside the adapted layers, too. Leave "
            "it out."
        )
    if options.get("save_only_topk_weights"):
        raise AdapterError(
            "adapter.peft.save_only_topk_weights saves what inference needs, from which training cannot go on. "
            "Leave it out."
        )
    start = str(options.get("init_lora_weights")).lower()
    if start in _FROM_DATA or start.startswith("pissa_niter"):
        why = "reads samples, which a run does not give it" if start in _FROM_DATA else "is drawn: PEFT loads another"
        raise AdapterError(
            f"adapter.peft.init_lora_weights is {start}, a start that {why}. Take another, such as pissa."
        )
    values = {option: shared[key] for key, option in method.shared.items()}
    whole = {
        key: int(value) if float(value).is_integer() and key != "dropout" else value for key, value in values.items()
    }
    with _explained(f"PEFT's {method.name} does not take these options"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_config` is not specified. Using default")
        return method.config(task_type="CAUSAL_LM", **(whole | dict(options)))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise what PEFT raises as one error of this package."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"{what}: {reason_of(error)}.") from error


def add_method(
    model: nn.Module, config: peft.PeftConfig, *, component: Sequence[str] = ("",), targets: str | Sequence[str]
) -> peft.PeftModel:
    """Put a method of PEFT into a model.

    Args:
        model: changed in place.
        config: of `method_config`; not changed.
        component: module paths of the components to adapt.

    Returns:
        The PEFT model around `model`.

    Raises:
        AdapterError: see `resolve_targets`; PEFT refuses the model, or a layer of it does not learn by itself.
    """
    name = cast(peft.PeftType, config.peft_type).value
    paths = chosen_paths(config, resolve_in(model, component, targets, why_not=lambda layer: None))
    own = _anchored(config, paths, model)
    with _explained(f"PEFT's {name} does not fit this model"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        wrapped = peft.get_peft_model(model, own, autocast_adapter_dtype=False)
        adapted = {path for path, _ in adapted_layers(wrapped)}
        if left := sorted(set(paths) - adapted):
            raise AdapterError(f"PEFT's {name} leaves out {left[0]}, a target. Name others with adapter.targets.")
        first = model.get_submodule(paths[0])
        if not any(weight.is_meta for weight in first.parameters()):
            _check_learning(first, name)
    return cast(peft.PeftModel, wrapped)


def _anchored(config: peft.PeftConfig, paths: Sequence[str], model: nn.Module) -> peft.PeftConfig:
    """A configuration for exactly these modules; names of some of them become whole paths, too."""
    own: Any = copy.deepcopy(config)
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(own, name):
            setattr(own, name, None)
    listed = (item.name for item in dataclasses.fields(own) if item.name.endswith("_modules"))
    beside = [name for name in listed if name not in ("target_modules", "exclude_modules")]
    if lacking := [name for name in beside if getattr(own, name) is None]:  # as PEFT's tables for the model have it
        own.target_modules = None
        model_config: Any = getattr(base_model(model), "config", None)
        with _explained(
            f"PEFT's {own.peft_type.value} needs adapter.peft.{lacking[0]}, names of layers, for this model"
        ):
            tables: Any = PEFT_TYPE_TO_TUNER_MAPPING[own.peft_type]
            own = tables._prepare_adapter_config(own, model_config.get_text_config().to_dict())
    for name in beside:
        named = getattr(own, name)
        setattr(own, name, {path for path in paths if any(f".{path}".endswith(f".{end}") for end in named)})
    own.target_modules = set(paths)
    return cast(peft.PeftConfig, own)


def _check_learning(layer: nn.Module, name: str) -> None:
    """Refuse layers without a gradient when they are called alone, as the layers of a model call them."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    width = int(cast(Any, layer).get_base_layer().in_features)
    if not trained:
        raise AdapterError(f"PEFT's {name} trains nothing in a layer that it is given")
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(trained[0])
    with torch.enable_grad():
        gradients = torch.autograd.grad(layer(x).float().square().sum(), trained, allow_unused=True)
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        raise AdapterError(f"PEFT's {name} has no gradient in a layer that is called by itself")


@dataclass(frozen=True, kw_only=True)
class MethodSnapshot:
    """An adapter taken out of its model, so that it can be written while the model trains."""

    config: peft.PeftConfig
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write PEFT's two files; `PeftModel.from_pretrained` reads them."""
        with writing(folder), staging(folder, (STOCK_WEIGHTS, STOCK_CONFIG)) as staged:
            save_file(self.tensors, staged / STOCK_WEIGHTS, metadata={"format": "pt"})
            self.config.save_pretrained(str(staged))


def method_snapshot(model: peft.PeftModel, *, state: Mapping[str, Tensor]) -> MethodSnapshot:
    """The adapter that `PeftModel.save_pretrained` would write.

    Args:
        state: parameter name in the base model to full tensor, of all that trains; the rest is read from the model.
    """
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    return MethodSnapshot(config=config, tensors=_tensors(model, state))


def _tensors(model: peft.PeftModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT saves, by names as in the folder, on the CPU; see `method_snapshot`."""
    own = dict(base_model(model).named_parameters())
    values = {id(own[name]): tensor for name, tensor in state.items() if name in own}
    full = dict(model.state_dict())
    # Layers may share a parameter, which then has several names.
    full |= {
        name: values[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in values
    }
    saved = get_peft_model_state_dict(model, state_dict=full, save_embedding_layers=False)
    return {bare_name(name): tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in saved.items()}


def load_method(model: nn.Module, folder: str | Path) -> peft.PeftModel:
    """Load a folder of PEFT into a model, for use.

    Raises:
        AdapterError: PEFT cannot read the folder, it does not fit the model, it is of a method that is not loaded,
            or an option of it may name a file, a model or code (`permitted_options`).
    """
    path = Path(folder).resolve()  # else PEFT asks the hub for weights that the folder lacks
    data = read_json(path / STOCK_CONFIG)
    name = data.get("peft_type")
    if name not in method_names():
        raise AdapterError(
            f"{path} has peft_type {name!r}, which is not loaded, since it changes more than layers: it may bring "
            f"models or code. Expected one of {', '.join(method_names())}."
        )
    kind = method_named(name).config
    options = permitted_options(kind, data, str(path / STOCK_CONFIG))
    check_stored(path)
    with _explained(f"{path}, an adapter of PEFT's {name}, does not load"):
        # Without the name of the base, which PEFT would look up on the hub.
        config = kind(task_type=data.get("task_type"), **options)
        loaded = peft.PeftModel.from_pretrained(cast(Any, model), str(path), config=config).eval()
    has = get_peft_model_state_dict(loaded).keys()
    if strays := sorted(load_peft_weights(str(path), device="cpu").keys() ^ has):
        where = "has no place for" if strays[0] not in has else "lacks"
        raise AdapterError(f"{path} has peft_type {name!r} and {where} {strays[0]}: its two files do not fit.")
    return loaded


def restore_method(model: peft.PeftModel, folder: Path) -> None:
    """Set everything that a folder holds of an adapter, what does not train included, in a model that has it.

    Args:
        model: PEFT model; what trains was restored already.

    Raises:
        AdapterError: the folder is of another adapter.
    """
    with _explained(f"{folder} does not fit the adapter of this run"):
        result: Any = set_peft_model_state_dict(model, load_file(folder / STOCK_WEIGHTS))
    if result.unexpected_keys:
        raise AdapterError(f"{folder} holds {result.unexpected_keys[0]}, which the adapter of this run does not have.")
