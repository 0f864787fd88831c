"""Greedy decoding of one prompt by a ready-made model, through its own processor's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.batch import ProcessedImage, join_images
from mm_moslora.models.batching.padded_batch import padded_inputs
from mm_moslora.models.decoding.generation import continued
from mm_moslora.models.decoding.prefix_cache import Decoder


@torch.inference_mode()
def prefill_row(model: PreTrainedModel, prompt: Tensor, pictures: Sequence[ProcessedImage]) -> Decoder:
    """Run one prompt with its pictures; the decoder stands at its end and can join others."""
    decoder = Decoder(model)
    tensors = join_images([picture.tensors for picture in pictures])
    pixels = tensors.pop("pixel_values", None)
    decoder.start(padded_inputs(model, [prompt], pixels, tensors, answers=[len(prompt)]))
    return decoder


@torch.inference_mode()
def stream_padded_row(
    model: PreTrainedModel,
    prompt: Tensor,
    pictures: Sequence[ProcessedImage],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> Iterator[int]:
    """Greedy answer to one prompt, token by token, without the one that ends it."""
    decoder = prefill_row(model, prompt, pictures)
    for (token,) in continued(model, decoder, max_new_tokens=max_new_tokens, stop_ids=stop_ids):
        assert token is not None, "the only row has not ended"
        yield token
