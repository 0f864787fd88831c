"""Chat templates of ready-made vision-language models, which place pictures themselves among the parts of a content.

The shape of a turn is its role and, for a question with pictures or videos, the order of its parts: `user:it` is a
picture and a text, `user:vt` a video and a text. A template may write pictures before all texts, or wrap them; the
scaffold contains all of this text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mm_moslora.config.llava_chat_templates import without_note
from mm_moslora.data.chat.chat_template import Template
from mm_moslora.data.chat.record_forms import IMAGE, VIDEO
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.utils.errors import ConfigError

PREFIX_TEMPLATE = (
    "{%- for message in messages -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}{%- endfor -%}{%- endfor -%}"
    "{{ bos_token }}"
    "{%- for message in messages -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
    "{{ '\n' if message['role'] == 'user' else eos_token }}{%- endfor -%}"
)
"""PaliGemma, which has no chat template: pictures, BOS, the question and a line break, then the answer."""
_KINDS = {IMAGE: "i", VIDEO: "v"}


class ProcessorTemplate(Template):
    """The chat template of a processor."""

    def __init__(self, processor: Any) -> None:
        own = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
        source = own.get("default") if isinstance(own, dict) else own
        if source is None and type(processor).__name__ == "PaliGemmaProcessor":
            source = PREFIX_TEMPLATE
        if source is None:
            raise ConfigError(
                f"{type(processor).__name__} has no chat template, so conversations cannot be encoded. Choose an "
                "instruction-tuned checkpoint, or put a chat_template.jinja into its folder."
            )
        super().__init__(processor.tokenizer)
        self.source, self._processor = without_note(source), processor
        self.video_text = str(getattr(processor, "video_token", None) or processor.image_token)
        self.media = re.compile(f"{re.escape(processor.image_token)}|{re.escape(self.video_text)}")

    def missing_bos(self) -> list[int]:
        """See `Template.missing_bos`; also what the processor itself puts before a text."""
        if ids := super().missing_bos():
            return ids
        start = self.plan(("user", "assistant")).slots[0].before or "a"
        own = self.tokenizer.encode(start, add_special_tokens=False)
        try:
            given = list(self._processor(text=[start], add_special_tokens=False)["input_ids"][0])
        except Exception:  # some take no text without a picture
            return []
        lead = given[: len(given) - len(own)]
        return lead if lead + own == given else []

    def contents_of(self, turn: Turn) -> tuple[list[Turn], str]:
        """See `Template.contents_of`; a question with pictures has one content per text between them."""
        texts = turn.parts()
        if len(texts) == 1:
            return super().contents_of(turn)
        kinds = ""
        contents: list[Turn] = []
        for index, text in enumerate(texts):
            kinds += _KINDS[turn.marks[index - 1]] if index else ""
            # Templates write line breaks around a picture themselves.
            text = text.removeprefix("\n") if index else text
            text = text.removesuffix("\n") if index + 1 < len(texts) else text
            if text:
                kinds += "t"
                contents.append(Turn(role=turn.role, text=text, offsets=(), marked=turn.marked))
        return contents, kinds

    def content(self, kinds: str, texts: Iterator[str]) -> Any:
        """See `Template.content`."""
        shown = {"i": {"type": "image"}, "v": {"type": "video"}}
        parts = [shown[kind] if kind in shown else {"type": "text", "text": next(texts)} for kind in kinds or "t"]
        return [part for part in parts if part.get("text") != ""] if kinds == "c" else parts

    def rendered(self, messages: list[dict[str, Any]], **settings: Any) -> str:
        """See `Template.rendered`."""
        if any(part["type"] == "video" for message in messages for part in message["content"]):
            # Some processors have another template for conversations with videos.
            return str(self._processor.apply_chat_template(messages, tokenize=False, **settings))
        return super().rendered(messages, **settings)
