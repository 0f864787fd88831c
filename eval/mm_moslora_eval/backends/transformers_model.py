"""A transformers model with its own processor and chat template, behind the runner's `Model` protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mm_moslora.batch import VideoSampling
from mm_moslora.config import BoxChoice
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.preprocessing_print import check_processor, trained_videos
from mm_moslora.models.decoding.generation import stop_token_ids
from mm_moslora.models.decoding.token_sampling import Draw, choose
from mm_moslora.models.families import box_form_of
from mm_moslora.models.load_model import trained_boxes
from mm_moslora.models.model_sizes import load_base
from mm_moslora.models.processing.processor_images import ProcessorImageProcessing
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import EvalError, ModelError, reason_of
from mm_moslora.utils.network.hub_access import hub_or_cache
from mm_moslora.utils.run_paths import PREPROCESSING
from mm_moslora_eval.backends.local_model import boxes_of, circumstances, draws_of, thinking_tokens_of
from mm_moslora_eval.backends.model_fingerprint import ReasoningMarkers, model_fingerprint
from mm_moslora_eval.protocol.model_interface import Answer, FinishReason, OptionRequest, OptionScore, Request
from mm_moslora_eval.sources.source_images import open_image
from mm_moslora_eval.sources.source_videos import WholeVideo

_GROWING = ("token_type_ids", "mm_token_type_ids")
"""Inputs with one entry per token, besides ids and mask."""


class _LogitsWatch(LogitsProcessor):
    """Notes which rows had logits without a largest, from which `generate` would take a token all the same."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """See transformers; the scores are not changed."""
        seen = ~scores.amax(dim=-1).isfinite()  # the largest of NaN and anything is NaN
        self._seen = seen if self._seen is None else self._seen | seen
        return scores

    def wrong(self, count: int) -> list[int]:
        """Numbers of such requests, each of which has as many rows as it has beams."""
        return [] if self._seen is None else self._seen.view(count, -1).any(dim=1).nonzero()[:, 0].tolist()


class _Drawn(LogitsProcessor):
    """Draws the tokens of an answer as `LocalModel` does, so that they do not depend on what else is in the batch."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        self._draws = draws

    @classmethod
    def of(cls, requests: Sequence[Request]) -> list[_Drawn]:
        """The processor that the requests need, if any."""
        draws = draws_of(requests)
        return [cls(draws)] if draws else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """See transformers; the drawn token is the only one that is left."""
        drawn = choose(scores.float(), self._draws)
        tokens = [0 if isinstance(token, ModelError) else token for token in drawn]  # the watch has noted these
        kept = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, kept, 0.0)


