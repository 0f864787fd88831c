"""A tokenizer's chat template: the scaffold around contents.

A template is rendered once per sequence of roles with a marker for every content. The text between the markers is the
scaffold. A second rendering, with white space around the markers, detects templates that trim contents. Tools, calls
and their results are no contents, because templates write them in forms of their own: they stand in the scaffold.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NoReturn, TypeVar

from transformers import PreTrainedTokenizerBase

from mm_moslora.config.llava_chat_templates import without_note
from mm_moslora.data.chat.record_turns import IMAGE, VIDEO, Turn
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_data import MAX_DEPTH, parse_json

Value = TypeVar("Value")
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
"""For tokenizers without a chat template: `role:`, a line break, the content; end-of-sequence after an answer."""
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
_REMEMBERED = 512
"""Sequences of roles whose scaffold is remembered; conversations of other lengths or with a system turn differ."""

# Letters, quotes and brackets reveal templates that change or escape contents. The number differs in every process, so
# that no text of a data set, which stands beside the markers in tools and their results, can spell one.
MARK = f"<&\"'\u241f{secrets.token_hex(8)}Slot {{}}\u241f>"
_LEFT = {"keep": "\n \t", "lines": " \t", "space": ""}
"""Kind of trimming -> remainder of the white space that was put before a marker."""
_RIGHT = {"keep": "\t \n", "lines": "\t ", "space": ""}
"""The same for the white space after a marker."""
BREAK = "\n"
"""Before the JSON text in a turn's part of a sequence of roles."""
PROBE_CALL: dict[str, Any] = {
    "id": "call00000", "type": "function",
    "function": {"name": "probe_tool", "arguments": {"probe_key": "probe value", "second_key": "second value"}},
}  # fmt: skip
"""A call that shows how a template writes calls."""
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool", "description": "A tool.", "parameters": {
            "type": "object",
            "properties": {key: {"type": "string", "description": "A text."} for key in ("probe_key", "second_key")},
        },
    },
}  # fmt: skip
"""Its tool."""
ASKED_WITH_TOOLS = (f"user{BREAK}{json.dumps([PROBE_TOOL])}",)
"""The shortest prompt in which the tool is offered."""
PROBE_RESULT = {"tool_call_id": "call00000", "name": "probe_tool", "content": "a result"}
"""Its result."""


def role_of(shape: str) -> str:
    """The role of a turn's part of a sequence of roles."""
    return shape.partition(BREAK)[0].partition(":")[0]


def kinds_of(shape: str) -> str:
    """The kinds of its contents; empty: one text."""
    return shape.partition(BREAK)[0].partition(":")[2]


def data_of(shape: str) -> Any:
    """What it gives to the template besides contents, see `Turn.tools`; None: nothing."""
    data = shape.partition(BREAK)[2]
    return parsed_data(data) if data else None


def parsed_data(data: str) -> Any:
    """The value of such a JSON text."""
    return parse_json(data, max_depth=2 * MAX_DEPTH, surrogates=True)


def slots_of(shape: str) -> int:
    """The number of contents that have a slot."""
    kinds = kinds_of(shape) or "t"
    return 0 if role_of(shape) == "tool" else kinds.count("t") + kinds.count("c")


def named(roles: Sequence[str]) -> str:
    """The shape for messages, without JSON."""
    return ", ".join(shape.partition(BREAK)[0] for shape in roles)


