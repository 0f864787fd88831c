"""Nobody is locked in: the same model and data under Hugging Face's Trainer with DeepSpeed give the same losses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from trials import losses, make_recipe, write

from mm_moslora.config import OptimConfig

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_trainer_gives_our_losses(stage, parts, ranks, tmp_path):
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup=0)
    ours = replace(make_recipe(parts, tmp_path / "ours", f"zero{stage}", order="sequential", steps=3), optim=optim)
    theirs = replace(ours, train=replace(ours.train, output=str(tmp_path / "theirs")))
    ranks.run([write(ours)])
    ranks.run(["hf_run:train", write(theirs), "3", stage])
    found = json.loads((tmp_path / "theirs" / "losses.json").read_text())
    assert found == pytest.approx(losses(tmp_path / "ours"), rel=1e-4)
