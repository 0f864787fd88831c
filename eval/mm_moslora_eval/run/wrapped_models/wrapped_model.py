"""A model around another one."""

from __future__ import annotations

from typing import Any

from mm_moslora_eval.protocol.model_interface import Model


class WrappedModel:
    """What models around a model have in common: everything that they do not change is that of the model."""

    _model: Model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)  # what only some models have, such as `thinking_tokens`

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model.name

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return self._model.fingerprint

    def close(self) -> None:
        """Free the model."""
        self._model.close()
