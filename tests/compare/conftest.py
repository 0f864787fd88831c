"""The processes of a comparison start from one with all imports."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator

import pytest
from preloaded import Preloaded


@pytest.fixture(scope="package", autouse=True)
def _start_at_once(python: Preloaded) -> Iterator[None]:
    multiprocessing.set_executable(str(python.ours))
    yield
    multiprocessing.set_executable(sys.executable)
