"""The entry point of the group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `--model mm_moslora`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="mm_moslora", simple_class_path="mm_moslora_eval.backends.lmms_eval_adapter.MoSLoRALmms"
    )
