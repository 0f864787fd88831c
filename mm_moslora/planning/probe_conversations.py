"""The fixed conversations of the probes of a model: as training encodes them, and as its own processor does."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mm_moslora.batch import Example, ProcessedImage
from mm_moslora.data.chat.chat_template import Template
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.models.assembly import Parts
from mm_moslora.models.vlm import is_multimodal

_QUESTION, _ANSWER = "What is in the picture?", "A red square."
SIGHTED = (Turn(role="user", text=f"<image>\n{_QUESTION}"), Turn(role="assistant", text=_ANSWER))
"""The fixed conversation with a picture."""
BLIND = (
    Turn(role="user", text="Say one."), Turn(role="assistant", text="One."),
    Turn(role="user", text="And two?"), Turn(role="assistant", text="Two, as you wish."),
)  # fmt: skip
WIDE, _TALL = (64, 48), (90, 120)
"""Sizes of two pictures: processors cut and join others otherwise."""


@functools.cache
def _picture(size: tuple[int, int]) -> Image.Image:
    """Noise with a tint, so that no tile is plain."""
    noise = Image.effect_noise(size, 60).convert("RGB")
    return Image.blend(noise, Image.new("RGB", noise.size, (200, 30, 30)), 0.5)


def stock_inputs(owner: Any, turns: Sequence[Turn], size: tuple[int, int] = WIDE) -> dict[str, Any]:
    """What a processor or tokenizer itself makes of a conversation and a picture of this size; of one that ends with a
    question, the prompt. A tokenizer without a chat template gets the plain one."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        text = turn.text.replace("<image>\n", "")
        parts = [{"type": "image", "image": _picture(size)}] * turn.images + [{"type": "text", "text": text}]
        messages.append({"role": turn.role, "content": parts if hasattr(owner, "image_processor") else text})
    more: dict[str, Any] = {"add_generation_prompt": turns[-1].role == "user"}
    if not hasattr(owner, "image_processor") and owner.chat_template is None:
        more["chat_template"] = Template(owner).source
    return dict(owner.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **more))


def conversations_of(parts: Parts) -> list[tuple[Sequence[Turn], tuple[int, int]]]:
    """With sizes of their pictures; all with pictures where the processor takes no text alone."""
    if not is_multimodal(parts.model):
        return [(BLIND, WIDE), (BLIND[2:], WIDE)]
    seeing: list[tuple[Sequence[Turn], tuple[int, int]]] = [(SIGHTED, WIDE), (SIGHTED, _TALL)]
    try:
        stock_inputs(parts.template_processor or parts.tokenizer, BLIND)
    except Exception:  # whatever the processor raises
        return seeing
    return [(BLIND, WIDE), *seeing]


def example_of(parts: Parts, turns: Sequence[Turn], size: tuple[int, int] = WIDE) -> Example:
    """A conversation as training encodes it."""
    pictures = pictures_of(parts, turns, size)
    encoded = ConversationEncoder.of(parts).encode(turns, pictures=[item.placeholders for item in pictures])
    return Example(id="probe", input_ids=encoded.input_ids, supervised=encoded.supervised, pictures=pictures)


def pictures_of(parts: Parts, turns: Sequence[Turn], size: tuple[int, int]) -> Sequence[ProcessedImage]:
    """The noise of a conversation's pictures, as training prepares it."""
    processing = parts.image_processing
    return processing.process([_picture(size)]) if processing and any(turn.images for turn in turns) else []


def differs_at(parts: Parts, example: Example, expected: Sequence[int]) -> int | None:
    """The first token that is not that of the processor, but for ends of answers that its template does not write."""
    ids, end = example.input_ids.tolist(), parts.tokenizer.eos_token_id
    written = [n for n, learned in zip(ids, example.supervised.tolist(), strict=True) if not learned or n != end]
    places = [first_difference(own, expected) for own in (ids, written)]
    return None if None in places else places[0]


def first_difference(ids: Sequence[int], expected: Sequence[int]) -> int | None:
    """None where the ids begin the expected ones."""
    different = (at for at, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1])
    return next(different, len(expected) if len(ids) > len(expected) else None)


def runs_of(example: Example) -> list[tuple[list[int], bool]]:
    """Stretches of ids that are all supervised, or not at all."""
    runs: list[tuple[list[int], bool]] = []
    for number, supervised in zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True):
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(number)
    return runs


def decoded(parts: Parts, ids: Sequence[int]) -> str:
    """Text with a run of image tokens as one."""
    text, image = str(parts.tokenizer.decode(list(ids))), getattr(parts.processor, "image_token", None)
    while image and image * 2 in text:
        text = text.replace(image * 2, image)
    return text.replace("\n", "\\n")
