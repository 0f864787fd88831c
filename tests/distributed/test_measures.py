"""What is measured at a regular save is that of the whole trained weights, and no measure costs a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trials import make_recipe, metrics, write

from mm_moslora.adapters.adapter_inspection import inspect_adapter, summary

pytestmark = pytest.mark.slow
PRESETS = Path(__file__).parents[2] / "deepspeed_configs"


def mixer_lines(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "mixer/effective_rank" in line]


@pytest.mark.parametrize("stage", ["zero2", "zero3", "cut up"])
def test_measures_of_a_regular_save_are_those_of_its_folder(stage, parts, ranks, tmp_path):
    """Also at the first step of a session, in bf16, and under ZeRO-3 with every small weight cut up."""
    zero = stage
    if stage == "cut up":
        preset = json.loads((PRESETS / "zero3.json").read_text())
        preset["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        zero = str(tmp_path / "cut_up.json")
        Path(zero).write_text(json.dumps(preset))
    recipe = write(make_recipe(parts, tmp_path / "run", zero, precision="bf16", save_every=1, keep_last=9))
    ranks.run([f"{recipe}@1", recipe])
    found = {line["step"]: line for line in mixer_lines(tmp_path / "run")}
    assert sorted(found) == [1, 2, 3, 4]
    for step in found:
        for name, value in summary(inspect_adapter(tmp_path / f"run/checkpoint-{step:06d}/adapter")).items():
            assert found[step][name] == pytest.approx(value, rel=1e-4), (step, name)


def test_measures_that_fail_end_no_run(parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero3", save_every=1, keep_last=9)
    group = ranks.run(["faults:failing_measures", write(recipe)])
    assert "The adapter could not be measured (IndexError: out of range). Training continues." in group.output(0)
    assert len(metrics(tmp_path / "run")) == 4
    assert {f"checkpoint-{step:06d}" for step in (1, 2, 3, 4)} <= {path.name for path in (tmp_path / "run").iterdir()}
