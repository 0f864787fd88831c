"""Runs of TRL's trainers below a base in 4 and 8 bits: what they learn, how they go on, and who reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import logged, make_judged, make_pairs, make_questions, make_recipe
from safetensors.torch import load_file
from vlms import make_vlm

from mm_moslora.adapters.layers.base_weights import quantisation
from mm_moslora.cli.cli_app import run as command
from mm_moslora.config import load_recipe
from mm_moslora.launch.imported_code import imported
from mm_moslora.models.load_model import load
from mm_moslora.preferences.preference_training import train_preferences
from mm_moslora.preferences.rewards import REWARDS
from mm_moslora.serve.terminal_chat import Chat

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
FIRST = {"dpo": math.log(2), "kto": 0.5, "grpo": 0.0}
"""Loss of a start that equals its reference."""
ADAPTER = "checkpoint-000003/adapter/moslora.safetensors"
BITS = {"dpo": "nf4", "kto": "int8", "grpo": "nf4"}
ANSWERS = {"generations": 4, "max_new_tokens": 4, "rewards": ["shown"], "beta": 0.1}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A reward of an imported file."""
    (file := tmp_path_factory.mktemp("own") / "own.py").write_text(
        "from mm_moslora.preferences.rewards import REWARDS\n"
        "REWARDS['shown'] = lambda text, document: sum(letter < 'm' for letter in text)\n"
    )
    with imported([file]):
        yield
    del REWARDS["shown"]


@pytest.fixture(scope="module", params=BITS)
def run(own: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second run on a base, in two sessions; the first gave it its start. The same in one stands beside it."""
    folder, objective = tmp_path_factory.mktemp(request.param), request.param
    pairs, base = make_pairs(folder / "pairs"), make_vlm(folder / "base", "qwen2_5_vl")
    records = {"dpo": lambda made: made, "kto": make_judged, "grpo": make_questions}[objective](pairs)
    sections: dict[str, Any] = {"objective": objective, "train": {"steps": 3, "global_batch": 8, "micro_batch": 4}}
    if objective == "grpo":
        sections["grpo"] = ANSWERS
    model, adapter = {"vlm": str(base), "quantisation": BITS[objective]}, dict[str, Any](rank=4, alpha=8)
    train_preferences(make_recipe(folder / "before", records, model, adapter=adapter, **sections))
    adapter["weights"] = str(folder / "before")
    train_preferences(make_recipe(folder / "straight", records, model, adapter=adapter, **sections))
    recipe = make_recipe(folder / "run", records, model, adapter=adapter, **sections)
    assert train_preferences(recipe, stop_at=1).step == 1
    assert train_preferences(recipe).finished
    return folder / "run"


def test_the_adapter_stays_in_fp32_and_a_stopped_run_goes_on(run: Path) -> None:
    losses = logged(run)
    assert losses == logged(run.parent / "straight")
    assert losses[0] == pytest.approx(FIRST[load_recipe(run).objective], abs=1e-6)
    before, after = (load_file(next(folder.glob(ADAPTER))) for folder in (run.parent / "before", run))
    assert all(not torch.equal(before[name], value) for name, value in after.items())
    assert all(not torch.equal(value.bfloat16().float(), value) for value in after.values())


def test_every_reader_takes_the_run(run: Path, tmp_path: Path) -> None:
    live = load(run)
    assert any(map(quantisation, live.model.modules()))
    assert isinstance(Chat(live, max_new_tokens=2).ask("say red"), str)
    assert command(["export", str(run), str(tmp_path / "model")]) == 0
    assert not any(map(quantisation, load(tmp_path / "model").model.modules()))
    assert command(["export", str(run), str(tmp_path / "merged"), "--to", "hf"]) == 0
    asked = [{"from": "human", "value": "<image>\nwhat is the color?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "asked.json").write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": asked}]))
    task = f"llava:{tmp_path / 'asked.json'}@{run.parent / 'pairs' / 'images'}"
    words = ["--model", str(run), "--output", str(tmp_path / "scores"), "--max-new-tokens", "2", "--no-report"]
    assert command(["eval", "run", task, *words]) == 0
