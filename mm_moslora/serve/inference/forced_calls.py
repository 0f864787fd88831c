"""The beginning of an answer that calls one tool: what the model learned to write before the arguments of a call."""

from __future__ import annotations

import json
from typing import Any

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.serve.inference.tool_replies import CallSplit
from mm_moslora.utils.errors import MoSLoRAError
from mm_moslora.utils.untrusted_data import parse_json

_ARGUMENTS: tuple[dict[str, Any], ...] = ({}, {"a": 1}, {"b": "x"})


def opening_of_call(
    encoder: ConversationEncoder, form: dict[str, Any], tools: str, *, thinking: bool | None = None
) -> list[int] | None:
    """Token ids of an answer up to the arguments of its call, as training writes them behind a prompt.

    It is what answers with different arguments have in common. None where the chat template gives no such beginning:
    the prompt ends otherwise, the name is not closed, or a call that begins so is not read back.

    Args:
        encoder: of the model.
        form: from `call_form`.
        tools: JSON text of the one tool to be called.
        thinking: the form of the prompt.
    """
    asked = encoder if thinking is None else encoder.asking("always" if thinking else "auto")
    [tool] = parse_json(tools, surrogates=True)
    name, question = tool["function"]["name"], Turn(role="user", text="a", tools=tools)
    answers: list[list[int]] = []
    try:
        prompt = encoder.encode_prompt([question], thinking=thinking).tolist()
        for arguments in _ARGUMENTS:
            call = {"id": "call00000", "type": "function", "function": {"name": name, "arguments": arguments}}
            encoded = asked.encode([question, Turn(role="assistant", text="", tools=json.dumps([call]))])
            if encoded.input_ids[: len(prompt)].tolist() != prompt:
                return None
            answers.append(encoded.input_ids[encoded.supervised].tolist())
            if encoded.input_ids[len(prompt) : len(prompt) + len(answers[-1])].tolist() != answers[-1]:
                return None
    except MoSLoRAError:
        return None
    different = (place for place, ids in enumerate(zip(*answers, strict=False)) if len({*ids}) > 1)
    opening = answers[0][: next(different, 0)]
    text = encoder.decode_answer(opening, calls=True)
    begun = CallSplit(form, tools).add(text)
    whole = CallSplit(form, tools).add(encoder.decode_answer(answers[1][:-1], calls=True), last=True)
    called = [(call["function"]["name"], [*parse_json(call["function"]["arguments"])]) for call in whole[2]]
    closed = name in text and not text.endswith(name)
    return opening if closed and not any(map(str.strip, begun[:2])) and called == [(name, ["a"])] else None
