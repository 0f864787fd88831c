"""One hash over all that decides what a transformers model answers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weights_fingerprint(model: PreTrainedModel, *texts: str) -> str:
    """SHA-256 over every weight, the configuration and further texts (the chat template)."""
    import torch

    digest = hashlib.sha256(model.config.to_json_string().encode())
    for text in texts:
        digest.update(text.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        # A counter is a tensor without dimensions, which cannot be viewed as bytes.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
