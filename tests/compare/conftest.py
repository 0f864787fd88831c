"""The runs of a comparison start with all imports."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _start_at_once(start_at_once: None) -> None:
    pass
