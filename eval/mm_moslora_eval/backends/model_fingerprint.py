"""A hash over everything that determines a transformers model's answers, and details of its computation."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any

from mm_moslora.models.vision.feature_cache import bytes_of
from mm_moslora.utils.identity import sha256_of_bytes
from mm_moslora.utils.untrusted_data import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VARYING = ("padding", "truncation")
"""Settings of a tokenizer that any call may change."""


def model_fingerprint(model: PreTrainedModel, *, processor: Any, tokenizer: Any, template: str | None) -> str:
    """SHA-256 over every weight, the configurations of model and generation, and the processing of texts and images."""
    configurations = (model.config, getattr(model, "generation_config", None))
    processors = (getattr(processor, name, None) for name in ("image_processor", "video_processor"))
    about = [
        *(part.to_json_string().encode() for part in configurations if part is not None),
        *(_settings(part.to_dict()) for part in processors if part is not None), str(template).encode(),
        _words(tokenizer),
    ]  # fmt: skip
    weights = ((name.encode(), bytes_of(tensor)) for name, tensor in sorted(model.state_dict().items()))
    return sha256_of_bytes(*about, more=chain.from_iterable(weights))


def _settings(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, default=str).encode()


def _words(tokenizer: Any) -> bytes:
    """Everything that determines the tokens of a text; for a slow tokenizer only its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _settings(tokenizer.get_vocab())
    content = parse_json(backend.to_str())
    return _settings({name: value for name, value in content.items() if name not in _VARYING})


def circumstances(model: PreTrainedModel) -> dict[str, str]:
    """Precision, device and attention kernel of a model; they may change the choice between near-equal tokens."""
    import torch

    parameter = next(model.parameters())
    device = str(parameter.device)
    if parameter.device.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(parameter.device)})"
    return {
        "precision": str(parameter.dtype).removeprefix("torch."),
        "device": device,
        "attention": str(model.config._attn_implementation),
        "threads": str(torch.get_num_threads()),
    }
