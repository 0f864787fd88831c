"""The prompt of a document: a template with fragments that are omitted if one of their fields is empty."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mm_moslora.utils.errors import EvalError, suggestion
from mm_moslora_eval.protocol.coded_prompts import WORDINGS
from mm_moslora_eval.protocol.model_interface import IMAGE, Message, Part
from mm_moslora_eval.sources.document import Document

_FIELD = re.compile(r"\{(\w+(?:-\w+)*)\}")
_IMAGE_TAG = re.compile(r"<image(?: (\d+))?>")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The wording of a task.

    `template` and `fragments` name fields in braces: `question`, `hint`, `options`, `instruction`, a further column of
    the data, or a fragment. A fragment disappears when any field that it names is empty.
    """

    template: str = "{question}{instruction}"
    fragments: dict[str, str] = field(default_factory=dict)
    option: str = "{letter}. {text}"
    option_separator: str = "\n"
    instruction: str = ""
    open_instruction: str | None = None
    """Instruction for documents without options; None: `instruction`."""
    chinese_instruction: str | None = None
    """Instruction for questions, hints or options with Chinese characters; None: `instruction`."""
    chinese_open_instruction: str | None = None
    """The same for documents without options; None: `open_instruction`."""
    default_question: str | None = None
    """Question for documents without one (captions); None: such a document cannot be asked."""
    remove: tuple[str, ...] = ()
    """Texts that are removed from the question."""
    strip: bool = False
    """Strip the question before texts are removed."""
    strip_rest: bool = False
    """Strip the question after texts are removed."""
    capitalize: bool = False
    """Capitalise the question: its first letter in upper case, all others in lower case."""
    images: str = "first"
    """Position of images if the text has no `<image>` tags: first or last."""
    image_separator: str = "\n"
    """Separator between the images and the text, as in LLaVA's training records."""
    system: str | None = None
    """System message."""
    function: str | None = None
    """A name in `coded_prompts.WORDINGS`, for prompts that need code; the template then is not used."""

    def __post_init__(self) -> None:
        if self.images not in ("first", "last"):
            raise EvalError(f"prompt.images is {self.images!r}, expected first or last.")
        if self.function is not None and self.function not in WORDINGS:
            known = ", ".join(sorted(WORDINGS))
            raise EvalError(
                f"prompt.function is {self.function!r}, known: {known}.{suggestion(self.function, WORDINGS)}"
            )

    def text(self, document: Document) -> str:
        """The user's text, including the image tags of the data."""
        if self.function is not None:
            return WORDINGS[self.function](document)
        fields = {**document.extra, "category": document.category or "", "hint": document.hint or ""}
        fields["question"] = self._question(document.question or self.default_question or "")
        fields["options"] = self.option_separator.join(
            _fill(self.option, {"letter": letter, "text": text}) for letter, text in document.options.items()
        )
        fields["instruction"] = self._instruction(document)
        for name, fragment in self.fragments.items():
            used = _FIELD.findall(fragment)
            fields[name] = _fill(fragment, fields) if all(fields.get(item) for item in used) else ""
        return _fill(self.template, fields)

    def messages(self, document: Document) -> tuple[Message, ...]:
        """The conversation that asks the document.

        Raises:
            EvalError: no question, or image tags in the text that do not fit the document's images.
        """
        if not document.question and self.default_question is None and "{question}" in self.template:
            raise EvalError("the document has no question")
        text = self.text(document)
        content = self._content(text, self._order(text, len(document.images)))
        user = Message(role="user", content=content)
        return (user,) if self.system is None else (Message(role="system", content=(self.system,)), user)

    def image_order(self, document: Document) -> tuple[int, ...]:
        """The number of the document's image for each image part of its messages.

        `<image 2>` is the second image and may occur anywhere and several times. Images without a numbered tag are not
        shown (MMMU). Without numbers every image is shown once, in order.

        Raises:
            EvalError: see `messages`.
        """
        return self._order(self.text(document), len(document.images))

    @staticmethod
    def _order(text: str, images: int) -> tuple[int, ...]:
        tags = _IMAGE_TAG.findall(text)
        if not tags:
            return tuple(range(images))
        if all(tags):
            order = tuple(int(number) - 1 for number in tags)
            if not set(order) <= set(range(images)):
                raise EvalError(
                    f"the text names image {max(order) + 1}, the document has {images} images; name existing ones"
                )
            return order
        if any(tags) or len(tags) != images:
            raise EvalError(
                f"the text has {len(tags)} image tags, the document has {images} images; write one tag per image, or "
                "number all tags"
            )
        return tuple(range(images))

    def _question(self, question: str) -> str:
        if self.strip:
            question = question.strip()
        for piece in self.remove:
            question = question.replace(piece, "")
        if self.strip_rest:
            question = question.strip()
        return question.capitalize() if self.capitalize else question

    def _instruction(self, document: Document) -> str:
        written = document.question + (document.hint or "") + "".join(document.options.values())
        chinese = _CHINESE.search(written) is not None
        if not document.options and self.open_instruction is not None:
            translated, plain = self.chinese_open_instruction, self.open_instruction
        else:
            translated, plain = self.chinese_instruction, self.instruction
        return translated if chinese and translated is not None else plain

    def _content(self, text: str, order: Sequence[int]) -> tuple[Part, ...]:
        if _IMAGE_TAG.search(text):
            parts: list[Part] = []
            for index, piece in enumerate(_IMAGE_TAG.split(text)[::2]):  # every second piece is a tag's number
                parts += [IMAGE, piece] if index else [piece]
            return tuple(part for part in parts if part != "")
        if not order:
            return (text,)
        places: tuple[Part, ...] = (IMAGE,) * len(order)
        separator = self.image_separator
        return (*places, separator + text) if self.images == "first" else (text + separator, *places)


def _fill(template: str, fields: Mapping[str, str]) -> str:
    """Replace `{name}` in one pass, so that braces within the values stay as they are."""
    return _FIELD.sub(lambda match: fields.get(match.group(1), ""), template)
