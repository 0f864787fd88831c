"""Decoding and option scoring of batches of prompts with images; what prompts share is run once, save by beam search.

Shapes: ``B`` prompts, ``T`` tokens of a prompt, ``Q`` visual tokens per image, ``D`` LLM width.

The common beginning of a group is run once (see `prefix_cache`). Padding is on the left and masked, and position ids
count real tokens only, so that an fp32 model gives each prompt the answer that it gives alone.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from mm_moslora.batch import ProcessedImage, join_images
from mm_moslora.models.batching.padded_batch import padded_inputs
from mm_moslora.models.decoding.prefix_cache import Decoder, likeliest, logits_error
from mm_moslora.models.decoding.token_sampling import Draw, choose
from mm_moslora.models.vision.feature_cache import StepFeatureCache
from mm_moslora.models.vlm import image_features
from mm_moslora.utils.errors import ModelError

_WORTH_SHARING = 16
"""Tokens; a shorter common beginning costs more to split off than to run again."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, ready to decode."""

    input_ids: Tensor
    """int64 ``[T]``, placeholders expanded."""
    features: Tensor | None = None
    """``[n * Q, D]`` visual tokens of its images in order, from `encode_images`; None for text only."""
    group: Hashable | None = None
    """Prompts of one group show the same images in the same order; None: nothing is shared."""


@torch.inference_mode()
def encode_images(model: PreTrainedModel, pixel_values: Tensor, cache: StepFeatureCache | None = None) -> Tensor:
    """Visual tokens ``[N, Q, D]`` of pictures ``[N, 3, H, W]``; encode each picture once and reuse it."""
    return image_features(model, pixel_values, cache=cache)


