"""Golden loss curves: each shipped recipe on tiny parts gives the losses that it gave when the curve was written.

The initial weights are drawn by numpy (`numpy_weights`), so that the curves hold under every release of PyTorch.

A change that moves them on purpose says so and writes them again, which also adds the curve of a new recipe:

    UPDATE_GOLDEN_LOSSES=1 python -m pytest tests/training/test_golden_losses.py
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from numpy_weights import redraw
from tiny import make_language, make_records, make_vision
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from vlms import make_vlm

from mm_moslora.config import (
    ModelConfig,
    ProjectorConfig,
    Recipe,
    SourceConfig,
    TrackConfig,
    ValidateConfig,
    load_recipe,
    recipe_names,
)
from mm_moslora.training import run_setup
from mm_moslora.training.training_loop import train

GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
UPDATE = bool(os.environ.get("UPDATE_GOLDEN_LOSSES"))
FAMILIES = {
    "qwen25_vl_7b_moslora": "qwen2_5_vl", "qwen25_vl_32b_moslora": "qwen2_5_vl", "qwen25_vl_72b_moslora": "qwen2_5_vl",
    "qwen3_vl_8b_moslora": "qwen3_vl",
}  # fmt: skip
STEPS = 6
VLM = AutoModelForImageTextToText


def redrawn(folder: Path, kind: type) -> Path:
    """A saved model with weights that numpy draws."""
    model = kind.from_pretrained(folder)
    redraw(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    return redrawn(make_language(tmp_path_factory.mktemp("language")), AutoModelForCausalLM)


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return redrawn(make_vision(tmp_path_factory.mktemp("vision")), AutoModel)


@pytest.fixture(autouse=True)
def _new_parts_drawn_by_numpy(monkeypatch) -> None:
    """Projector and adapters are made when a run is prepared."""
    attach = run_setup.attach_adapters

    def attach_and_redraw(assembly, *args, **kwargs) -> None:
        attach(assembly, *args, **kwargs)
        redraw(assembly.model)

    monkeypatch.setattr(run_setup, "attach_adapters", attach_and_redraw)


def small_model(model: ModelConfig, language: Path, vision: Path) -> ModelConfig:
    """Tiny parts under the recipe's modes."""
    tower = model.vision
    if tower is not None:
        tower = replace(
            tower, name=str(vision), revision=None, pretrained=None, image_size=None, feature_layer=-2, select="patch"
        )
    projector = ProjectorConfig(kind=model.projector.kind, mode=model.projector.mode)
    return replace(model, language=str(language), language_revision=None, vision=tower, projector=projector)


def in_small(recipe: Recipe, model: ModelConfig, records: Path, output: Path) -> Recipe:
    """A recipe with its own optimiser, adapters and modes, but tiny parts, little data and few steps."""
    source = SourceConfig(path=str(records), image_folder=str(records.parent / "images"))
    return replace(
        recipe,
        model=model,
        adapter=replace(recipe.adapter, rank=min(8, recipe.adapter.rank)),
        data=replace(recipe.data, train=[source], validation=[], max_length=256, workers=0),
        train=replace(
            recipe.train, output=str(output), steps=STEPS, global_batch=8, micro_batch=4, zero="none", precision="fp32",
            save_every=0, validate_every=0, rehearsal=False,
        ),
        validate=ValidateConfig(),
        track=TrackConfig(trackers=[]),
    )  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_the_curve_of_a_recipe_has_not_moved(name, language, vision, records, tmp_path):
    recipe = load_recipe(name)
    if recipe.model.vlm is not None:
        model = replace(recipe.model, vlm=str(redrawn(make_vlm(tmp_path / "vlm", FAMILIES[name]), VLM)))
    else:
        model = small_model(recipe.model, language, vision)
        if recipe.model.vision is None:
            records = make_records(tmp_path / "text", 24, text_only_every=1)
    train(in_small(recipe, model, records, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    found = {key: [line[key] for line in lines] for key in ("loss", "grad_norm")}
    path = GOLDEN / f"{name}.json"
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(path.read_text())
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        # Kernels of other processors round otherwise, and so do releases of bitsandbytes; a change of the computation
        # is larger.
        close = 2e-4 if recipe.model.quantisation == "none" else 1e-3
        assert found[key] == pytest.approx(values, rel=close), key


def test_every_curve_belongs_to_a_recipe():
    assert set() < {path.stem for path in GOLDEN.glob("*.json")} <= set(recipe_names())
