"""A model of mm_moslora behind the runner's `Model` protocol; batches share the computation of common prefixes."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.batch import ImageProcessing
from mm_moslora.data.boxes.box_forms import read_boxes
from mm_moslora.data.chat.answer_thinking import THINK_END
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import IMAGE, Turn
from mm_moslora.models.assembly import Parts
from mm_moslora.models.decoding.generation import (
    ContinuationScore,
    Prompt,
    encode_images,
    generate_and_score,
    generate_beams,
    score_options,
    stop_token_ids,
)
from mm_moslora.models.decoding.token_sampling import Draw, Sampling
from mm_moslora.models.vision.feature_cache import MEMORY_BYTES, FeatureCache, StepFeatureCache
from mm_moslora.models.vision.feature_store import FeatureStore
from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.backends.model_fingerprint import ReasoningMarkers, model_fingerprint
from mm_moslora_eval.protocol.model_interface import Answer, Message, OptionRequest, OptionScore, Request
from mm_moslora_eval.protocol.task import THINKING_TOKENS
from mm_moslora_eval.scoring.scored_sample import without_thinking
from mm_moslora_eval.sources.document import ImageLike
from mm_moslora_eval.sources.source_images import Hasher, image_size, open_image

logger = logging.getLogger(__name__)


_ENCODE_TOGETHER = 16
_WORKERS = max(1, min(4, os.cpu_count() or 1))


class VisualTokens:
    """Visual tokens by picture: pictures are decoded ahead in worker threads and encoded in batches, each once.

    Shapes: ``N`` images, ``Q`` visual tokens per image, ``D`` LLM width.
    """

    def __init__(self, assembly: Parts, *, keep: bool = True, store: FeatureStore | None = None) -> None:
        self._assembly, self._keep = assembly, keep
        self._hash = Hasher()
        self._cache = FeatureCache(memory_bytes=MEMORY_BYTES if keep else 0)
        self._states = StepFeatureCache(store)
        self._decoding: dict[str, Future[Tensor]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def keys(self, images: Sequence[ImageLike]) -> tuple[str, ...]:
        """Hashes of pictures."""
        return tuple(self._hash(image) for image in images)

    def ahead(self, images: Sequence[ImageLike]) -> None:
        """Start to decode the pictures of later batches."""
        if not self._keep:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="decode")
        for image in images:
            key = self._hash(image)
            if key not in self._cache and key not in self._decoding:
                self._decoding[key] = self._pool.submit(self._decode, image)

    def __call__(self, images: Sequence[ImageLike]) -> dict[str, Tensor]:
        """Visual tokens ``[Q, D]`` of pictures, by hash."""
        keys = self.keys(images)
        together = _ENCODE_TOGETHER if self._keep else 1

        def encode(numbers: Sequence[int]) -> Sequence[Tensor]:
            rows: list[Tensor] = []
            for start in range(0, len(numbers), together):
                chosen = numbers[start : start + together]
                pixels = torch.stack([self._decoded(keys[number], images[number]) for number in chosen])
                # Each row is copied, so that dropping one picture frees its memory.
                rows += [row.clone() for row in encode_images(self._assembly.model, pixels, self._states)]
            return rows

        return dict(zip(keys, self._cache.get_many(keys, encode), strict=True))

    def close(self) -> None:
        """Drop the cached tokens and stop the threads."""
        if (store := self._states.store) is not None:
            total = store.counts.read + store.counts.encoded
            logger.info("Features of %d of %d pictures were in %s.", store.counts.read, total, store.folder)
        self._cache.forget()
        self._decoding.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _decoded(self, key: str, image: ImageLike) -> Tensor:
        waiting = self._decoding.pop(key, None)
        return self._decode(image) if waiting is None else waiting.result()

    def _decode(self, image: ImageLike) -> Tensor:
        if self._assembly.image_processing is None:
            raise EvalError("The task shows pictures, but this model has no vision encoder. Choose a text task.")
        (seen,) = self._assembly.image_processing.process([open_image(image)])
        return seen.tensors["pixel_values"][0]


class LocalModel:
    """A model loaded with `mm_moslora.models.load_model.load`.

    Questions on the same pictures are decoded together: the pictures and the common prefix are computed once for all.
    With an fp32 model the answers equal those of the reference mode.

    Args:
        assembly: the loaded model; merge its adapters for speed.
        name: display name.
        reference: one question at a time, with no shared computation and no cache.
        store: features of pictures on disk; None: this model encodes its own.
    """

    reads_boxes = True

    def __init__(
        self,
        assembly: Parts,
        *,
        name: str,
        reference: bool = False,
        store: FeatureStore | None = None,
        trained_frames: int | None = None,
        trained_fps: float | None = None,
    ) -> None:
        self.assembly, self.name, self._reference = assembly, name, reference
        self.trained_frames, self.trained_fps = trained_frames, trained_fps
        self.model = assembly.model.eval()
        self.encoder = ConversationEncoder.of(assembly)
        self._thinks = self.encoder.asks_to_think
        self.stop_ids = stop_token_ids(self.model, assembly.tokenizer.eos_token_id)
        self._visual = VisualTokens(assembly, keep=not reference, store=store)
        self._ids: dict[str, list[int]] = {"": []}
        self._markers = ReasoningMarkers(self.encoder.template, assembly.tokenizer)
        self.thinking_markers = self._markers.pairs

    @cached_property
    def fingerprint(self) -> str:
        """Hash over weights, configuration, template, tokenizer and image processing."""
        tokenizer = self.assembly.tokenizer
        own = model_fingerprint(
            self.model, processor=self.assembly.processor, tokenizer=tokenizer, template=tokenizer.chat_template
        )
        return self._markers.fingerprint(own)

    @property
    def details(self) -> dict[str, str]:
        """Details for the run's records: precision, device, attention kernel."""
        return circumstances(self.model)

    @property
    def thinking_tokens(self) -> int:
        """See `thinking_tokens_of`; 0: the model is not asked to think."""
        return thinking_tokens_of(self.model.config) if self._thinks else 0

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `mm_moslora_eval.protocol.model_interface.Model.generate`."""
        for indices, prompts in self._prompts(requests, batch_size):
            chosen = [requests[index] for index in indices]
            limit = max(request.max_new_tokens for request in chosen)
            references = [
                [ids] if not self._thinks and (ids := self._encoded(item.reference)) else [] for item in chosen
            ]
            beams, stops = chosen[0].beams, self.stop_ids  # the requests of a call are of one task
            if beams > 1:
                answers = generate_beams(self.model, prompts, beams=beams, max_new_tokens=limit, stop_ids=stops)
                scores = score_options(self.model, prompts, references)
            else:
                answers, scores = generate_and_score(
                    self.model, prompts, references, max_new_tokens=limit, stop_ids=stops, draws=draws_of(chosen)
                )
            if self._thinks:
                scores = self._behind_thinking(prompts, chosen, answers)
            for index, request, tokens, score in zip(indices, chosen, answers, scores, strict=True):
                yield index, self._answer(request, tokens, score)

    def _behind_thinking(
        self, prompts: Sequence[Prompt], requests: Sequence[Request], answers: Sequence[Sequence[int]]
    ) -> list[list[ContinuationScore]]:
        """Scores of the references behind the thinking that the model wrote; none where its block has no end."""
        by_prompt: list[list[ContinuationScore]] = [[] for _ in prompts]
        longer, options, owners = [], [], []
        for number, (prompt, request, tokens) in enumerate(zip(prompts, requests, answers, strict=True)):
            thinking, end, rest = (self.encoder.opened() + self.encoder.decode_answer(tokens)).partition(THINK_END)
            if not (end and request.reference):
                continue
            block = thinking + end + rest[: len(rest) - len(rest.lstrip())]
            before, whole = (self.encoder.encode_answer(block + text) for text in ("", request.reference))
            same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
            shared = len(list(same))
            if shared == len(whole):
                continue
            ids = torch.cat([prompt.input_ids, torch.tensor(whole[:shared], dtype=torch.long)])
            longer.append(replace(prompt, input_ids=ids))
            options.append([whole[shared:]])
            owners.append(number)
        scores = score_options(self.model, longer, options) if longer else []
        for owner, score in zip(owners, scores, strict=True):
            by_prompt[owner] = score
        return by_prompt

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """See `Model.loglikelihood`; a prompt is computed once for all its options."""
        for indices, prompts in self._prompts([item.request for item in requests], batch_size):
            offered = [requests[index].options for index in indices]
            encoded = [[self._encoded(text) for text in options] for options in offered]
            scores = score_options(self.model, prompts, encoded)
            for index, option_scores in zip(indices, scores, strict=True):
                yield index, _option_scores(option_scores)

    def close(self) -> None:
        """Drop the cached visual tokens and stop the decoding threads."""
        self._visual.close()

    def _prompts(self, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[list[int], list[Prompt]]]:
        """Batches of request numbers with their prompts; the next batch's pictures are decoded in the background."""
        keys = [self._visual.keys(request.images) for request in requests]
        batches = _batches(requests, keys, 1 if self._reference else batch_size)
        for number, indices in enumerate(batches):
            for upcoming in batches[number : number + 2]:
                self._visual.ahead([image for index in upcoming for image in requests[index].images])
            features = self._visual([image for index in indices for image in requests[index].images])
            yield indices, [self._prompt(requests[index], keys[index], features) for index in indices]

    def _prompt(self, request: Request, keys: tuple[str, ...], features: dict[str, Tensor]) -> Prompt:
        ids = self.encoder.encode_prompt([turn_of(message) for message in request.messages])
        shown = torch.cat([features[key] for key in keys]) if keys else None
        return Prompt(input_ids=ids, features=shown, group=None if self._reference else keys)

    def _encoded(self, answer: str) -> list[int]:
        if answer not in self._ids:
            self._ids[answer] = self.encoder.encode_answer(answer) if answer else []
        return self._ids[answer]

    def _answer(self, request: Request, tokens: list[int], reference: Sequence[ContinuationScore]) -> Answer:
        stopped = len(tokens) < request.max_new_tokens
        tokens = tokens[: request.max_new_tokens]
        decode = self.encoder.decode_answer
        text = self._markers.text(tokens, decode) if self._markers.kept else decode(tokens)
        if self._thinks:
            text = self.encoder.opened() + text
        for stop in request.stop:
            text, mark, _ = text.partition(stop)
            stopped |= bool(mark)
        return Answer(
            text=text, tokens=len(tokens) + stopped, finish_reason="stop" if stopped else "length",
            reference=next(iter(_option_scores(reference)), None),
            boxes=boxes_of(request, text, self.assembly.image_processing) if request.boxes else None,
        )  # fmt: skip


