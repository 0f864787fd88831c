"""The mixers as training began, which a folder keeps beside the adapter as ``base_model.model.PATH.lora_start.weight``.

They change no output: a folder without them, or with a damaged file, loads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mm_moslora.adapters.folder_format import PREFIX, START_MIXER, START_WEIGHTS, read_tensors
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.identity import sha256_of

logger = logging.getLogger(__name__)


def initial_mixers(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The initial mixers of an adapter, as far as they are known, under their names in the folder."""
    return {
        f"{PREFIX}{path}{START_MIXER}": layer.initial_mixers[adapter_name]
        for path, layer in named_adapter_layers(model)
        if adapter_name in layer.initial_mixers
    }


def read_initial_mixers(root: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a folder keeps of them; empty where it keeps nothing, or its file is not the one it was saved with."""
    path, digest = root / START_WEIGHTS, manifest.get("start")
    if digest is None or not path.is_file():
        return {}
    try:
        if sha256_of(path) == digest:
            return {name: tensor for name, tensor in read_tensors(path).items() if name.endswith(START_MIXER)}
    except (AdapterError, OSError) as error:
        logger.info("%s", error)
    logger.warning("%s is damaged or of another adapter, so the start of training is not known.", path)
    return {}
