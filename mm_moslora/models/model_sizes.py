"""Configurations to count with: the model's own, or the sizes of a shipped recipe's model, which come along."""

from __future__ import annotations

import json
import logging
from functools import cache
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mm_moslora.config import RECIPES_FOLDER

logger = logging.getLogger(__name__)


@cache
def known_shapes() -> dict[str, dict[str, Any]]:
    """The models of the shipped recipes, and their sizes."""
    found: dict[str, dict[str, Any]] = json.loads((RECIPES_FOLDER / "shapes.json").read_text(encoding="utf-8"))
    return found


def config_to_count(name: str, revision: str | None) -> PreTrainedConfig:
    """A model's configuration, for its sizes only.

    Args:
        name: folder or hub id. The models of shipped recipes are known where the hub is out of reach or asks for a
            licence to be accepted; InternLM2 in Llama's layout.
        revision: of the hub.

    Raises:
        OSError, ValueError, KeyError: as `AutoConfig`, for other models.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        if name not in known_shapes():
            raise
        logger.info("%s: the shipped sizes are used, since its configuration is not to be had.", name)
        return known_shape(name)
    return config


def known_shape(name: str) -> PreTrainedConfig:
    """The sizes of a shipped recipe's model.

    Raises:
        KeyError: no shipped recipe names it.
    """
    values = dict(known_shapes()[name])
    kind = values.pop("model_type")
    config: PreTrainedConfig = AutoConfig.for_model(kind, **values)
    return config
