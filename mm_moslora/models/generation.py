"""Greedy decoding of a batch of prompts with images, token by token.

Shapes: ``B`` prompts, ``T`` longest prompt, ``Q`` visual tokens per image, ``D`` LLM width, ``C`` vocabulary.

Prompts are padded on the left with matching position ids, so that an fp32 model gives each prompt the answer that it
gives alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mm_moslora.errors import ModelError
from mm_moslora.models.vlm import image_features, is_multimodal


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, ready to decode."""

    input_ids: Tensor
    """int64 ``[T]``, placeholders expanded."""
    features: Tensor | None = None
    """``[n * Q, D]`` visual tokens of its images in order, from `encode_images`; None for text only."""


@torch.inference_mode()
def encode_images(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Visual tokens ``[N, Q, D]`` of pictures ``[N, 3, H, W]``; encode each picture once and reuse it."""
    return image_features(model, pixel_values)


@torch.inference_mode()
def stream(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> Iterator[list[int | None]]:
    """Decode greedily, yielding one token per prompt and step.

    Args:
        model: causal language model or VLM in eval mode.
        prompts: at least one.
        max_new_tokens: most steps.
        stop_ids: tokens that end an answer; they are not yielded.

    Yields:
        A list of ``B`` token ids, None for a prompt that has ended. Ends when all have.
    """
    embeddings, mask = _left_pad(model, prompts)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config.get_text_config())
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    alive = [True] * len(prompts)
    stops = set(stop_ids)
    for step in range(max_new_tokens):
        output = model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{cache_name: cache},
        )  # fmt: skip
        chosen = output.logits[:, -1].float().argmax(dim=-1)
        tokens = chosen.tolist()
        alive = [was and token not in stops for was, token in zip(alive, tokens, strict=True)]
        if not any(alive):
            return
        yield [token if lives else None for token, lives in zip(tokens, alive, strict=True)]
        if step + 1 < max_new_tokens:
            embeddings = model.get_input_embeddings()(chosen[:, None])
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = positions[:, -1:] + 1


def generate(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """Decode greedily to the end; see `stream`. Returns the new tokens of each prompt, without the stop token."""
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def stop_token_ids(model: PreTrainedModel, tokenizer_eos: int | None) -> list[int]:
    """Every token that ends an answer: the generation settings' and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(item) for item in [*ids, tokenizer_eos] if item is not None})


def _left_pad(model: PreTrainedModel, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Embeddings ``[B, T, D]`` and attention mask ``[B, T]``."""
    rows = [_embed(model, prompt) for prompt in prompts]
    longest = max(row.shape[0] for row in rows)
    embeddings = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeddings.device)
    for index, row in enumerate(rows):
        embeddings[index, longest - row.shape[0] :] = row
        mask[index, longest - row.shape[0] :] = 1
    return embeddings, mask


def _embed(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    table: Any = model.get_input_embeddings()
    ids = prompt.input_ids.to(table.weight.device)
    row = table(ids)
    if not is_multimodal(model):
        return row
    places = ids == model.config.image_token_id
    given = 0 if prompt.features is None else prompt.features.shape[0]
    if int(places.sum()) != given:
        raise ModelError(
            f"A prompt holds {int(places.sum())} image placeholders, but its images give {given} visual tokens. "
            "Pass as many images as the conversation mentions."
        )
    if prompt.features is not None:
        row = row.masked_scatter(places[:, None], prompt.features.to(row.dtype))
    return row


@dataclass(frozen=True, kw_only=True)
class ContinuationScore:
    """How likely one continuation of a prompt is."""

    logprob: float
    """Sum of log-probabilities over its tokens."""
    tokens: int
    """Its length."""
    greedy: bool
    """Whether greedy decoding would have produced it."""


@torch.inference_mode()
def option_scores(
    model: PreTrainedModel, prompt: Prompt, options: Sequence[Sequence[int]]
) -> list[ContinuationScore]:
    """Log-likelihood of several continuations of one prompt, which is run once for all of them.

    Args:
        model: causal language model or VLM in eval mode.
        prompt: the common beginning.
        options: token ids of each continuation, at least one token each.
    """
    embeddings, mask = _left_pad(model, [prompt])
    cache = DynamicCache(config=model.config.get_text_config())
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    first = model(
        inputs_embeds=embeddings, attention_mask=mask, use_cache=True, logits_to_keep=1, **{cache_name: cache}
    ).logits[0, -1]
    first_logprobs = first.float().log_softmax(dim=-1)
    longest = max(len(option) for option in options)
    if longest > 1:
        cache.batch_repeat_interleave(len(options))
        rest_logprobs = _continue(model, cache, cache_name, mask, options)
    scores = []
    for row, option in enumerate(options):
        steps = [first_logprobs] + ([rest_logprobs[row, i] for i in range(len(option) - 1)] if longest > 1 else [])
        values = [float(step[token]) for step, token in zip(steps, option, strict=True)]
        greedy = all(int(step.argmax()) == token for step, token in zip(steps, option, strict=True))
        scores.append(ContinuationScore(logprob=sum(values), tokens=len(option), greedy=greedy))
    return scores


def _continue(
    model: PreTrainedModel, cache: DynamicCache, cache_name: str, mask: Tensor, options: Sequence[Sequence[int]]
) -> Tensor:
    """Log-probabilities ``[options, longest, C]`` after each token of the options, padded on the right."""
    longest = max(len(option) for option in options)
    ids = torch.zeros(len(options), longest, dtype=torch.long, device=mask.device)
    valid = torch.zeros_like(ids)
    for row, option in enumerate(options):
        ids[row, : len(option)] = torch.tensor(option)
        valid[row, : len(option)] = 1
    start = int(mask.sum())
    positions = torch.arange(start, start + longest, device=mask.device).expand(len(options), -1)
    output = model(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=torch.cat([mask.expand(len(options), -1), valid], dim=1),
        position_ids=positions,
        use_cache=True,
        **{cache_name: cache},
    )
    return output.logits.float().log_softmax(dim=-1)
