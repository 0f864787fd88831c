"""The prompt of a document: a template with fragments that are omitted if one of their fields is empty."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.protocol.model_interface import IMAGE, Message, Part
from mm_moslora_eval.scoring.named_parts import NamedParts
from mm_moslora_eval.sources.document import Document

_FIELD = re.compile(r"\{(\w+(?:-\w+)*)\}")
FIELDS = ("question", "options", "instruction", "category", "hint")
"""What a template may name of every document; fragments and further columns of the data stand beside them."""
_TAGS = {"plain": re.compile("<image>"), "numbered": re.compile(r"<image (\d+)>")}
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
WORDINGS: NamedParts[Callable[[Document], str]] = NamedParts("prompt function", {}, table="PROMPTS")
"""Name -> the user's text for a document, of benchmarks whose prompts a template cannot express."""


@dataclass(frozen=True, kw_only=True)
class TaskPrompt:
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
    image_tags: Literal["plain", "numbered", "none"] = "plain"
    """Tags of the data that are places of images. plain: `<image>`, one per image, as in LLaVA's records. numbered:
    `<image 2>` is the second image (MMMU). All other tags are text."""
    strip_parts: bool = False
    """Strip the texts between the images."""
    images: str = "first"
    """Position of images if the text has no places for them: first or last."""
    image_separator: str = "\n"
    """Separator between the images and the text, as in LLaVA's training records."""
    system: str | None = None
    """System message."""
    function: str | None = None
    """A name in `WORDINGS`, for prompts that need code; the template then is not used."""

    def __post_init__(self) -> None:
        if self.images not in ("first", "last"):
            raise EvalError(f"prompt.images is {self.images!r}, expected first or last.")
        if self.function is not None:
            WORDINGS.check(self.function)

    @property
    def columns(self) -> set[str]:
        """Further columns of the data that the template names."""
        named = () if self.function else _FIELD.findall(self.template)
        return set(named) - {*FIELDS, *self.fragments}

    def decides(self) -> dict[str, Any]:
        """What decides an answer, besides the places of pictures, which the key of every answer covers."""
        decides = {key: value for key, value in asdict(self).items() if key not in ("image_tags", "strip_parts")}
        return decides | {"fragments": {name: text for name, text in self.fragments.items() if text}}

    def text(self, document: Document) -> str:
        """The user's text, including the image tags of the data."""
        if self.function is not None:
            return WORDINGS[self.function](document)
        fields = {**document.extra, "category": document.category or "", "hint": document.hint or ""}
        fields["question"] = self._question(document.question or self.default_question or "")
        fields["options"] = self.option_separator.join(
            fill(self.option, {"letter": letter, "text": text}) for letter, text in document.options.items()
        )
        fields["instruction"] = self._instruction(document)
        for name, fragment in self.fragments.items():
            used = _FIELD.findall(fragment)
            fields[name] = fill(fragment, fields) if all(fields.get(item) for item in used) else ""
        return fill(self.template, fields)

    def messages(self, document: Document) -> tuple[Message, ...]:
        """The conversation that asks the document."""
        if not document.question and self.default_question is None and "{question}" in self.template:
            raise EvalError("the document has no question")
        content = self._content(*self._split(document), len(document.images))
        user = Message(role="user", content=content)
        return (user,) if self.system is None else (Message(role="system", content=(self.system,)), user)

    def image_order(self, document: Document) -> tuple[int, ...]:
        """The number of the document's image for each image part of its messages.

        A numbered tag may occur anywhere and several times. Images without a numbered tag are not shown (MMMU). Without
        tags every image is shown once, in order.
        """
        order = self._split(document)[1]
        return order or tuple(range(len(document.images)))

    def _split(self, document: Document) -> tuple[list[str], tuple[int, ...]]:
        """The texts around the places of images, and the number of the image in each place."""
        text, images = self.text(document), len(document.images)
        tags = list(_TAGS[self.image_tags].finditer(text)) if self.image_tags != "none" else []
        if self.image_tags == "numbered":
            tags = [tag for tag in tags if 1 <= int(tag[1]) <= images]  # a tag without an image stays text
            order = tuple(int(tag[1]) - 1 for tag in tags)
        else:
            order = tuple(range(len(tags)))
            if tags and len(tags) != images:
                raise EvalError(
                    f"the text has {len(tags)} image tags, the document has {images} images; write one tag per image, "
                    "or set prompt.image_tags to numbered or none"
                )
        ends = [0, *(tag.end() for tag in tags)]
        starts = [*(tag.start() for tag in tags), len(text)]
        return [text[end:start] for end, start in zip(ends, starts, strict=True)], order

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

    def _content(self, texts: Sequence[str], order: Sequence[int], images: int) -> tuple[Part, ...]:
        texts = [text.strip() for text in texts] if self.strip_parts else texts
        if order:
            parts: list[Part] = [texts[0]]
            for text in texts[1:]:
                parts += [IMAGE, text]
            return tuple(part for part in parts if part != "")
        (text,) = texts
        if not images:
            return (text,)
        pictures: tuple[Part, ...] = (IMAGE,) * images
        separator = self.image_separator
        return (*pictures, separator + text) if self.images == "first" else (text + separator, *pictures)


def fill(template: str, fields: Mapping[str, str], *, missing: str = "") -> str:
    """Replace `{name}` in one pass, so that braces within the values stay as they are."""
    names = set(_FIELD.findall(template)) if missing else set()
    if unknown := sorted(names - fields.keys()):
        raise EvalError(f"{{{unknown[0]}}} has no value ({missing}). Known: {', '.join(sorted(fields))}.")
    return _FIELD.sub(lambda match: fields.get(match.group(1), ""), template)
