"""The runs of a comparison start with all imports."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from preloaded import Preloaded


@pytest.fixture(scope="module", autouse=True)
def _start_at_once(python: Preloaded) -> Iterator[None]:
    before, sys.executable = sys.executable, str(python.ours)
    yield
    sys.executable = before