class TransformersModel:
    """An image-text-to-text model, or a causal language model for text tasks."""

    reads_boxes = True

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        name: str,
        reference: bool = False,
        encoder: ConversationEncoder | None = None,
        boxes: BoxChoice | None = "auto",
        whole_videos: bool = True,
        trained_frames: int | None = None,
        trained_fps: float | None = None,
    ) -> None:
        self.trained_frames, self.trained_fps = trained_frames, trained_fps
        self._encoder, self._boxes, self._whole_videos = encoder, boxes, whole_videos
        self._thinks = encoder is not None and encoder.asks_to_think
        self.model, self.processor = model.eval(), processor
        self.name, self._reference = name, reference
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        own = None if encoder is None else ReasoningMarkers(encoder.template, self._tokenizer)
        self._markers = own or ReasoningMarkers.of_processor(processor)
        self.thinking_markers = self._markers.pairs

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: torch.dtype | str = "auto",
        reference: bool = False,
        device: torch.device | None = None,
        other_preprocessing: bool = False,
    ) -> TransformersModel:
        """Load by hub id or folder, onto this rank's accelerator or the given device."""
        import mm_moslora.models.processing.llava_processor
        import mm_moslora.models.vlm  # noqa: F401  (registers this project's model type with the Auto classes)

        try:
            with hub_or_cache(name):
                found = type(AutoConfig.from_pretrained(name, trust_remote_code=False))
                sees = found in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
                kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
                model = load_base(kind, name, dtype=dtype)
                reader: Any = AutoProcessor if sees else AutoTokenizer
                processor = reader.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise EvalError(
                f"{name!r} does not load with transformers ({reason_of(error)}). Give a hub id or a folder as hf:ID."
            ) from error
        shown = f"hf:{name}"
        token = getattr(processor, "image_token_id", None)
        images = None if token is None else ProcessorImageProcessing(processor, image_token_id=token)
        stops = stop_token_ids(model, getattr(processor, "tokenizer", processor).eos_token_id)
        if check_processor(name, processor, images=images, stop_ids=stops, accepted=other_preprocessing):
            shown += ", other preprocessing"
        model.to(device or distributed.device())
        frames, fps, whole = trained_videos(name) if (Path(name) / PREPROCESSING).is_file() else (None, None, True)
        return cls(
            model, processor, name=shown, reference=reference, boxes=trained_boxes(name), whole_videos=whole,
            trained_frames=frames, trained_fps=fps,
        )  # fmt: skip

    @property
    def videos(self) -> VideoSampling | None:
        """Chooses the frames of videos that the model takes as such; None: it takes their frames as pictures."""
        return self._processing.videos if self._whole_videos and self.processor is not self._tokenizer else None

    @cached_property
    def _processing(self) -> ProcessorImageProcessing:
        form = box_form_of(self.processor) if self._boxes == "auto" else self._boxes
        return ProcessorImageProcessing(self.processor, image_token_id=0, boxes=form)

    @cached_property
    def fingerprint(self) -> str:
        """Hash over weights, configuration, template, tokenizer and image processing."""
        own = model_fingerprint(
            self.model, processor=self.processor, tokenizer=self._tokenizer, template=self._template
        )
        return self._markers.fingerprint(own)

    @property
    def details(self) -> dict[str, str]:
        """Details for the run's records: precision, device, attention kernel."""
        return circumstances(self.model)

    @property
    def thinking_tokens(self) -> int:
        """See `LocalModel.thinking_tokens`."""
        return thinking_tokens_of(self.model.config) if self._thinks else 0

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `mm_moslora_eval.protocol.model_interface.Model.generate`."""
        for indices in self._batches(requests, 1 if self._reference else batch_size):
            chosen = [requests[index] for index in indices]
            inputs = self._inputs(chosen)
            limit = max(request.max_new_tokens for request in chosen)
            watch = _LogitsWatch()
            processors = [watch, *_Drawn.of(chosen)]
            output: Any = self.model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, num_beams=chosen[0].beams,
                pad_token_id=self._tokenizer.pad_token_id, temperature=None, top_p=None, top_k=None,
                logits_processor=LogitsProcessorList(processors),
            )  # fmt: skip
            wrong = watch.wrong(len(chosen))
            new = output[:, inputs["input_ids"].shape[1] :]
            scores = self._scores(inputs, ["" if self._thinks else request.reference for request in chosen])
            for number, index in enumerate(indices):
                if number not in wrong:
                    yield index, self._answer(chosen[number], new[number].tolist(), scores[number])
            if wrong:
                raise RuntimeError(
                    f"the model's logits for {chosen[wrong[0]].id!r} are not finite; in half precision they may have "
                    "overflowed, so try --precision fp32"
                )

    @torch.inference_mode()
    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """See `mm_moslora_eval.protocol.model_interface.Model.loglikelihood`; one full forward pass per option."""
        for index, item in enumerate(requests):
            inputs = self._inputs([item.request])
            scores = [self._scores(inputs, [option])[0] for option in item.options]
            empty = [option for option, score in zip(item.options, scores, strict=True) if score is None]
            if empty:
                raise RuntimeError(f"option {empty[0]!r} has no tokens, so it has no log-likelihood to compare")
            yield index, tuple(score for score in scores if score is not None)

    def close(self) -> None:
        """Nothing to free."""

    @property
    def _template(self) -> str | None:
        return getattr(self.processor, "chat_template", None) or getattr(self._tokenizer, "chat_template", None)

    @staticmethod
    def _batches(requests: Sequence[Request], size: int) -> Iterator[list[int]]:
        """Request numbers, longest first.

        Processors cannot mix prompts with and without pictures in a batch; some pad shorter videos to more frames.
        """
        kinds = [_kind(request) for request in requests]
        for kind in sorted(set(kinds), reverse=True):
            order = [index for index, own in enumerate(kinds) if own == kind]
            order.sort(key=lambda index: -sum(len(message.text) for message in requests[index].messages))
            yield from (order[start : start + size] for start in range(0, len(order), size))

    def _inputs(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        texts = [self._text(request) for request in requests]
        pictures = [
            [open_image(image) for image in request.images if not isinstance(image, WholeVideo)] for request in requests
        ]
        videos = [image.video() for request in requests for image in request.images if isinstance(image, WholeVideo)]
        has_bos = self._tokenizer.bos_token is not None and texts[0].startswith(self._tokenizer.bos_token)
        arguments: dict[str, Any] = {"return_tensors": "pt", "padding": True, "add_special_tokens": not has_bos}
        if any(pictures):
            if self.processor is self._tokenizer:
                raise EvalError(f"The task shows pictures, but {self.name} is a language model. Choose a text task.")
            arguments["images"] = pictures
        if videos:
            arguments["videos"] = [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos]
            arguments |= {"video_metadata": [video.metadata for video in videos], "do_sample_frames": False}
        encoded = self.processor(text=texts, **arguments)
        device = next(self.model.parameters()).device
        return {
            name: value.to(device, self.model.dtype) if value.is_floating_point() else value.to(device)
            for name, value in encoded.items()
            if isinstance(value, Tensor)
        }

    def _text(self, request: Request) -> str:
        if self._template is None:
            if request.images:
                raise EvalError(f"{self.name} has no chat template, so a picture has no place in its prompt.")
            return "\n".join(message.text for message in request.messages)
        messages = []
        kinds = ("video" if isinstance(image, WholeVideo) else "image" for image in request.images)
        for message in request.messages:
            parts = [
                {"type": "text", "text": p} if isinstance(p, str) else {"type": next(kinds)} for p in message.parts
            ]
            plain = self.processor is self._tokenizer
            messages.append({"role": message.role, "content": message.text if plain else parts})
        text = str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if self._encoder is None:
            return text
        return text.removesuffix(self._encoder.template.generation_prompt()) + self._encoder.answer_prompt

    def _answer(self, request: Request, tokens: list[int], reference: OptionScore | None) -> Answer:
        stops = stop_token_ids(self.model, self._tokenizer.eos_token_id)
        end = next((position for position, token in enumerate(tokens) if token in stops), len(tokens))
        stopped = end < min(len(tokens), request.max_new_tokens)
        text = self._markers.text(
            tokens[: min(end, request.max_new_tokens)], partial(self._tokenizer.decode, skip_special_tokens=True)
        )
        text = text if self._encoder is None else self._encoder.opened() + text
        for stop in request.stop:
            text, mark, _ = text.partition(stop)
            stopped |= bool(mark)
        used = min(end + stopped, request.max_new_tokens)
        boxes = boxes_of(request, text, self._processing) if request.boxes else None
        reason: FinishReason = "stop" if stopped else "length"
        return Answer(text=text, tokens=used, finish_reason=reason, reference=reference, boxes=boxes)

    def _scores(self, inputs: dict[str, Tensor], texts: Sequence[str]) -> list[OptionScore | None]:
        """Scores of one continuation per prompt, padded on the right; None for a text without tokens."""
        # A tokenizer that joins text with the end of the prompt would give the model other tokens than these.
        ids = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        longest = max(len(row) for row in ids)
        if not longest:
            return [None for _ in ids]
        device = inputs["input_ids"].device
        more = torch.tensor([row + [self._tokenizer.pad_token_id] * (longest - len(row)) for row in ids], device=device)
        valid = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
        extended = dict(inputs)
        extended["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        extended["attention_mask"] = torch.cat([inputs["attention_mask"], valid], dim=1)
        for name in _GROWING:
            if name in extended:
                extended[name] = torch.cat([extended[name], torch.zeros_like(more)], dim=1)
        few = {"logits_to_keep": longest + 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}
        logits: Any = self.model(**extended, **few).logits
        # The model may insert visual tokens, so positions count from the end.
        steps = logits[:, -longest - 1 : -1].float().log_softmax(dim=-1)
        picked = steps.gather(2, more[..., None])[..., 0]
        best = steps.argmax(dim=-1)
        return [
            OptionScore(
                logprob=float(picked[index, : len(row)].sum()), tokens=len(row),
                greedy=best[index, : len(row)].tolist() == row,
            ) if row else None
            for index, row in enumerate(ids)
        ]  # fmt: skip


def _kind(request: Request) -> tuple[tuple[tuple[int, int, int], ...], bool]:
    """The shapes of a request's videos, and whether it has pictures."""
    videos = [image.shape for image in request.images if isinstance(image, WholeVideo)]
    return tuple(videos), len(request.images) > len(videos)
