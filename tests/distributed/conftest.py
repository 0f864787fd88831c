"""Ranks and tiny parts for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from preloaded import Preloaded
from ranks import Ranks
from trials import make_parts


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory, python: Preloaded) -> Iterator[Ranks]:
    """Starts groups of processes."""
    with Ranks(tmp_path_factory.mktemp("ranks"), python.ours) as started:
        yield started


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny language model, a tiny vision tower, and 40 records."""
    return make_parts(tmp_path_factory.mktemp("parts"))
