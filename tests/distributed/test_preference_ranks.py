"""Two ranks learn from preferences as one does, stop, and go on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pairs import logged, make_judged, make_pairs, make_questions, make_recipe, train
from safetensors.torch import load_file
from trials import divided_weights
from video_files import write_animation
from vlms import make_video_vlm, make_vlm
from waiting import wait_until

from mm_moslora.reporting.run_status import read_state
from mm_moslora.utils.errors import ExitStatus

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.slow


def test_two_ranks_learn_what_one_does(parts: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    """Each pair has the same weight in a step, whichever rank has it; and each token where `sft` counts tokens."""
    pairs, model = make_pairs(tmp_path / "pairs", pictures=False), {"language": str(parts["language"])}
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["messages"][-1]["content"] = "red green blue " * (1 + number % 3)
    pairs.write_text("\n".join(map(json.dumps, lines)))
    mixture, files = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0]}, {}
    divided = divided_weights(tmp_path / "zero3.json")
    for name in ("one", "two", "resumed", "later", "divided"):
        section = {"micro_batch": 4 if name == "one" else 2, "zero": divided if name == "divided" else "auto"}
        start = {"weights": str(tmp_path / "one")} if name in ("later", "divided") else {}
        recipe = make_recipe(tmp_path / name, pairs, model, preference=mixture, train=section, adapter=start)
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(recipe.to_dict()))
    train(str(files["one"]))
    ranks.run(["pairs:train", str(files["two"])])
    rest = [f"{files['resumed']}@3", files["resumed"], files["later"], f"{files['divided']}@3", files["divided"]]
    ranks.run(["pairs:train", *map(str, rest)])
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "two")
    assert logged(tmp_path / "divided") == pytest.approx(logged(tmp_path / "later"), rel=1e-4)
    train(str(files["two"]))  # one rank finds the run finished


@pytest.mark.parametrize(("objective", "zero"), [("kto", "zero2"), ("grpo", "zero3")])
def test_a_run_on_two_ranks_stops_and_goes_on_as_if_it_had_not(
    objective: str, zero: str, parts: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """The answers of a question are dealt to both ranks, which compare them with one mean."""
    if zero == "zero3":
        zero = divided_weights(tmp_path / "zero3.json")
    pairs, model = make_pairs(tmp_path / "pairs", pictures=False), {"language": str(parts["language"])}
    grpo = {"generations": 4, "max_new_tokens": 3, "rewards": ["early"]}
    sections: dict[str, Any] = {"objective": objective} | ({"grpo": grpo} if objective == "grpo" else {})
    files = []
    for name, engine in (("resumed", "auto"), ("straight", "auto"), ("cut", zero), ("whole", zero)):
        recipe = make_recipe(
            tmp_path / name, pairs if objective == "kto" else make_questions(pairs), model, **sections,
            train={"steps": 4, "global_batch": 8, "micro_batch": 2, "zero": engine},
        )  # fmt: skip
        files.append(str(tmp_path / f"{name}.yaml"))
        Path(files[-1]).write_text(yaml.safe_dump(recipe.to_dict()))
    ranks.run(["pairs:train", str(own_reward(tmp_path)), f"{files[0]}@2", *files[:2], f"{files[2]}@2", *files[2:]])
    losses = logged(tmp_path / "straight")
    assert len(losses) == 4
    assert any(losses)
    assert logged(tmp_path / "resumed") == losses
    assert logged(tmp_path / "whole") == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    adapter = Path("checkpoint-000004", "adapter", "moslora.safetensors")
    whole, straight, cut = (load_file(tmp_path / name / adapter) for name in ("whole", "straight", "cut"))
    torch.testing.assert_close(whole, straight, rtol=1e-2, atol=5e-4)  # of a tenth of a step
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def own_reward(folder: Path) -> Path:
    """Code with the reward `early`."""
    path = folder / "own.py"
    path.write_text(
        "from mm_moslora.preferences.rewards import REWARDS\n"
        "REWARDS['early'] = lambda text, document: sum(letter < 'm' for letter in text)\n"
    )
    return path


def faulty(parts: dict[str, Path], folder: Path, zero: str = "auto", **train: Any) -> str:
    """A recipe of four steps with pairs; gives its file."""
    pairs = make_pairs(folder.parent / "pairs", pictures=False)
    section = {"steps": 4, "zero": zero, "save_every": 1, "keep_last": 0, "timeout_minutes": 5} | train
    recipe = make_recipe(folder, pairs, {"language": str(parts["language"])}, train=section)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    return str(file)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_value_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    fault: str, parts: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    stages = ("auto", "zero1", "zero2", "zero3")
    group = ranks.run(["faults:preferring", fault, "1", "2", *(faulty(parts, tmp_path / z, z) for z in stages)])
    assert group.output(1).count("Step 2 skipped: the loss or a gradient is not finite") == len(stages)
    assert "Records of rank 1: p" in group.output(1)
    assert group.output(0).count("Step 2 skipped: the loss of another rank") == (fault == "loss") * len(stages)
    for zero in stages:
        assert logged(tmp_path / zero, "skipped_steps") == [0, 1, 1, 1]
        losses = logged(tmp_path / zero)
        assert losses[2:] == pytest.approx(logged(tmp_path / "auto")[2:], rel=1e-4)
        assert losses[1] is None


def test_a_save_that_fails_on_one_rank_loses_that_checkpoint_only(
    parts: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    for zero in ("auto", "zero2"):
        group = ranks.run(["faults:preferring", "save", "0", "2", faulty(parts, tmp_path / zero, zero)])
        assert "Training continues" in group.output(0)
        saved = sorted(path.name for path in (tmp_path / zero).glob("checkpoint-*"))
        assert saved == ["checkpoint-000001", "checkpoint-000003", "checkpoint-000004"]


def test_a_rank_that_is_killed_or_hangs_is_named_and_the_run_goes_on_exactly(
    parts: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    straight = faulty(parts, tmp_path / "straight")
    for fault, code in (("SIGKILL", 1), ("SIGSTOP", ExitStatus.HANG)):
        recipe = faulty(parts, tmp_path / fault, step_timeout_minutes=0.1)
        group = ranks.start(["faults:preferring", fault, "1", "3", recipe])
        if fault == "SIGSTOP":
            wait_until(lambda: "No progress for" in group.output(0), lambda: group.outputs)  # noqa: B023
            os.kill(group.pids[1], signal.SIGKILL)
        ranks.finish(group)
        assert group.codes == [code, -signal.SIGKILL], group.outputs
        state = read_state(tmp_path / fault)
        assert (state.name, state.ranks) == ("failed", (1,)), group.outputs
        assert f"rank 1 (process {group.pids[1]} on" in str(state.reason)
    assert (tmp_path / "SIGSTOP" / "stacks" / "rank-00000.txt").stat().st_size > 0
    ranks.run(["pairs:train", straight, *(str(tmp_path / f"{fault}.yaml") for fault in ("SIGKILL", "SIGSTOP"))])
    for fault in ("SIGKILL", "SIGSTOP"):
        assert logged(tmp_path / fault) == logged(tmp_path / "straight")


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


MIXED = {
    "dpo": ("llava", "zero3"),
    "kto": ("qwen2_5_vl", "zero3"),
    "grpo": ("qwen3_vl", "zero3"),
    "dpo with adapters in the tower": ("qwen3_vl", "zero2"),
}
"""Objectives, ready-made models and engines."""


@pytest.mark.parametrize("case", MIXED)
def test_ranks_with_and_without_pictures_learn_as_data_parallel_ones_do(
    case: str, parts: dict[str, Path], ranks: Any, tmp_path: Path
) -> None:
    """Of pictures, texts and, in models that take them, videos; in some steps one rank has text alone."""
    family, zero = MIXED[case]
    objective = case.partition(" ")[0]
    path = make_pairs(tmp_path / "pairs", 8)
    write_animation(path.parent / "images" / "video.gif", 4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        question = line["messages"][0]
        if number % 2:
            del line["images"]
            question["content"] = f"say {line['id']}"
        if number in (4, 5) and family != "llava":
            line["video"] = "video.gif"
            question["content"] = f"<video>{question['content']}"
    path.write_text("\n".join(map(json.dumps, lines)))
    path = {"dpo": path, "kto": make_judged(path), "grpo": make_questions(path)}[objective]
    make = make_vlm if family == "llava" else make_video_vlm
    engines = {"plain": "auto", "together": divided_weights(tmp_path / "zero3.json") if zero == "zero3" else zero}
    tower = "frozen" if zero == "zero3" else "adapter"
    model = {"vlm": str(make(tmp_path / "vlm", family)), "vision": {"mode": tower}}
    held_out = [{"path": str(path), "image_folder": str(path.parent / "images"), "video_frames": 2}]
    sections: dict[str, Any] = {"objective": objective, "data": {"train": held_out, "validation": held_out}}
    if objective == "grpo":
        sections["grpo"] = {"generations": 2, "max_new_tokens": 3, "rewards": ["early"]}
    files = []
    for name, engine in engines.items():
        train = {"steps": 6, "global_batch": 4, "micro_batch": 1 + (objective == "kto"), "zero": engine}
        recipe = make_recipe(tmp_path / name, path, model, **sections, train=train | {"step_timeout_minutes": 0.5})
        files.append(str(tmp_path / f"{name}.yaml"))
        Path(files[-1]).write_text(yaml.safe_dump(recipe.to_dict()))
    ranks.run(["pairs:train", str(own_reward(tmp_path)), *files])
    for key, count in (("loss", 6), ("grad_norm", 6), ("validation_loss", 1)):
        found, expected = (logged(tmp_path / name, key) for name in engines)
        assert len(found) == count
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), key
