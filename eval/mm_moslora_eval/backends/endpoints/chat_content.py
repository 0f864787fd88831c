"""Messages with pictures in OpenAI's form."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_moslora_eval.protocol.model_interface import Message
from mm_moslora_eval.sources.document import ImageLike, StoredImage

_FIRST_BYTES = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}


def chat_messages(messages: Sequence[Message], images: Sequence[ImageLike]) -> list[dict[str, Any]]:
    """Messages in the OpenAI form, with pictures as data URLs in their places."""
    left = iter(images)
    result: list[dict[str, Any]] = []
    for message in messages:
        if all(isinstance(part, str) for part in message.content):
            result.append({"role": message.role, "content": message.text})
            continue
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(next(left))}}
            for part in message.parts
        ]
        result.append({"role": message.role, "content": parts})
    return result


def data_url(image: ImageLike) -> str:
    """A picture as a data URL: files unchanged, opened pictures as PNG."""
    if isinstance(image, bytes | Path | StoredImage):
        from mm_moslora.data.images.record_picture import read_picture
        from mm_moslora_eval.sources.source_images import open_image

        data = image if isinstance(image, bytes) else read_picture(image) if isinstance(image, Path) else image.read()
        image = open_image(data)
        kind = next((name for start, name in _FIRST_BYTES.items() if data.startswith(start)), None)
        if kind is not None:
            return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
