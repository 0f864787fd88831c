"""Two ranks share the packed rows of pairs, stop, and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pairs import logged, make_pairs, make_recipe, train

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.slow


def test_two_ranks_learn_from_rows_what_one_does(parts: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    """Rows hold different numbers of pairs, each of which has the same weight in a step."""
    pairs, model = make_pairs(tmp_path / "pairs", pictures=False), {"language": str(parts["language"])}
    mixture, files = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0]}, {}
    for name, batch in (("one", 2), ("two", 1), ("resumed", 1)):
        recipe = make_recipe(
            tmp_path / name, pairs, model, preference=mixture, data={"max_length": 64, "pack_tokens": 128},
            train={"steps": 4, "global_batch": 2, "micro_batch": batch},
        )  # fmt: skip
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(recipe.to_dict()))
    train(str(files["one"]))
    ranks.run(["pairs:train", str(files["two"]), f"{files['resumed']}@2", str(files["resumed"])])
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "two")
