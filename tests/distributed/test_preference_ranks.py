"""Two ranks learn from preferences as one does, stop, and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pairs import logged, make_pairs, make_recipe, train

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.slow


def test_two_ranks_learn_what_one_does(parts: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    """Each pair has the same weight in a step, whichever rank has it."""
    pairs, model = make_pairs(tmp_path / "pairs", pictures=False), {"language": str(parts["language"])}
    files = {}
    for name, batch in (("one", 4), ("two", 2), ("resumed", 2)):
        recipe = make_recipe(tmp_path / name, pairs, model, train={"micro_batch": batch})
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(recipe.to_dict()))
    train(str(files["one"]))
    ranks.run(["pairs:train", str(files["two"])])
    ranks.run(["pairs:train", f"{files['resumed']}@3", str(files["resumed"])])
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "two")
    train(str(files["two"]))  # one rank finds the run finished
