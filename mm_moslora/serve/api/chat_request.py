"""Parse and check a request body into a `ChatRequest`. Every error names the field that is wrong.

Unknown fields are ignored, since clients send many. Fields that ask for an unsupported feature (tools,
log-probabilities, another output format) are refused, because the answer would not be what the client asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mm_moslora.serve.api.api_errors import ApiError
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.serve.inference.token_sampling import Sampling
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json

ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a message, not yet decoded."""

    url: str
    where: str
    """Its place in the request."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message."""

    role: str
    """system, user or assistant."""
    parts: tuple[str | Picture, ...]
    where: str


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked request for a chat completion."""

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    thinking: bool | None = None
    """Ask the model to think before it answers, or to answer at once; None: as it was trained."""
    stream: bool = False
    include_usage: bool = False
    choices: int = 1
    pictures: tuple[Picture, ...] = field(default=())

    @property
    def characters(self) -> int:
        """Number of characters of all texts."""
        return sum(len(part) for message in self.messages for part in message.parts if isinstance(part, str))

    def without_addresses(self) -> ChatRequest:
        """The request without its pictures' contents, which may be megabytes of base64. Their positions are kept."""

        def bare(part: str | Picture) -> str | Picture:
            return replace(part, url="") if isinstance(part, Picture) else part

        messages = tuple(replace(one, parts=tuple(bare(part) for part in one.parts)) for one in self.messages)
        return replace(self, messages=messages, pictures=tuple(replace(one, url="") for one in self.pictures))

    def without_content(self) -> ChatRequest:
        """Settings that generate and label an answer."""
        return replace(self, messages=(), pictures=())


class Marks:
    """Estimates, chunk by chunk, the cost of parsing a body."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._items, self._escapes = limits, 0, 0

    def add(self, chunk: bytes) -> None:
        """Take the next part of the body.

        Raises:
            ApiError: more than is allowed.
        """
        self._items += chunk.count(b",") + chunk.count(b"[") + chunk.count(b"{")
        self._escapes += chunk.count(b"\\")
        limits = self._limits
        if self._items > limits.json_items or self._escapes > limits.json_escapes:
            raise ApiError(
                f"The body holds more than {limits.json_items} commas and opening brackets, or more than "
                f"{limits.json_escapes} backslashes; send a shorter conversation.",
                code="invalid_json",
            )


def read_json(body: bytes | bytearray, limits: Limits) -> dict[str, Any]:
    """Parse a body that `Marks` has checked into a JSON object.

    Raises:
        ApiError: not UTF-8, not JSON, nested too deeply, a key given twice, or not an object.
    """
    expected = "expected one JSON object in UTF-8"
    try:
        value = parse_json(body, max_depth=limits.json_depth, surrogates=True)
    except StrictJsonError as error:
        what = (
            f"is nested more than {limits.json_depth} levels deep" if error.deep else "is broken, or gives a key twice"
        )
        raise ApiError(f"The body {what}; {expected}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(f"The body is not a JSON object; {expected}.", code="invalid_json")
    return value


def chat_request(body: Mapping[str, Any], limits: Limits) -> ChatRequest:
    """Check the fields of a chat completion that `read_json` has read.

    Raises:
        ApiError: a field is missing, of a wrong type, out of range or not supported; `param` names it.
    """
    for name, asks in _REFUSED.items():
        if body.get(name) is not None and asks(body[name]):
            raise ApiError(
                f"{name} is not supported by this server; leave it out.", param=name, code="unsupported_parameter"
            )
    messages = _messages(body.get("messages"), limits)
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "an object")
    include_usage = _boolean(options or {}, "include_usage", "stream_options.")
    pictures = tuple(part for message in messages for part in message.parts if isinstance(part, Picture))
    if len(pictures) > limits.images:
        raise ApiError(
            f"The request holds {len(pictures)} pictures, at most {limits.images} are allowed.",
            param="messages", code="too_many_images",
        )  # fmt: skip
    made = ChatRequest(
        model=_text(body.get("model"), "model"),
        messages=messages,
        sampling=_sampling(body, limits),
        stop=_stop(body.get("stop"), limits),
        thinking=_thinking(body.get("chat_template_kwargs")),
        stream=_boolean(body, "stream"),
        include_usage=include_usage,
        choices=_integer(body, "n", 1, 1, limits.choices),
        pictures=pictures,
    )
    refuse_too_long(made.characters, limits.context, limits)
    return made


def refuse_too_long(characters: int, context: int, limits: Limits) -> None:
    """Refuse a text that exceeds the context under any tokenizer.

    Args:
        characters: number of characters of the request.
        context: tokens that prompt and answer may take.
        limits: the server's.

    Raises:
        ApiError: more than `characters_per_token` for every token.
    """
    if characters > context * limits.characters_per_token:
        raise ApiError(
            f"The conversation holds {characters} characters, far more than the {context} tokens that this model holds "
            "with its answer. Shorten the conversation.",
            param="messages", code="context_length_exceeded",
        )  # fmt: skip


def _sampling(body: Mapping[str, Any], limits: Limits) -> Sampling:
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return Sampling(
        max_tokens=_integer(body, name, limits.default_tokens, 1, limits.max_tokens),
        temperature=_number(body, "temperature", 0.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 0, 1, open_below=True),
        presence_penalty=_number(body, "presence_penalty", 0.0, -2, 2),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, -2, 2),
        seed=None if body.get("seed") is None else _integer(body, "seed", 0, -(2**63), 2**63 - 1),
    )


_REFUSED: dict[str, Callable[[Any], bool]] = {
    "tools": bool,
    "functions": bool,
    "tool_choice": lambda value: value not in ("none", "auto"),
    "function_call": lambda value: value not in ("none", "auto"),
    "logprobs": bool,
    "top_logprobs": bool,
    "logit_bias": bool,
    "audio": bool,
    "modalities": lambda value: value != ["text"],
    "response_format": lambda value: value != {"type": "text"},
    "prediction": bool,
    "web_search_options": bool,
}
"""Unsupported fields, each with a test for values that would change the answer."""


def _thinking(value: Any) -> bool | None:
    """The switch of vLLM and SGLang: `chat_template_kwargs: {"enable_thinking": false}`."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _wrong("chat_template_kwargs", "an object with enable_thinking")
    if others := sorted(value.keys() - {"enable_thinking"}):
        raise ApiError(
            f"chat_template_kwargs.{ascii(others[0])[1:-1][:60]} is not supported by this server, only "
            "enable_thinking; leave it out.",
            param="chat_template_kwargs", code="unsupported_parameter",
        )  # fmt: skip
    if value.get("enable_thinking") is None:
        return None
    return _boolean(value, "enable_thinking", "chat_template_kwargs.")


