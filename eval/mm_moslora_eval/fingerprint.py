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
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
