"""Tests that need a CUDA device, under eight minutes on one H100. Without a device each is skipped.

    python -m pytest -q -n0 tests/gpu                   # on a machine with a GPU
    GPU_TESTS=cpu python -m pytest -q -n0 tests/gpu     # the same code on the CPU, where it can run: tries the tests

They need PyTorch, transformers, PEFT and pytest. What else a test needs is the reason of its skip where it is missing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from trials import make_parts

HERE = Path(__file__).parent
ON_CPU = os.environ.get("GPU_TESTS") == "cpu"
MISSING = "needs a CUDA device (GPU_TESTS=cpu tries this test on the CPU)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != HERE:
            continue
        item.add_marker(pytest.mark.gpu)
        if not (torch.cuda.is_available() or ON_CPU or item.get_closest_marker("anywhere")):
            item.add_marker(pytest.mark.skip(reason=MISSING))
        elif item.get_closest_marker("cuda_only") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: item.path.parent == HERE and item.get_closest_marker("slow") is not None)


@pytest.fixture
def device() -> torch.device:
    """The first GPU; the CPU where none is there."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny language model, a tiny vision tower, and 40 records."""
    return make_parts(tmp_path_factory.mktemp("parts"))
