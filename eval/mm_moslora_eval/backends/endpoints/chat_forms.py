"""The forms in which providers take a conversation: OpenAI's, which this project speaks, and what others make of it.

A request and a reply are always those of OpenAI's chat completions. A form translates them to a provider's own protocol
and back, so judges and models need to know one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.backends.endpoints.service_replies import count_of

Payload = dict[str, Any]


class NoAnswerError(RuntimeError):
    """A reply in the provider's form that holds no answer, such as a refusal."""


@dataclass(frozen=True, kw_only=True)
class ChatForm:
    """A provider's protocol."""

    name: str
    keys: tuple[str, ...]
    """Environment variables for the key, in order of priority."""
    headers: Callable[[str], Mapping[str, str]]
    """Headers that hold the key; empty: there is none."""
    path: Callable[[str], str]
    """Behind the address, for the name of a model."""
    request: Callable[[Payload], Payload]
    """A request in the provider's form."""
    reply: Callable[[Any], Payload | None]
    """A reply in OpenAI's form; None for something else."""
    address: str = ""
    """Default address; empty: it must be named."""


def _openai_reply(said: Any) -> Payload | None:
    choices = said.get("choices") if isinstance(said, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    if isinstance(first, dict) and isinstance(message, dict) and not message.get("content"):
        if first.get("finish_reason") == "content_filter":
            raise NoAnswerError("the provider refused to answer (finish_reason: content_filter)")
        if message.get("refusal"):
            raise NoAnswerError(f"the provider refused to answer ({str(message['refusal'])[:80]})")
    fits = isinstance(message, dict) and isinstance(message.get("content"), str | list | None)
    return said if fits else None


def _object(value: Any) -> Payload:
    return value if isinstance(value, dict) else {}


def _texts(content: Any) -> list[Payload]:
    """The parts of a message's content."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _picture(part: Payload) -> tuple[str, str]:
    """Media type and base64 text of a picture, which this project sends as a data URL."""
    head, _, data = part["image_url"]["url"].partition(";base64,")
    return head.removeprefix("data:"), data


def _refuse_probabilities(payload: Payload, provider: str) -> None:
    if payload.get("logprobs"):
        raise EvalError(
            f"{provider} gives no probabilities of tokens, so it cannot choose among options by likelihood. Take a "
            "protocol that generates, or an endpoint of OpenAI's form that gives them."
        )


def _anthropic_request(payload: Payload) -> Payload:
    _refuse_probabilities(payload, "Anthropic")
    system, messages = [], []
    for message in payload["messages"]:
        parts: list[Payload] = []
        for part in _texts(message["content"]):
            if part["type"] == "text":
                parts.append(part)
            else:
                kind, data = _picture(part)
                parts.append({"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}})
        if message["role"] == "system":
            system += parts
        else:
            messages.append({"role": message["role"], "content": parts})
    body: Payload = {"model": payload["model"], "max_tokens": payload["max_tokens"], "messages": messages}
    body |= {"system": system} if system else {}
    # Newer models refuse `temperature` beside `top_p`: neither is sent at its default, 1, which is the largest, too.
    drawn = {name: min(1.0, payload.get(name, 1.0)) for name in ("temperature", "top_p")}
    body |= {name: value for name, value in drawn.items() if value < 1}
    body |= {"top_k": payload["top_k"]} if "top_k" in payload else {}  # it takes no seed
    return body | ({"stop_sequences": payload["stop"]} if "stop" in payload else {})


def _anthropic_reply(said: Any) -> Payload | None:
    content = said.get("content") if isinstance(said, dict) else None
    if not isinstance(content, list):
        return None
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if said.get("stop_reason") == "refusal" and not texts:
        raise NoAnswerError("the provider refused to answer (stop_reason: refusal)")
    used = _object(said.get("usage"))
    read = [used.get(name) for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")]
    return _as_openai(
        "".join(texts), cut_off=said.get("stop_reason") in ("max_tokens", "model_context_window_exceeded"),
        prompt=sum(map(count_of, read)), completion=used.get("output_tokens"),
    )  # fmt: skip


def _gemini_request(payload: Payload) -> Payload:
    _refuse_probabilities(payload, "Gemini's native protocol")
    system, contents = [], []
    for message in payload["messages"]:
        parts: list[Payload] = []
        for part in _texts(message["content"]):
            if part["type"] == "text":
                parts.append({"text": part["text"]})
            else:
                kind, data = _picture(part)
                parts.append({"inlineData": {"mimeType": kind, "data": data}})
        if message["role"] == "system":
            system += parts
        else:
            contents.append({"role": "model" if message["role"] == "assistant" else "user", "parts": parts})
    settings: Payload = {"maxOutputTokens": payload["max_tokens"]}
    settings |= {"temperature": payload["temperature"]} if "temperature" in payload else {}
    further = {"stop": "stopSequences", "top_p": "topP", "top_k": "topK", "seed": "seed"}
    settings |= {theirs: payload[name] for name, theirs in further.items() if name in payload}
    body: Payload = {"contents": contents, "generationConfig": settings}
    return body | ({"systemInstruction": {"parts": system}} if system else {})


def _gemini_reply(said: Any) -> Payload | None:
    if not isinstance(said, dict):
        return None
    feedback = said.get("promptFeedback")
    if isinstance(feedback, dict) and feedback.get("blockReason"):
        raise NoAnswerError(f"the provider refused the prompt (blockReason: {str(feedback['blockReason'])[:80]})")
    candidates = said.get("candidates")
    first = candidates[0] if isinstance(candidates, list) and candidates else None
    if not isinstance(first, dict):
        return None
    content, reason = first.get("content"), first.get("finishReason")
    parts = content.get("parts", []) if isinstance(content, dict) else []
    if not isinstance(parts, list):
        return None
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict) and isinstance(part.get("text"), str) and not part.get("thought")
    ]
    if not texts and reason not in ("STOP", "MAX_TOKENS"):
        raise NoAnswerError(f"the provider gave no answer (finishReason: {str(reason)[:80]})")
    used = _object(said.get("usageMetadata"))
    written = [used.get(name) for name in ("candidatesTokenCount", "thoughtsTokenCount")]
    return _as_openai(
        "".join(texts), cut_off=reason == "MAX_TOKENS", prompt=used.get("promptTokenCount"),
        completion=sum(map(count_of, written)),
    )  # fmt: skip


def _as_openai(text: str, *, cut_off: bool, prompt: Any, completion: Any) -> Payload:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "length" if cut_off else "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


OPENAI = ChatForm(
    name="openai", keys=("MM_MOSLORA_API_KEY", "OPENAI_API_KEY"),
    headers=lambda key: {"Authorization": f"Bearer {key}"} if key else {}, path=lambda _: "/chat/completions",
    request=lambda payload: payload, reply=_openai_reply,
)  # fmt: skip
ANTHROPIC = ChatForm(
    name="anthropic", keys=("ANTHROPIC_API_KEY",), address="https://api.anthropic.com/v1",
    headers=lambda key: {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {}),
    path=lambda _: "/messages", request=_anthropic_request, reply=_anthropic_reply,
)  # fmt: skip
GEMINI = ChatForm(
    name="gemini", keys=("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    address="https://generativelanguage.googleapis.com/v1beta",
    headers=lambda key: {"x-goog-api-key": key} if key else {}, path=lambda model: f"/models/{model}:generateContent",
    request=_gemini_request, reply=_gemini_reply,
)  # fmt: skip
FORMS: dict[str, ChatForm] = {form.name: form for form in (OPENAI, ANTHROPIC, GEMINI)}
"""Kind of a model's name -> its form. A key is sent to the providers of its form alone."""
