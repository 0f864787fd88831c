"""Turn a checked request into model inputs: the conversation as turns and tokens, its pictures as pixels.

It runs in a worker thread, since decoding a picture takes time and would block the event loop.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor

from mm_moslora.batch import ProcessedImage
from mm_moslora.data.boxes.box_forms import FoundBox
from mm_moslora.data.chat.record_turns import IMAGE, Turn
from mm_moslora.serve.api.api_errors import ApiError
from mm_moslora.serve.api.chat_request import ChatMessage, ChatRequest, MessagePicture
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.serve.inference.request_images import PictureFile, open_pictures, refuse_stopped
from mm_moslora.serve.inference.served_models import Models
from mm_moslora.utils.errors import ModelError, MoSLoRAError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request as model inputs."""

    input_ids: Tensor
    images: list[ProcessedImage]
    boxes: Callable[[str], list[FoundBox]]
    """Reads the boxes of an answer, in pixels of the last picture's file."""

    @property
    def bytes(self) -> int:
        """Bytes of memory of the tensors."""
        tensors = [self.input_ids, *(tensor for item in self.images for tensor in item.tensors.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def refuse_unfit(request: ChatRequest, models: Models, limits: Limits) -> None:
    """Refuse a request by checks that need no decoded picture and no tokens."""
    if request.pictures and not models.takes_pictures:
        raise ApiError(
            f"{request.model} has no vision encoder; send text only.", param="messages", code="images_not_supported"
        )
    if request.thinking is not None and not models.encoder.has_switch:
        raise ApiError(
            f"The chat template of {request.model} has one form of prompts, so enable_thinking has no effect; leave it "
            "out.",
            param="chat_template_kwargs", code="unsupported_parameter",
        )  # fmt: skip
    longest = _longest(models, limits)
    if request.characters > longest * limits.characters_per_token:  # too long under any tokenizer
        raise ApiError(
            f"The conversation holds {request.characters} characters, far more than the {longest} tokens that this "
            "model holds with its answer. Shorten the conversation.",
            param="messages", code="context_length_exceeded",
        )  # fmt: skip


def prepare(
    request: ChatRequest, files: Sequence[PictureFile], models: Models, limits: Limits, *, stop: threading.Event
) -> Prepared:
    """Tokens and pixels of a request that has passed `refuse_unfit`; `stop` is set when they are no longer needed."""
    longest, tokens = _longest(models, limits), request.sampling.max_tokens
    visual = models.visual_tokens([file.size for file in files])
    if visual + tokens > longest:
        raise _too_long(f"The {len(files)} pictures take {visual} tokens", tokens, longest)
    pictures = open_pictures(files, stop=stop)
    refuse_stopped(stop)
    try:
        ids, images = models.prompt(turns_of(request.messages), pictures, thinking=request.thinking)
    except ModelError as error:
        raise ApiError(str(error), param="messages", code="invalid_image") from None
    except MoSLoRAError:
        raise ApiError(
            "The conversation does not fit the model's chat template (it cannot express one of the roles or texts).",
            param="messages", code="conversation_not_supported",
        ) from None  # fmt: skip
    if len(ids) + tokens > longest:
        raise _too_long(f"The conversation takes {len(ids)} tokens", tokens, longest)
    last = pictures[-1].size if pictures else None
    return Prepared(input_ids=ids, images=images, boxes=lambda text: models.boxes(text, last) if last else [])


def _longest(models: Models, limits: Limits) -> int:
    """Tokens that a prompt and its answer may take."""
    return min(limits.context, models.context or limits.context)


def _too_long(what: str, tokens: int, longest: int) -> ApiError:
    return ApiError(
        f"{what} and the answer up to {tokens}; the model's context has {longest}. Shorten the conversation, send "
        "fewer pictures or lower max_tokens.",
        param="messages", code="context_length_exceeded",
    )  # fmt: skip


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Messages as turns: consecutive messages of one role become one turn, and so do all system messages."""
    turns: list[Turn] = []
    for role, same in itertools.groupby(messages, key=attrgetter("role")):
        parts = [part for message in same for part in message.parts]
        if role == "user":
            turns.append(_question(parts))
        else:
            between = "\n\n" if role == "system" else "\n"
            turns.append(Turn(role=role, text=between.join(part for part in parts if isinstance(part, str))))
    return turns


def _question(parts: Sequence[str | MessagePicture]) -> Turn:
    """A user turn. Pictures keep their places in the message, each on its own line.

    Most clients send the text first and the pictures after it, while models are trained with the pictures first.
    Pictures at the end of a message are therefore moved to its beginning.
    """
    last_text = max((index for index, part in enumerate(parts) if isinstance(part, str)), default=-1)
    first_picture = next((index for index, part in enumerate(parts) if isinstance(part, MessagePicture)), len(parts))
    if first_picture > last_text:
        parts = [*parts[first_picture:], *parts[:first_picture]]
    text, offsets = "", []
    for index, part in enumerate(parts):
        if isinstance(part, MessagePicture):
            offsets.append(len(text))
            text += f"{IMAGE}\n"
        else:
            behind_text = index > 0 and isinstance(parts[index - 1], str)
            text += f"\n{part}" if behind_text else part
    return Turn(role="user", text=text, offsets=tuple(offsets))
