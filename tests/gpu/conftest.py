"""Tests that need a CUDA device, under eight minutes on one H100. Without a device each is skipped.

    python -m pytest -q -n0 tests/gpu                   # on a machine with a GPU
    GPU_TESTS=cpu python -m pytest -q -n0 tests/gpu     # the same code on the CPU, where it can run: tries the tests

They need PyTorch, transformers, PEFT and pytest. What else a test needs is the reason of its skip where it is missing.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from trials import make_parts

HERE = Path(__file__).parent
ON_CPU = os.environ.get("GPU_TESTS") == "cpu"
MISSING = "needs a CUDA device (GPU_TESTS=cpu tries this test on the CPU)"


ENDED, SOURCES = os.environ.get("GPU_TESTS_ENDED"), os.environ.get("GPU_TESTS_SOURCES", "")
"""The file in which scripts/gpu.sh keeps what has ended, and the sources that this holds for."""
CUTS = 2
"""A test that is cut off so often is not begun again."""


def _note(outcome: str, test: str) -> None:
    if ENDED:
        with Path(ENDED).open("a") as stream:
            stream.write(f"{SOURCES} {outcome} {test}\n")


def _left(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those that have not ended on these sources."""
    lines = Path(ENDED).read_text().splitlines() if ENDED and Path(ENDED).is_file() else []
    noted = [line.split(" ", 2)[1:] for line in lines if line.startswith(f"{SOURCES} ")]
    ended = {test for outcome, test in noted if outcome != "begun"}
    begun = Counter(test for outcome, test in noted if outcome == "begun")
    for test in sorted(set(begun) - ended):
        if begun[test] >= CUTS:
            _note("cut", test)
            ended.add(test)
    return [item for item in items if item.nodeid not in ended]


def pytest_runtest_logstart(nodeid: str) -> None:
    _note("begun", nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _note(report.outcome, report.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != HERE:
            continue
        item.add_marker(pytest.mark.gpu)
        if not (torch.cuda.is_available() or ON_CPU or item.get_closest_marker("anywhere")):
            item.add_marker(pytest.mark.skip(reason=MISSING))
        elif item.get_closest_marker("cuda_only") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if ENDED:
        items[:] = _left(items)
    items.sort(key=lambda item: item.path.parent == HERE and item.get_closest_marker("slow") is not None)


@pytest.fixture
def device() -> torch.device:
    """The first GPU; the CPU where none is there."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny language model, a tiny vision tower, and 40 records."""
    return make_parts(tmp_path_factory.mktemp("parts"))
