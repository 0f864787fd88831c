"""A hub that takes connections and says nothing is asked once; its client alone would wait for minutes, or for ever."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import constants
from mm_moslora_eval.backends.transformers_model import TransformersModel

from mm_moslora.config import load_recipe
from mm_moslora.data.sources.hf_tables import load_checked
from mm_moslora.models import assembly
from mm_moslora.models.meta_model import build_meta_model
from mm_moslora.utils.errors import EvalError, ModelError
from mm_moslora.utils.network import hub_access


def connections(server: socket.socket) -> int:
    """How many a server has got that accepts none."""
    server.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        for count in itertools.count():  # noqa: B007
            server.accept()[0].close()
    return count


def recipe() -> Any:
    return load_recipe("llava15_7b_moslora", ["model.language=some/model"])


@pytest.mark.parametrize(
    ("load", "error"),
    [
        (lambda: build_meta_model(recipe().model, recipe().adapter), ModelError),
        (lambda: assembly.load_parts(recipe().model), ModelError),
        (lambda: assembly.load_parts(recipe().model, weights="none"), ModelError),
        (lambda: TransformersModel.from_pretrained("some/model"), EvalError),
        (lambda: load_checked("some/table"), ConnectionError),
    ],
    ids=["plan", "train", "prepare", "evaluate", "table"],
)
def test_a_hub_that_does_not_answer_is_not_waited_for(
    load: Callable[[], Any], error: type[Exception], monkeypatch, caplog
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub_access, "SECONDS", 0.2)
        with pytest.raises(error, match=r"some/(model|table)"):
            load()
        assert connections(silent) == 1
    (told,) = [message for message in caplog.messages if "does not answer" in message]
    assert told.endswith("what is cached of it is used.")
    assert not constants.HF_HUB_OFFLINE
