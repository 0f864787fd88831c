"""A tiny recipe for the tests of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from trials import make_recipe

from mm_moslora.config import Recipe


@pytest.fixture
def recipe(language_folder: Path, vision_folder: Path, records: Path, tmp_path: Path) -> Recipe:
    made = make_recipe(
        {"language": language_folder, "vision": vision_folder, "records": records}, tmp_path / "run", "none",
        dropout=0.1, steps=6, micro_batch=4, rehearsal=True,
    )  # fmt: skip
    return replace(made, name="tiny", optim=replace(made.optim, lr=2e-3, projector_lr=1e-2))
