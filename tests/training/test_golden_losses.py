"""Golden loss curves: each shipped recipe on tiny parts gives the losses that it gave when the curve was written.

A change that moves them on purpose says so and writes them again, which also adds the curve of a new recipe:

    UPDATE_GOLDEN_LOSSES=1 python -m pytest tests/training/test_golden_losses.py
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_records

from mm_moslora.config import ProjectorConfig, SourceConfig, TrackConfig, ValidateConfig, load_recipe, recipe_names
from mm_moslora.training.loop import train

GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
UPDATE = bool(os.environ.get("UPDATE_GOLDEN_LOSSES"))
OURS = [name for name in recipe_names() if load_recipe(name).model.vlm is None]
"""Ready-made models have processors of their own, which tiny parts do not."""
NAMES = OURS if UPDATE else sorted(path.stem for path in GOLDEN.glob("*.json"))
STEPS = 6


def in_small(name: str, language: Path, vision: Path, records: Path, output: Path):
    """A recipe with its own optimiser, adapters and modes, but tiny parts, little data and few steps."""
    recipe = load_recipe(name)
    tower = recipe.model.vision
    if tower is not None:
        tower = replace(
            tower, name=str(vision), revision=None, pretrained=None, image_size=None, feature_layer=-2, select="patch"
        )
    projector = ProjectorConfig(kind=recipe.model.projector.kind, mode=recipe.model.projector.mode)
    source = SourceConfig(path=str(records), image_folder=str(records.parent / "images"))
    return replace(
        recipe,
        model=replace(
            recipe.model, language=str(language), language_revision=None, vision=tower, projector=projector
        ),
        adapter=replace(recipe.adapter, rank=min(8, recipe.adapter.rank)),
        data=replace(recipe.data, train=[source], validation=[], max_length=256, workers=0),
        train=replace(
            recipe.train, output=str(output), steps=STEPS, global_batch=8, micro_batch=4, zero="none", precision="fp32",
            save_every=0, validate_every=0, rehearsal=False,
        ),
        validate=ValidateConfig(),
        track=TrackConfig(trackers=[]),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_curve_of_a_recipe_has_not_moved(name, language_folder, vision_folder, records, tmp_path):
    if load_recipe(name).model.vision is None:
        records = make_records(tmp_path / "text", 24, text_only_every=1)
    train(in_small(name, language_folder, vision_folder, records, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    found = {key: [line[key] for line in lines] for key in ("loss", "grad_norm")}
    path = GOLDEN / f"{name}.json"
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(path.read_text())
    for key, values in expected.items():
        # Kernels of other processors round otherwise; a change of the computation is larger.
        assert found[key] == pytest.approx(values, rel=2e-4), key


def test_every_curve_belongs_to_a_recipe():
    assert NAMES
    assert set(NAMES) <= set(recipe_names())
