"""Pairs and a tiny ready-made model for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import make_pairs
from vlms import make_vlm


@pytest.fixture(scope="session")
def picture_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def text_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("text_pairs"), pictures=False)


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vlm(tmp_path_factory.mktemp("qwen2_5_vl"), "qwen2_5_vl")
