"""A model of the harness in place of a chat service, such as a local judge."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mm_moslora_eval.backends.endpoints.service_replies import Usage
from mm_moslora_eval.protocol.model_interface import Answer, Message, Model, Request

if TYPE_CHECKING:
    from collections.abc import Sequence


class LocalChat:
    """Answers texts with a model that is loaded at the first request.

    Requests of several threads are decoded together: the thread whose turn it is answers all that wait.
    """

    greedy = True

    def __init__(self, model: Callable[[], Model], *, name: str, batch_size: int = 8) -> None:
        self._open, self._batch_size = model, batch_size
        self._loaded: Model | None = None
        self.model, self.usage = name, Usage()
        self._waiting: list[_Waiting] = []
        self._turn, self._adding = threading.Lock(), threading.Lock()

    @property
    def url(self) -> str:
        """The model's fingerprint, which identifies its replies."""
        with self._turn:
            return f"local:{self._model().fingerprint}"

    def _model(self) -> Model:
        if self._loaded is None:
            self._loaded = self._open()
        return self._loaded

    def chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answer one conversation of texts, in OpenAI's form."""
        messages = tuple(Message(role=turn["role"], content=(turn["content"],)) for turn in payload["messages"])
        own = _Waiting(Request(id="judge", messages=messages, max_new_tokens=payload["max_tokens"]))
        with self._adding:
            self._waiting.append(own)
        with self._turn:
            if not own.done:
                with self._adding:
                    others = [item for item in self._waiting if item is not own]
                    taken = [own, *others[: self._batch_size - 1]]
                    self._waiting = [item for item in self._waiting if item not in taken]
                self._answer(taken)
        if own.answer is None:
            raise RuntimeError(f"{self.model} gave no answer{f': {own.error}' if own.error else ''}")
        choice = {
            "message": {"role": "assistant", "content": own.answer.text},
            "finish_reason": own.answer.finish_reason,
        }
        reply = {"choices": [choice], "usage": {"prompt_tokens": 0, "completion_tokens": own.answer.tokens}}
        self.usage.add(reply, retries=0)
        return reply

    def _answer(self, taken: Sequence[_Waiting]) -> None:
        try:
            for index, answer in self._model().generate([item.request for item in taken], batch_size=len(taken)):
                taken[index].answer = answer
        except Exception as error:  # each thread raises it for its own request
            for item in taken:
                item.error = error
        for item in taken:
            item.done = True

    def close(self) -> None:
        """Free the model."""
        if self._loaded is not None:
            self._loaded.close()


class _Waiting:
    def __init__(self, request: Request) -> None:
        self.request, self.done = request, False
        self.answer: Answer | None = None
        self.error: Exception | None = None
