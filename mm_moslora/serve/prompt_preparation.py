"""A request as model inputs: the conversation as turns and tokens, its pictures as pixels. Runs in worker threads."""

from __future__ import annotations

import binascii
import io
import itertools
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from PIL import Image
from torch import Tensor

from mm_moslora.batch import ProcessedImage
from mm_moslora.data.boxes.box_forms import FoundBox
from mm_moslora.data.chat.record_turns import IMAGE, Turn
from mm_moslora.data.images.record_picture import FORMATS, ImageError, check_size, open_image_bytes
from mm_moslora.data.record_faults import Code
from mm_moslora.serve.api_errors import ApiError, client_left
from mm_moslora.serve.chat_request import ChatMessage, ChatRequest, MessagePicture
from mm_moslora.serve.request_limits import Limits
from mm_moslora.serve.served_models import Models
from mm_moslora.utils.errors import ModelError, MoSLoRAError

_DATA = re.compile(r"data:(?P<kind>image/[a-z0-9.+-]{1,40})(?:;[a-z-]{1,20}=[a-z0-9-]{1,20})*;base64,", re.IGNORECASE)
_SAID = {
    Code.IMAGE_EMPTY: "is empty",
    Code.IMAGE_FORMAT: f"is not a picture in an accepted format ({', '.join(FORMATS)})",
    Code.IMAGE_DAMAGED: "is damaged or cut short",
    Code.IMAGE_ASPECT: "is too narrow or has no pixels",
    Code.IMAGE_TOO_LARGE: "has too many pixels",
}


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """The bytes of a picture and the contents of its header."""

    data: bytes
    where: str
    """Its place in the request."""
    size: tuple[int, int]
    """Width and height, pixels; 0 x 0 where the header cannot be read, which decoding will report."""
    mode: str
    """Pillow's mode; with `;transparency` where one colour is transparent."""

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.size[0] * self.size[1]


def picture_files(pictures: Sequence[MessagePicture], limits: Limits, *, stop: threading.Event) -> list[PictureFile]:
    """The bytes and headers of the pictures of one request, in order; no pixel is decoded, and the URLs are emptied."""
    files, pixels_left = [], limits.images_pixels
    for picture in pictures:
        refuse_stopped(stop)
        file = _with_header(_bytes(picture), picture.where)
        picture.url = ""
        try:
            if file.mode:  # without a readable header, decoding decides
                check_size(file.size, "picture")
        except ImageError as error:
            raise _wrong(file.where, _SAID[error.code]) from None
        pixels_left -= file.pixels
        if file.pixels > limits.image_pixels:
            what = f"has {file.pixels} pixels, at most {limits.image_pixels} are allowed; scale it down"
            raise _wrong(file.where, what)
        if pixels_left < 0:
            what = f"takes the request above {limits.images_pixels} pixels in all; scale pictures down"
            raise _wrong(file.where, what)
        files.append(file)
    return files


def refuse_large(files: Sequence[PictureFile], limits: Limits, *, squares: bool) -> None:
    """Refuse pictures that take too much memory when they are decoded one after the other and processed together."""
    copies, peak, allowed = 0, 0, limits.pictures_bytes
    for file in files:
        wide = file.mode in ("I", "F", "LAB") or file.mode.startswith("I;16")
        clear = file.mode in ("RGBA", "RGBa", "LA", "La", "PA") or file.mode.endswith(";transparency")
        copies += 4 * file.pixels
        # Besides the copy that is kept: copies in the file's mode and intermediate ones, then the image processor's
        # before it scales the picture down.
        peak = max(peak, file.pixels * (24 if wide else 12 if clear else 8))
        peak = max(peak, 6 * (max(file.size) ** 2 if squares else file.pixels))
        if copies + peak > allowed:
            raise _wrong(
                file.where,
                f"takes the request to {(copies + peak) // 2**20} MiB of memory when it is opened ({file.size[0]} x "
                f"{file.size[1]} pixels, {file.mode}), at most {allowed // 2**20} are allowed; scale pictures down",
            )


def open_pictures(files: Sequence[PictureFile], *, stop: threading.Event) -> list[Image.Image]:
    """Decode pictures to RGB, in order."""
    opened = []
    for file in files:
        refuse_stopped(stop)
        try:
            opened.append(open_image_bytes(file.data, name="picture"))
        except ImageError as error:
            raise _wrong(file.where, _SAID.get(error.code, "cannot be used")) from None
    return opened


def refuse_stopped(stop: threading.Event) -> None:
    """Stop work with an abandoned result."""
    if stop.is_set():
        raise client_left()


def _bytes(picture: MessagePicture) -> bytes:
    url = picture.url
    if not url[:5].lower().startswith("data:"):  # no socket is opened for an address
        raise ApiError(
            f"{picture.where} is not a data URL; remote images are disabled on this server. Send the picture as "
            "data:image/png;base64,...",
            param=picture.where, code="remote_images_disabled",
        )  # fmt: skip
    head = _DATA.match(url)
    if head is None:
        raise _wrong(picture.where, "is not a base64 data URL of a picture; expected data:image/png;base64,...")
    text = url[head.end() :]
    try:
        if len(text) % 4:  # the decoder accepts excess padding
            raise ValueError
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise _wrong(picture.where, "holds characters or padding that are not valid base64") from None


def _with_header(data: bytes, where: str) -> PictureFile:
    size, mode = (0, 0), ""
    try:
        # The limits of the server replace Pillow's, which would warn or raise at other sizes.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
            mode = image.mode + (";transparency" if "transparency" in image.info else "")
    except Image.DecompressionBombError:
        raise _wrong(where, "has too many pixels; scale it down") from None
    except Exception:  # noqa: S110  (decoders raise nearly anything for broken headers; decoding will report the cause)
        pass
    return PictureFile(data=data, where=where, size=size, mode=mode)


def _wrong(where: str, what: str) -> ApiError:
    return ApiError(f"{where} {what}.", param=where, code="invalid_image")


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
    """A user turn. Pictures keep their places in the message, each on its own line, but those at its end."""
    # Most clients send the text first and the pictures after it, while models are trained with the pictures first.
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
