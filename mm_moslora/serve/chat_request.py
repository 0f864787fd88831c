"""Parse and check a request body into a `ChatRequest`. Every error names the field that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mm_moslora.models.decoding.token_sampling import Sampling
from mm_moslora.serve.api_errors import ApiError
from mm_moslora.serve.request_limits import Limits
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json

ROLES = ("system", "developer", "user", "assistant")
_HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "audio", "prediction"), ()),
    "web_search_options": (), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "modalities": (["text"],), "response_format": ({"type": "text"},),
}  # fmt: skip
"""Unsupported fields, refused with other values than empty ones and these, since the answer would not be as asked."""
_READ = frozenset({
    *_HARMLESS, "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "n", "chat_template_kwargs",
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
})  # fmt: skip
"""Fields that are read, and those of OpenAI that change no answer; the log names others, which clients send."""


@dataclass(kw_only=True)
class MessagePicture:
    """A picture of a message, not yet decoded."""

    url: str
    """Megabytes of base64 in most cases; emptied once its bytes are read."""
    where: str
    """Its place in the request."""


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One message."""

    role: str
    """system, user or assistant."""
    parts: tuple[str | MessagePicture, ...]


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked request for a chat completion."""

    model: str
    messages: tuple[ChatMessage, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    thinking: bool | None = None
    """Ask the model to think before it answers, or to answer at once; None: as it was trained."""
    stream: bool = False
    include_usage: bool = False
    choices: int = 1
    unread: tuple[str, ...] = ()
    """Fields that are ignored."""

    @property
    def pictures(self) -> list[MessagePicture]:
        """The pictures of all messages."""
        return [part for message in self.messages for part in message.parts if isinstance(part, MessagePicture)]

    @property
    def characters(self) -> int:
        """Number of characters of all texts."""
        return sum(len(part) for message in self.messages for part in message.parts if isinstance(part, str))


def read_json(body: bytes | bytearray, limits: Limits) -> dict[str, Any]:
    """Parse a body into a JSON object."""
    what = "is not a JSON object"
    if sum(map(body.count, b",[{")) > limits.json_items or body.count(b"\\") > limits.json_escapes:
        raise ApiError(
            f"The body holds more than {limits.json_items} commas and opening brackets, or more than "
            f"{limits.json_escapes} backslashes; send a shorter conversation.",
            code="invalid_json",
        )
    try:
        value = parse_json(body, max_depth=limits.json_depth, surrogates=True)
    except StrictJsonError as error:
        value = None
        what = (
            f"is nested more than {limits.json_depth} levels deep" if error.deep else "is broken, or gives a key twice"
        )
    if not isinstance(value, dict):
        raise ApiError(f"The body {what}; expected one JSON object in UTF-8.", code="invalid_json")
    return value


def chat_request(body: Mapping[str, Any], limits: Limits) -> ChatRequest:
    """Check the fields of a chat completion that `read_json` has read."""
    for name, harmless in _HARMLESS.items():
        if body.get(name) and body[name] not in harmless:
            raise _unsupported(f"{name} is not supported by this server", name)
    options = _field(body, "stream_options", "an object", lambda value: isinstance(value, dict)) or {}
    longest = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    request = ChatRequest(
        model=_text(body.get("model"), "model"),
        messages=_messages(body.get("messages"), limits),
        sampling=Sampling(
            max_tokens=_whole(body, longest, 1, limits.max_tokens) or min(limits.default_tokens, limits.max_tokens),
            temperature=_number(body, "temperature", 0, 2),
            top_p=_number(body, "top_p", 0, 1, default=1.0),
            presence_penalty=_number(body, "presence_penalty", -2, 2),
            frequency_penalty=_number(body, "frequency_penalty", -2, 2),
            seed=_whole(body, "seed", -(2**63), 2**63 - 1),
        ),
        stop=_stop(body.get("stop"), limits),
        thinking=_thinking(body),
        stream=_switch(body, "stream") or False,
        include_usage=_switch(options, "include_usage", "stream_options.") or False,
        choices=_whole(body, "n", 1, limits.choices) or 1,
        unread=tuple(ascii(name)[1:-1][:60] for name in body if name not in _READ),
    )
    if (count := len(request.pictures)) > limits.images:
        raise ApiError(
            f"The request holds {count} pictures, at most {limits.images} are allowed.",
            param="messages", code="too_many_images",
        )  # fmt: skip
    return request


def _messages(value: Any, limits: Limits) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "a list of at least one message")
    if len(value) > limits.messages:
        raise ApiError(
            f"messages holds {len(value)} messages, at most {limits.messages} are allowed.",
            param="messages", code="too_many_messages",
        )  # fmt: skip
    messages = tuple(_message(item, f"messages[{index}]", limits) for index, item in enumerate(value))
    roles = [message.role for message in messages]
    for index in range(1, len(roles)):
        if roles[index] == "system" != roles[index - 1]:
            where = f"messages[{index}]"
            raise ApiError(f"{where} is a system message behind others; put it first.", param=where)
    spoken = [role for role in roles if role != "system"]
    if not spoken or spoken[0] != "user" or spoken[-1] != "user":
        raise ApiError(
            "The conversation must begin (after system messages) with a user message, and end with one.",
            param="messages",
        )
    return messages


def _message(value: Any, where: str, limits: Limits) -> ChatMessage:
    if not isinstance(value, dict):
        raise _wrong(where, "an object with role and content")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}.role", f"one of {', '.join(ROLES)}")
    role = "system" if role == "developer" else role
    if value.get("tool_calls"):
        raise _unsupported(f"{where}.tool_calls is not supported by this server", f"{where}.tool_calls")
    where += ".content"
    if isinstance(content, str):
        return ChatMessage(role=role, parts=(_text(content, where, empty=True),))
    if not isinstance(content, list) or not content:
        raise _wrong(where, "a text, or a list of parts")
    if len(content) > limits.parts:
        raise _wrong(where, f"at most {limits.parts} parts")
    return ChatMessage(
        role=role, parts=tuple(_part(item, f"{where}[{index}]", role) for index, item in enumerate(content))
    )


def _part(value: Any, where: str, role: str) -> str | MessagePicture:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return _text(value.get("text"), f"{where}.text", empty=True)
    if kind != "image_url":
        raise _wrong(f"{where}.type", "text or image_url")
    if role != "user":
        raise ApiError(f"{where} is a picture of the {role}; only user messages hold pictures.", param=where)
    image = value.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    return MessagePicture(url=_text(url, f"{where}.image_url.url"), where=f"{where}.image_url")


def _thinking(body: Mapping[str, Any]) -> bool | None:
    """The switch of vLLM and SGLang: `chat_template_kwargs: {"enable_thinking": false}`."""
    name = "chat_template_kwargs"
    options = _field(body, name, "an object with enable_thinking", lambda value: isinstance(value, dict)) or {}
    if others := sorted(options.keys() - {"enable_thinking"}):
        other = ascii(others[0])[1:-1][:60]
        raise _unsupported(f"{name}.{other} is not supported by this server, only enable_thinking", name)
    return _switch(options, "enable_thinking", f"{name}.")


def _stop(value: Any, limits: Limits) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > limits.stops
        or not all(isinstance(item, str) and 0 < len(item) <= limits.stop_characters for item in stops)
    ):
        raise _wrong("stop", f"up to {limits.stops} texts of 1 to {limits.stop_characters} characters")
    return tuple(_text(item, "stop") for item in stops)


def _text(value: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise _wrong(where, "a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _wrong(where, "valid Unicode text (it holds an unpaired surrogate)") from None
    return value


def _field(
    body: Mapping[str, Any], name: str, expected: str, fits: Callable[[Any], bool], *, prefix: str = ""
) -> Any:  # fmt: skip
    """The value of a field that fits; None where it is missing or null."""
    value = body.get(name)
    if value is not None and not fits(value):
        raise _wrong(prefix + name, expected)
    return value


def _switch(body: Mapping[str, Any], name: str, prefix: str = "") -> bool | None:
    switch: bool | None = _field(body, name, "true or false", lambda value: isinstance(value, bool), prefix=prefix)
    return switch


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    number: int | None = _field(
        body, name, f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high
    )
    return number


def _number(body: Mapping[str, Any], name: str, low: float, high: float, *, default: float = 0.0) -> float:
    """A number; `top_p` alone must be above its lower limit."""
    above = name == "top_p"
    value = _field(
        body, name, f"a number {'above' if above else 'from'} {low} {'and up to' if above else 'to'} {high}",
        lambda value: type(value) in (int, float) and (low < value if above else low <= value) and value <= high,
    )  # fmt: skip
    return default if value is None else float(value)


def _wrong(where: str, expected: str) -> ApiError:
    return ApiError(f"{where} is missing or invalid; expected {expected}.", param=where)


def _unsupported(what: str, param: str) -> ApiError:
    return ApiError(f"{what}; leave it out.", param=param, code="unsupported_parameter")