def embed_prompt(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    """Embeddings ``[T, D]`` of a prompt with the visual tokens at their placeholders."""
    table: Any = model.get_input_embeddings()
    ids = prompt.input_ids
    row = table(ids.to(table.weight.device, non_blocking=True))
    image_token_id = getattr(model.config, "image_token_id", None)
    if image_token_id is None:
        return row
    is_image = ids == image_token_id
    placeholders, visual = int(is_image.sum()), 0 if prompt.features is None else prompt.features.shape[0]
    if placeholders != visual:
        raise ModelError(
            f"A prompt holds {placeholders} image placeholders, but its images give {visual} visual tokens. "
            "Pass as many images as the conversation mentions."
        )
    if prompt.features is not None:
        row = row.masked_scatter(is_image[:, None].to(row.device, non_blocking=True), prompt.features.to(row.dtype))
    return row


def stop_token_ids(model: PreTrainedModel, tokenizer_eos: int | None) -> list[int]:
    """Every token that ends an answer: the generation settings' and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(item) for item in [*ids, tokenizer_eos] if item is not None})


@torch.inference_mode()
def stream(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> Iterator[list[int | None]]:
    """Decode greedily: per step the token of each prompt, None where it has ended; ends when all have."""
    yield from continued(model, _read(model, prompts), max_new_tokens=max_new_tokens, stop_ids=stop_ids)


def continued(
    model: PreTrainedModel, state: Decoder, *, max_new_tokens: int, stop_ids: Sequence[int],
    draws: Sequence[Draw] | None = None,
) -> Iterator[list[int | None]]:  # fmt: skip
    """`stream` from the ends of prompts; the state is used up. With `draws`, one per prompt, tokens are sampled."""
    count = len(state.logits)
    rows = list(range(count))  # which prompt each row of the state belongs to
    stops = set(stop_ids)
    for step in range(max_new_tokens):
        chosen, numbers = _sampled(state.logits, [draws[row] for row in rows]) if draws else likeliest(state.logits)
        said: list[int | None] = [None] * count
        alive = []
        for index, (row, token) in enumerate(zip(rows, numbers, strict=True)):
            if token not in stops:
                said[row] = token
                alive.append(index)
        if not alive:
            return
        yield said
        if step + 1 == max_new_tokens:
            return
        if len(alive) < len(rows):  # nobody waits for an answer that has ended
            state.select(alive)
            chosen, rows = chosen[alive], [rows[index] for index in alive]
        state.extend(model.get_input_embeddings()(chosen[:, None]), torch.ones_like(chosen[:, None]))


def _sampled(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, list[int]]:
    """`likeliest`, of tokens that are drawn."""
    numbers = choose(logits.float(), draws)
    for number in numbers:
        if isinstance(number, ModelError):
            raise number
    tokens = [number for number in numbers if not isinstance(number, ModelError)]
    return torch.tensor(tokens).to(logits.device, non_blocking=True), tokens


def generate(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """Decode greedily to the end; see `stream`. Returns the new tokens of each prompt, without the stop token."""
    steps = stream(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    return _gathered(steps, len(prompts))


def _gathered(steps: Iterable[list[int | None]], count: int) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in range(count)]
    for tokens in steps:
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers


@torch.inference_mode()
def generate_beams(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, beams: int, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """Decode by transformers' beam search as `generate` does, generation settings without effect; nothing is shared."""
    rows = [embed_prompt(model, prompt) for prompt in prompts]
    embeddings = pad_sequence(rows, batch_first=True, padding_side="left")
    masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    stops = list(stop_ids) or [-1]  # transformers takes an empty list for its own
    settings = GenerationConfig(
        num_beams=beams, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=stops[0]
    )
    generate: Any = model.generate
    with _generation_settings(model, settings):
        answers = generate(
            inputs_embeds=embeddings, attention_mask=pad_sequence(masks, batch_first=True, padding_side="left"),
            logits_processor=LogitsProcessorList([_require_finite]),
        )  # fmt: skip
    return [list(itertools.takewhile(lambda token: token not in stops, answer)) for answer in answers.tolist()]


@contextmanager
def _generation_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Replace a model's generation settings: transformers fills what a passed object leaves open from the model's."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _require_finite(_: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that changes nothing and refuses a row ``[C]`` without a finite largest score."""
    highest = scores.amax(dim=-1)
    if not bool(highest.isfinite().all()):
        raise logits_error(float(highest[~highest.isfinite()][0]))
    return scores


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
def score_options(
    model: PreTrainedModel, prompts: Sequence[Prompt], options: Sequence[Sequence[Sequence[int]]]
) -> list[list[ContinuationScore]]:
    """Log-likelihood of several continuations (token ids, at least one) of each prompt, which is run once for all."""
    return _score(model, _read(model, prompts), options)


@torch.inference_mode()
def generate_and_score(
    model: PreTrainedModel, prompts: Sequence[Prompt], options: Sequence[Sequence[Sequence[int]]], *,
    max_new_tokens: int, stop_ids: Sequence[int], draws: Sequence[Draw] | None = None,
) -> tuple[list[list[int]], list[list[ContinuationScore]]]:  # fmt: skip
    """`generate` and `score_options` of the same prompts, which are run once; the answers are those of `generate`."""
    state = _read(model, prompts)
    scores = _score(model, state, options)
    steps = continued(model, state, max_new_tokens=max_new_tokens, stop_ids=stop_ids, draws=draws)
    return _gathered(steps, len(prompts)), scores


def _score(
    model: PreTrainedModel, state: Decoder, options: Sequence[Sequence[Sequence[int]]]
) -> list[list[ContinuationScore]]:
    """`score_options` from the ends of prompts; the state stays as it is."""
    first = state.logits.log_softmax(dim=-1)
    flat = [(row, option) for row, offered in enumerate(options) for option in offered]
    scores: list[list[ContinuationScore]] = [[] for _ in options]
    if not flat:
        return scores
    rows, lengths = [row for row, _ in flat], [len(option) for _, option in flat]
    tokens = pad_sequence([torch.tensor(option) for _, option in flat], batch_first=True).to(
        first.device, non_blocking=True
    )
    steps = first[torch.tensor(rows).to(first.device, non_blocking=True)][:, None]
    chosen = [(steps.gather(2, tokens[:, :1, None]), steps.argmax(-1))]
    if max(lengths) > 1:
        state = state.forked(rows)
        valid = torch.arange(max(lengths) - 1)[None] < torch.tensor(lengths)[:, None] - 1
        embeddings = model.get_input_embeddings()(tokens[:, :-1])
        steps = state.extend(embeddings, valid.long().to(first.device, non_blocking=True), keep=0).log_softmax(dim=-1)
        chosen.append((steps.gather(2, tokens[:, 1:, None]), steps.argmax(-1)))
    logprobs = torch.cat([picked[..., 0] for picked, _ in chosen], dim=1).tolist()
    best = torch.cat([tops for _, tops in chosen], dim=1).tolist()
    if any(math.isnan(value) for (_, option), row in zip(flat, logprobs, strict=True) for value in row[: len(option)]):
        raise ModelError("The model's logits are NaN, so no option can be chosen. Its weights are damaged.")
    for index, (row, option) in enumerate(flat):
        score = ContinuationScore(
            logprob=sum(logprobs[index][: len(option)]), tokens=len(option),
            greedy=best[index][: len(option)] == list(option),
        )  # fmt: skip
        scores[row].append(score)
    return scores


def _read(model: PreTrainedModel, prompts: Sequence[Prompt]) -> Decoder:
    """Run prompts; afterwards row b of the decoder stands at the end of prompt b."""
    decoder = Decoder(model)
    rows = [embed_prompt(model, prompt) for prompt in prompts]
    groups = _groups(prompts) if decoder.can_share else [[index] for index in range(len(prompts))]
    if len(groups) < len(prompts):
        heads = [_common_length([prompts[index].input_ids for index in members]) for members in groups]
        first = [(members[0], length) for members, length in zip(groups, heads, strict=True)]
        decoder.append([rows[at][:end] for at, end in first], head=False)
        of_prompt = {index: number for number, members in enumerate(groups) for index in members}
        decoder.branch([of_prompt[index] for index in range(len(prompts))])
        rows = [row[heads[of_prompt[at]] :] for at, row in enumerate(rows)]
    decoder.append(rows)
    return decoder


def _groups(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Prompt numbers that begin with enough tokens in common, each prompt once."""
    by_group: dict[Hashable, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_group[("alone", index) if prompt.group is None else ("group", prompt.group)].append(index)
    result = []
    for members in by_group.values():
        shared = _common_length([prompts[index].input_ids for index in members])
        if len(members) == 1 or shared >= _WORTH_SHARING:
            result.append(members)
        else:
            result += [[index] for index in members]
    return result


def _common_length(ids: Sequence[Tensor]) -> int:
    """Length of the common beginning of all rows; at most one token less than the shortest row."""
    shortest = min(row.shape[0] for row in ids) - 1
    same = torch.ones(shortest, dtype=torch.bool, device=ids[0].device)
    for row in ids[1:]:
        same &= row[:shortest] == ids[0][:shortest]
    different = (~same).nonzero()
    return int(different[0]) if len(different) else shortest


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
