"""One hash over all that decides what a transformers model answers, and where and how it computes."""

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


def circumstances(model: PreTrainedModel) -> dict[str, str]:
    """Precision, device and attention kernel of a model; they may turn an answer that hangs in the balance."""
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
