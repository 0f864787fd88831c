"""Attention maps: attention of the answer's tokens to the projector's tokens, drawn over the picture.

Shapes: ``T`` tokens of prompt and answer, ``A`` answer tokens, ``Q`` visual tokens per image, ``G`` side of their grid,
``H`` heads.

Attention is averaged over layers and heads, and part of it always rests on tokens without content. It shows which
visual tokens were read and does not explain the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm_moslora.batch import ProcessedImage
from mm_moslora.models.decoding.generation import Prompt, embed_prompt
from mm_moslora.models.transformers_patches import attention_within
from mm_moslora.serve.inference.served_models import Models

LONGEST = 1024
"""Longest text, tokens; the weights of a longer one would take too much memory."""
SIDE = 448
"""Side of the drawn picture, pixels."""


@torch.inference_mode()
def attention_maps(
    models: Models, name: str, *, input_ids: Tensor, images: Sequence[ProcessedImage], answer: Sequence[int]
) -> list[Tensor] | None:
    """Mean attention of the answer to each picture's tokens.

    Args:
        models: no other thread may use it meanwhile.
        input_ids: int64 ``[T - A]``, placeholders expanded.

    Returns:
        ``[G, G]`` per picture on the CPU, largest value 1; None where nothing can be drawn: no picture, no answer, a
        text that is too long, or visual tokens that form no square.
    """
    side = math.isqrt(models.assembly.tokens_per_image)
    length = len(input_ids) + len(answer)
    if not images or not answer or length > LONGEST or side * side != models.assembly.tokens_per_image:
        return None
    model = models.assembly.model
    ids = torch.cat([input_ids, torch.tensor(list(answer))])
    with models.use(name), attention_within(model, "eager"):  # the fast ones do not give their weights out
        embedded = embed_prompt(model, Prompt(input_ids=ids, features=models.image_tokens(name, images)))
        visual = torch.isin(ids, torch.tensor([models.assembly.image_token_id]))
        weights = model.base_model(inputs_embeds=embedded[None], output_attentions=True, use_cache=False).attentions
    asking = range(len(input_ids) - 1, length - 1)  # the outputs at these positions became the answer
    attention = torch.stack([layer[0, :, list(asking)].float().mean(dim=(0, 1)) for layer in weights]).mean(dim=0).cpu()
    maps = attention[visual].view(len(images), side, side)
    return [heat / heat.max().clamp_min(1e-12) for heat in maps]


def overlay(pixels: Tensor, weights: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The picture as the model receives it, darkened where attention is low."""
    picture = (pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)
    base = Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).resize((SIDE, SIDE))
    heat = Image.fromarray((weights.sqrt().numpy() * 255).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    glow = Image.merge("RGB", [heat, heat.point(lambda value: value * 0.55), Image.new("L", heat.size)])
    dark = Image.blend(base, Image.new("RGB", base.size, (18, 22, 34)), 0.62)
    return Image.blend(Image.composite(base, dark, heat), glow, 0.28)