def _messages(value: Any, limits: Limits) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "a list of at least one message")
    if len(value) > limits.messages:
        raise ApiError(
            f"messages holds {len(value)} messages, at most {limits.messages} are allowed.",
            param="messages", code="too_many_messages",
        )  # fmt: skip
    messages = [_message(item, f"messages[{index}]", limits) for index, item in enumerate(value)]
    for index, message in enumerate(messages):
        if message.role == "system" and index and messages[index - 1].role != "system":
            raise ApiError(f"{message.where} is a system message behind others; put it first.", param=message.where)
    spoken = [message for message in messages if message.role != "system"]
    if not spoken or spoken[0].role != "user" or spoken[-1].role != "user":
        raise ApiError(
            "The conversation must begin (after system messages) and end with a user message.", param="messages"
        )
    return tuple(messages)


def _message(value: Any, where: str, limits: Limits) -> Message:
    if not isinstance(value, dict):
        raise _wrong(where, "an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}.role", f"one of {', '.join(ROLES)}")
    role = "system" if role == "developer" else role
    content = value.get("content")
    if isinstance(content, str):
        return Message(role=role, parts=(_text(content, f"{where}.content", empty=True),), where=where)
    if not isinstance(content, list) or not content:
        raise _wrong(f"{where}.content", "a text, or a list of parts")
    if len(content) > limits.parts:
        raise _wrong(f"{where}.content", f"at most {limits.parts} parts")
    parts = tuple(_part(item, f"{where}.content[{index}]", role) for index, item in enumerate(content))
    return Message(role=role, parts=parts, where=where)


def _part(value: Any, where: str, role: str) -> str | Picture:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return _text(value.get("text"), f"{where}.text", empty=True)
    if kind == "image_url" and role == "user":
        image = value.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        return Picture(url=_text(url, f"{where}.image_url.url"), where=f"{where}.image_url")
    if kind == "image_url":
        raise ApiError(f"{where} is a picture of the {role}; only user messages hold pictures.", param=where)
    raise _wrong(f"{where}.type", "text or image_url")


def _stop(value: Any, limits: Limits) -> tuple[str, ...]:
    if value is None:
        return ()
    given = [value] if isinstance(value, str) else value
    allowed = f"up to {limits.stops} texts of 1 to {limits.stop_characters} characters"
    if not isinstance(given, list) or len(given) > limits.stops:
        raise _wrong("stop", allowed)
    for item in given:
        if not isinstance(item, str) or not 0 < len(item) <= limits.stop_characters:
            raise _wrong("stop", allowed)
    return tuple(_text(item, "stop") for item in given)


def _text(value: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise _wrong(where, "a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _wrong(where, "valid Unicode text (it holds an unpaired surrogate)") from None
    return value


def _boolean(body: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(prefix + name, "true or false")
    return bool(value)


def _integer(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return min(default, high)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(name, f"a whole number from {low} to {high}")
    return value


def _number(
    body: Mapping[str, Any], name: str, default: float, low: float, high: float, *, open_below: bool = False
) -> float:
    value = body.get(name)
    if value is None:
        return default
    allowed = f"a number {'above' if open_below else 'from'} {low} {'and up to' if open_below else 'to'} {high}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, allowed)
    if not low <= value <= high or (open_below and value == low):
        raise _wrong(name, allowed)
    return float(value)


def _wrong(where: str, expected: str) -> ApiError:
    return ApiError(f"{where} is missing or invalid; expected {expected}.", param=where)