def with_text_arguments(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls with their arguments as JSON text."""
    return [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in calls
    ]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one content stands in the scaffold."""

    before: str
    """Scaffold between the previous content and this one."""
    lead: str
    """Answers only: white space between the generation prompt and the answer, which the model writes itself."""
    left: str
    """Trimming at the content's start: keep (none), space, or lines (line breaks)."""
    right: str
    """Trimming at the content's end."""
    calls: str = ""
    """Answers only: the scaffold behind the content with the answer's calls and its end."""

    def trim(self, parts: Sequence[str]) -> list[str]:
        """A content, in parts around its images, trimmed as the template does."""
        result = list(parts)
        result[0] = {"keep": result[0], "space": result[0].lstrip(), "lines": result[0].lstrip("\n")}[self.left]
        last = result[-1]
        result[-1] = {"keep": last, "space": last.rstrip(), "lines": last.rstrip("\n")}[self.right]
        return result


@dataclass(frozen=True, kw_only=True)
class TemplatePlan:
    """The scaffold of a sequence of roles."""

    slots: tuple[Slot, ...]
    tail: str
    """Scaffold after the last content."""


class Template:
    """The chat template of a tokenizer, or the plain one."""

    media = re.compile(r"(?!)")
    """Finds the template's texts for a picture and a video; nothing where pictures are part of the contents."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        source = own if isinstance(own, str) else None if own is None else own.get("default")
        if source is None:
            source = ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
        self.source = without_note(source)
        self._plans: dict[tuple[str, ...], TemplatePlan] = {}

    def lay_out(self, turns: Sequence[Turn]) -> tuple[list[Turn], tuple[str, ...], list[int]]:
        """The contents that need a slot each, the shape to plan for, and the turn number of each content."""
        contents: list[Turn] = []
        shape: list[str] = []
        numbers: list[int] = []
        for number, turn in enumerate(turns):
            own, kinds = self.contents_of(turn)
            data = turn.tools
            if turn.role == "tool":
                data = json.dumps(parsed_data(data or "{}") | {"content": turn.text}, ensure_ascii=False)
            contents += own
            numbers += [number] * len(own)
            shape.append(f"{turn.role}{kinds and ':'}{kinds}{data and BREAK}{data}")
        return contents, tuple(shape), numbers

    def contents_of(self, turn: Turn) -> tuple[list[Turn], str]:
        """The contents of one turn, and its kinds where it is not one text."""
        if turn.role == "tool":
            return [], ""
        return [turn], "c" if turn.role == "assistant" and turn.tools and not turn.text.strip() else ""

    def plan(self, roles: tuple[str, ...]) -> TemplatePlan:
        """The scaffold of these roles; refuses a template that leaves contents out, reorders or changes them."""
        return remembered(self._plans, roles, self._new_plan)

    def accepts(self, roles: tuple[str, ...]) -> bool:
        """Whether the template accepts these roles and renders all their contents."""
        try:
            self.plan(roles)
        except ConfigError:
            return False
        return True

    def missing_bos(self) -> list[int]:
        """The beginning-of-sequence id if the tokenizer adds one and the template does not; else empty."""
        start = self.plan(("user", "assistant")).slots[0].before
        if not _adds_bos(self.tokenizer) or start.startswith(str(self.tokenizer.bos_token)):
            return []
        return [int(self.tokenizer.bos_token_id)]

    @cached_property
    def has_default_system(self) -> bool:
        """Whether the template writes a default system text for a conversation without one."""
        if not self.accepts(("system", "user", "assistant")):
            return False
        header, between = (slot.before for slot in self.plan(("system", "user", "assistant")).slots[:2])
        without = self.plan(("user", "assistant")).slots[0].before
        rest = without[len(header) :] if without.startswith(header) else ""
        return bool(rest.strip()) and rest.lstrip() != between.lstrip()

    def owners(self, roles: tuple[str, ...]) -> list[int]:
        """The turn number of every content."""
        return [turn for turn, shape in enumerate(roles) for _ in range(slots_of(shape))]

    def _new_plan(self, roles: tuple[str, ...]) -> TemplatePlan:
        owners = self.owners(roles)
        marks = [MARK.format(index) if kinds_of(roles[turn]) != "c" else "" for index, turn in enumerate(owners)]
        pieces = self._cut(marks, marks, roles)
        wide = self._cut([mark and _LEFT["keep"] + mark + _RIGHT["keep"] for mark in marks], marks, roles)
        # Trimming at the end of one content and at the start of the next changes the same stretch of scaffold.
        marked = [False, *map(bool, marks), False]
        trims = [
            _trims(pieces[index], wide[index], roles, first=not marked[index], last=not marked[index + 1])
            for index in range(len(pieces))
        ]
        slots = []
        text = ""
        for index, turn in enumerate(owners):
            before, lead, calls = pieces[index], "", ""
            text += before
            if role_of(roles[turn]) == "assistant":
                lead = self._lead(roles[:turn], marks[:index], text)
                before = before[: len(before) - len(lead)]
                calls = self._calls(roles[: turn + 1], marks[: index + 1], pieces[index + 1])
            slots.append(Slot(before=before, lead=lead, left=trims[index][1], right=trims[index + 1][0], calls=calls))
            text += marks[index]
        self._check_tools(roles, marks)
        return TemplatePlan(slots=tuple(slots), tail=pieces[-1])

    def _calls(self, roles: tuple[str, ...], marks: list[str], behind: str) -> str:
        """The calls of the last of these roles and the end of the turn, in the scaffold behind its content."""
        calls = data_of(roles[-1])
        if not calls:
            return ""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(behind, self._cut(marks, marks, roles)[-1], strict=False))
        text = "".join(letter for letter, _ in same).rstrip()
        names = Counter(str(call["function"]["name"]) for call in calls)
        if any(text.count(name) < count for name, count in names.items()):
            _left_out("calls of tools", roles)
        return text

    def _check_tools(self, roles: tuple[str, ...], marks: list[str]) -> None:
        """Refuse a template that leaves out tools or their results."""
        if not any(BREAK in shape for shape in roles):
            return
        text = self.render(roles, marks)
        first, *rest = roles
        offered = data_of(first) or []
        if offered and self.render((first.partition(BREAK)[0], *rest), marks) == text:
            _left_out("tools", roles)
        if not all(tool["function"]["name"] in text for tool in offered):
            _left_out("tools", roles)
        others = tuple(
            f"tool{BREAK}{json.dumps(data_of(shape) | {'content': 'another'})}" if role_of(shape) == "tool" else shape
            for shape in roles
        )
        if others != roles and self.render(others, marks) == text:
            _left_out("results of tools", roles)

    def _lead(self, roles: tuple[str, ...], marks: list[str], text: str) -> str:
        """White space after the generation prompt, which the model writes itself.

        Any other text there (an empty thinking block, a header of a template without a generation prompt) belongs to
        the prompt, in training as in inference; but not where tools are offered and calls stand before it.
        """
        rest = text.removeprefix(self.render(roles, marks, prompt=True))
        written = not rest.strip() or (data_of(roles[0]) and self.calls_come_first)
        return rest if len(rest) < len(text) and written else ""

    def _cut(self, contents: list[str], marks: list[str], roles: tuple[str, ...]) -> list[str]:
        """The rendered text around the marks in the contents; an answer without a mark begins where the model does."""
        text, pieces, end = self.render(roles, contents), [], 0
        for index, (mark, turn) in enumerate(zip(marks, self.owners(roles), strict=True)):
            start = text.find(mark, end) if mark else self._opening(roles[:turn], contents[:index], text)
            if start < end:
                raise ConfigError(
                    "The tokenizer's chat template leaves out, reorders or changes contents, so labels cannot be built "
                    f"for the roles {named(roles)}. Use another template."
                )
            pieces.append(text[end:start])
            end = start + len(mark)
        return [*pieces, text[end:]]

    def _opening(self, roles: tuple[str, ...], contents: list[str], text: str) -> int:
        """Where the answer to these roles begins: behind what stands before an answer of text; -1: nowhere."""
        plain = self._before_text(roles, contents)
        starts = [plain, plain.rstrip(" "), self.render(roles, contents, prompt=True)]
        return next((len(start) for start in starts if text.startswith(start)), -1)

    def _before_text(self, roles: tuple[str, ...], contents: list[str]) -> str:
        """The conversation up to the text of an answer to these roles."""
        mark = MARK.format("answer")
        return self.render((*roles, "assistant"), [*contents, mark]).partition(mark)[0]

    def _messages(
        self, roles: Sequence[str], contents: Sequence[str], *, as_text: bool | None = None
    ) -> list[dict[str, Any]]:
        """The messages for the template; `as_text` is for the arguments of calls, None: as the template takes them."""
        texts, messages = iter(contents), []
        for shape in roles:
            role, data = role_of(shape), data_of(shape)
            message: dict[str, Any] = {"role": role}
            if role == "tool":
                message |= data | {"content": self.content("", iter([data["content"]]))}
            else:
                message["content"] = self.content(kinds_of(shape), texts)
            if role == "assistant" and data:
                as_text = self.arguments_are_text if as_text is None else as_text
                message["tool_calls"] = with_text_arguments(data) if as_text else data
            messages.append(message)
        return messages

    def content(self, kinds: str, texts: Iterator[str]) -> Any:
        """A message's content; `ProcessorTemplate` has contents of several parts."""
        return next(texts)

    @cached_property
    def calls_come_first(self) -> bool:
        """Whether calls begin before the text that stands before other answers (gpt-oss names the channel there)."""
        called = (
            *ASKED_WITH_TOOLS,
            f"assistant:c{BREAK}{json.dumps([PROBE_CALL])}",
            f"tool{BREAK}{json.dumps(PROBE_RESULT)}",
        )
        try:
            text = self.render((*called, "assistant"), ["a", "", "b"])
            return not text.startswith(self._before_text(ASKED_WITH_TOOLS, ["a"]).rstrip(" "))
        except ConfigError:
            return False

    @cached_property
    def arguments_are_text(self) -> bool:
        """Whether the template takes the arguments of calls as JSON text only: it joins them to texts (DeepSeek)."""
        shape = ("user", f"assistant:c{BREAK}{json.dumps([PROBE_CALL])}")
        try:
            return "'probe_key'" in self.rendered(self._messages(shape, ["a", ""], as_text=False))
        except Exception:  # templates may raise any exception
            return True

    def generation_prompt(self) -> str:
        """The text that the template itself writes between a question and the answer to generate."""
        mark = MARK.format(0)
        return self.render(("user",), [mark], prompt=True).rpartition(mark)[2]

    def render(
        self,
        roles: Sequence[str],
        contents: Sequence[str],
        *,
        prompt: bool = False,
        reasoning: dict[str, str] | None = None,
        **switch: Any,
    ) -> str:
        """The text of a conversation, with `prompt` up to the answer to generate."""
        try:
            messages = self._messages(roles, contents)
            messages[-1] |= reasoning or {}
            if tools := data_of(roles[0]) if role_of(roles[0]) in ("system", "user") else None:
                switch["tools"] = tools
            return self.rendered(messages, add_generation_prompt=prompt, **switch)
        except Exception as error:  # templates may raise any exception
            raise ConfigError(f"The tokenizer's chat template refuses the roles {named(roles)}: {error}") from error

    def rendered(self, messages: list[dict[str, Any]], **settings: Any) -> str:
        """What the template makes of messages."""
        return str(self.tokenizer.apply_chat_template(messages, chat_template=self.source, tokenize=False, **settings))


def _left_out(what: str, roles: Sequence[str]) -> NoReturn:
    raise ConfigError(f"The tokenizer's chat template leaves out {what} (roles {named(roles)}). Use another template.")


def remembered(
    values: dict[tuple[str, ...], Value], roles: tuple[str, ...], make: Callable[[tuple[str, ...]], Value]
) -> Value:
    """The value of these roles, made once; a plain dictionary holds it, so that an encoder can be pickled."""
    with suppress(KeyError):
        return values[roles]
    value = make(roles)
    if len(values) >= _REMEMBERED:
        values.clear()
    values[roles] = value
    return value


def _trims(plain: str, wide: str, roles: tuple[str, ...], *, first: bool, last: bool) -> tuple[str, str]:
    """The trimming at the end of the content before a stretch of scaffold, and at the start of the content after it."""
    for right, behind in ({"keep": ""} if first else _RIGHT).items():
        for left, ahead in ({"keep": ""} if last else _LEFT).items():
            if behind + plain + ahead == wide:
                return right, left
    raise ConfigError(
        f"The tokenizer's chat template changes contents, so labels cannot be built for the roles {named(roles)}. "
        "Use another template."
    )


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]


def _wrapped_video(processor: Any) -> str:
    """The marks of a video with the tokens around it, where the processor replaces these, too (Qwen3-VL), or ""."""
    names = ("vision_start_token", "video_token", "vision_end_token")
    marks = "".join(str(getattr(processor, name, "") or "") for name in names)
    try:
        return marks if processor.get_text_with_replacements([marks], videos_replacements=["a"])[0] == ["a"] else ""
    except Exception:  # absent before transformers 5.25; processors raise nearly anything
        return ""


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
        marks = [_wrapped_video(processor), getattr(processor, "video_token", None), processor.image_token]
        self.media = re.compile("|".join(re.escape(str(mark)) for mark in marks if mark))

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
