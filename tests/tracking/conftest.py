"""Trackers without an account, a sample, and the `read_run` fixture for offline wandb files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from wandb_files import read_finished

from mm_moslora.tracking import SampleAnswer


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "none"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(home))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))


@pytest.fixture
def sample(tmp_path: Path) -> SampleAnswer:
    path = tmp_path / "picture.png"
    Image.new("RGB", (400, 200), "red").save(path)
    return SampleAnswer(
        image=path, question="What colour | shape?", expected="red", prediction="<b>red</b>", correct=True
    )


@pytest.fixture
def read_run() -> Callable[[Path], dict[str, Any]]:
    def read(folder: Path) -> dict[str, Any]:
        (path,) = folder.rglob("*.wandb")
        return read_finished(path)

    return read
