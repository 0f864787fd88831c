"""Greedy decoding of one prompt by a ready-made model, through its own processor's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from mm_moslora.batch import Example
from mm_moslora.models.batching.padded_batch import padded_inputs
from mm_moslora.models.decoding.prefix_cache import Decoder, likeliest


@torch.inference_mode()
def prefill_row(model: PreTrainedModel, prompt: Example) -> Decoder:
    """Run one prompt with its pictures; the decoder stands at its end and can join others.

    Args:
        model: an image-text-to-text model of transformers, in eval mode.
        prompt: ids and pictures; nothing in it needs to be supervised.

    Raises:
        ModelError: placeholders and images do not match.
    """
    decoder = Decoder(model)
    row = prompt.input_ids
    decoder.start(padded_inputs(model, [row], prompt.pixel_values, prompt.image_inputs, answers=[len(row)]))
    return decoder


@torch.inference_mode()
def stream_padded_row(
    model: PreTrainedModel, prompt: Example, *, max_new_tokens: int, stop_ids: Sequence[int]
) -> Iterator[int]:
    """Greedy answer to one prompt, token by token, without the one that ends it.

    Args:
        model: an image-text-to-text model of transformers, in eval mode.
        prompt: see `prefill_row`.
        max_new_tokens: most tokens.
        stop_ids: tokens that end the answer.

    Raises:
        ModelError: see `likeliest`.
    """
    decoder = prefill_row(model, prompt)
    for number in range(max_new_tokens):
        chosen, (number_of_token,) = likeliest(decoder.logits)
        if number_of_token in stop_ids:
            return
        yield number_of_token
        if number + 1 < max_new_tokens:
            token = chosen[:, None]
            decoder.extend(model.get_input_embeddings()(token), torch.ones_like(token))
