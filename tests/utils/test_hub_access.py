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
from ranks import free_port
from transformers import AutoModelForCausalLM

from mm_moslora.config import VisionConfig, load_recipe
from mm_moslora.data.sources.hf_tables import load_checked
from mm_moslora.models import assembly
from mm_moslora.models.meta_model import build_meta_model
from mm_moslora.models.model_sizes import config_to_count, load_base
from mm_moslora.models.vision.vision_tower import load_vision
from mm_moslora.utils.errors import EvalError, ModelError
from mm_moslora.utils.network.hub_access import hub_or_cache


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


def test_blocks_of_threads_leave_the_hub_as_it_was(monkeypatch) -> None:
    """Also where the first to enter is the first to leave."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    first, second = hub_or_cache("a/b"), hub_or_cache("c/d")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE, "the second block is open"
    second.__exit__(None, None, None)
    assert not constants.HF_HUB_OFFLINE
    with hub_or_cache(".", None):  # nothing of the hub
        assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("load", "error"),
    [
        (lambda: build_meta_model(recipe().model, recipe().adapter), ModelError),
        (lambda: assembly.load_parts(recipe().model), ModelError),
        (lambda: assembly.load_parts(recipe().model, weights="none"), ModelError),
        (lambda: load_base(AutoModelForCausalLM, "some/model"), OSError),
        (lambda: load_vision(VisionConfig(name="some/model")), ModelError),
        (lambda: config_to_count("some/model", None), OSError),
        (lambda: TransformersModel.from_pretrained("some/model"), EvalError),
        (lambda: load_checked("some/table"), ConnectionError),
    ],
    ids=["plan", "train", "prepare", "base", "tower", "sizes", "evaluate", "table"],
)
def test_a_hub_that_does_not_answer_is_not_waited_for(
    load: Callable[[], Any], error: type[Exception], monkeypatch, caplog
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        with pytest.raises(error, match=r"some/(model|table)|connect to"):
            load()
        assert connections(silent) in (1, 2)
    told, *_ = [message for message in caplog.messages if "does not answer" in message]
    assert told.endswith("what is cached of it is used.")
    assert not constants.HF_HUB_OFFLINE
