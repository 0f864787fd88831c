"""Steps of every objective, optimiser and kind of model whose numbers are tested on the CPU: here that they run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pairs
import pytest
from tiny import make_experts
from trials import make_recipe, with_optimizer
from video_files import write_video
from vlms import make_video_vlm, make_vlm

from mm_moslora.config import ModelConfig, Recipe, SourceConfig
from mm_moslora.training.training_loop import train

STEPS = 3
Parts = dict[str, Path]


def plain(parts: Parts, folder: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"steps": STEPS, "precision": "bf16"} | changes
    return make_recipe(parts, folder / "run", "none", **settings)


def preferring(objective: str, **sections: Any) -> Callable[[Parts, Path], Recipe]:
    def recipe(_: Parts, folder: Path) -> Recipe:
        pytest.importorskip("trl", reason="trl is not installed")
        records = pairs.make_pairs(folder)
        records = pairs.make_questions(records) if objective == "grpo" else records
        model = {"vlm": str(make_vlm(folder / "vlm", "qwen2_5_vl"))}
        train = {"steps": STEPS, "precision": "bf16"}
        return pairs.make_recipe(folder / "run", records, model, objective=objective, train=train, **sections)

    return recipe


def optimised(name: str) -> Callable[[Parts, Path], Recipe]:
    return lambda parts, folder: with_optimizer(plain(parts, folder), name)


def experts(parts: Parts, folder: Path) -> Recipe:
    made = plain(parts | {"language": make_experts(folder / "experts")}, folder)
    return replace(made, adapter=replace(made.adapter, targets=["q_proj", "v_proj"]))


def videos(parts: Parts, folder: Path) -> Recipe:
    pytest.importorskip("av", reason="av is not installed")
    turns = [{"from": "human", "value": "<video>\nwhat happens?"}, {"from": "gpt", "value": "it gets brighter"}]
    rows = [{"id": f"{number}", "video": f"{number}.mp4", "conversations": turns} for number in range(8)]
    (folder / "videos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number in range(8):
        write_video(folder / f"{number}.mp4", 4 + number)
    made = plain(parts, folder)
    model = ModelConfig(vlm=str(make_video_vlm(folder / "vlm", "qwen2_5_vl")))
    source = SourceConfig(path=str(folder / "videos.jsonl"), video_frames=4)
    return replace(made, model=model, data=replace(made.data, train=[source], max_length=2048))


CASES: dict[str, Callable[[Parts, Path], Recipe]] = {
    "dpo": preferring("dpo"),
    "packed dpo": preferring("dpo", data={"pack_tokens": 600}),
    "kto": preferring("kto"),
    "grpo": preferring("grpo", grpo={"generations": 2, "max_new_tokens": 4}),
    "muon": optimised("muon"),
    "adamw_8bit": optimised("adamw_8bit"),
    "experts": experts,
    "videos": videos,
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_taken(case: str, parts: Parts, tmp_path: Path) -> None:
    recipe = CASES[case](parts, tmp_path)
    if recipe.objective == "sft":
        result = train(recipe)
    else:
        from mm_moslora.preferences.preference_training import train_preferences

        result = train_preferences(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "loss" in line] == [0] * STEPS
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert result.finished