def draws_of(requests: Sequence[Request]) -> list[Draw] | None:
    """One draw of tokens per request; None where the likeliest are wanted. The requests are of one task."""
    wanted = [request.draw for request in requests if request.draw is not None]
    draws = [Sampling(temperature=one.temperature, top_p=one.top_p, top_k=one.top_k, seed=one.seed) for one in wanted]
    return [Draw(sampling=sampling) for sampling in draws] or None


def _option_scores(scores: Sequence[ContinuationScore]) -> tuple[OptionScore, ...]:
    return tuple(OptionScore(logprob=score.logprob, tokens=score.tokens, greedy=score.greedy) for score in scores)


def _batches(requests: Sequence[Request], keys: Sequence[tuple[str, ...]], batch_size: int) -> list[list[int]]:
    """Request numbers in batches: questions on one picture together, longest first, so that memory runs out early."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    for members in groups.values():
        members.sort(key=lambda index: (-_size(requests[index]), index))
    ordered = sorted(groups.values(), key=lambda members: (-_size(requests[members[0]]), members[0]))
    flat = [index for members in ordered for index in members]
    return [flat[start : start + batch_size] for start in range(0, len(flat), batch_size)]


def _size(request: Request) -> int:
    return sum(len(message.text) for message in request.messages) + 1000 * len(request.images)


def circumstances(model: PreTrainedModel) -> dict[str, str]:
    """Precision, device and attention kernel of a model; they may change the choice between near-equal tokens."""
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


def thinking_tokens_of(config: Any) -> int:
    """New tokens that an answer needs of a model that is asked to think, at most half of its context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 2 * THINKING_TOKENS
    return min(THINKING_TOKENS, int(context) // 2)


def turn_of(message: Message) -> Turn:
    """The message with the offsets of its images, so that a typed `<image>` stays text."""
    offsets, text = [], ""
    for part in message.content:
        if isinstance(part, str):
            text += part
        else:
            offsets.append(len(text))
            text += IMAGE
    return Turn(role=message.role, text=text, offsets=tuple(offsets) if message.role == "user" else None)


def boxes_of(request: Request, text: str, processing: ImageProcessing | None) -> tuple[tuple[float, ...], ...] | None:
    """`Answer.boxes` of a text.

    In a control the model sees another picture. What it wrote counts as shares of that one, and lies in its own.
    """
    if request.boxes is None or not request.images:
        return None
    if processing is None or processing.boxes is None:
        raise EvalError(
            "The task scores boxes, and neither family nor vocabulary of this model says in which form it writes them. "
            "Set model.boxes in the recipe of its training."
        )
    shown = image_size(request.images[-1])
    boxes = read_boxes(without_thinking(text).text, processing, request.boxes, shown=shown)
    return tuple(box.numbers for box in boxes)
