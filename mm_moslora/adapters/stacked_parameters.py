"""The stacked parameters of experts in a model, which carry no mixer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn


def stacked_parameters(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that hold several matrices each, as experts do, with their paths.

    Args:
        modules: with their paths.
    """
    for path, module in modules:
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            for name, parameter in module.named_parameters(recurse=False):
                shape = getattr(parameter, "ds_shape", parameter.shape)
                if len(shape) == 3 and shape[0] > 1:
                    yield f"{path}.{name}" if path else name, parameter


def layers_read_as_experts(model: nn.Module, config: LoraConfig) -> list[str]:
    """Layers that PEFT, where this package is not imported, takes for experts by their names, and leaves out.

    Args:
        model: without adapters.
        config: plain LoRA's, with whole paths of modules.
    """
    read = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(read, model=model, conversions=None)
    except ValueError:  # some of the names that belong together are missing
        read.target_modules = []
    return sorted(set(config.target_modules or ()) - set(read.target_modules or ()))
