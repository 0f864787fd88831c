"""A tiny recipe for the tests of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_moslora.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    SourceConfig,
    TrackConfig,
    TrainConfig,
    VisionConfig,
)


@pytest.fixture
def recipe(language_folder: Path, vision_folder: Path, records: Path, tmp_path: Path) -> Recipe:
    return Recipe(
        name="tiny",
        model=ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision_folder))),
        adapter=AdapterConfig(rank=4, alpha=8, dropout=0.1, mixer_init="kaiming"),
        data=DataConfig(
            train=[SourceConfig(path=str(records), image_folder=str(records.parent / "images"))], max_length=256
        ),
        optim=OptimConfig(lr=2e-3, projector_lr=1e-2, warmup=1),
        train=TrainConfig(
            output=str(tmp_path / "run"), steps=6, global_batch=8, micro_batch=4, zero="none", precision="fp32"
        ),
        track=TrackConfig(trackers=[]),
    )
