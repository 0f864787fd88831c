"""A family without a builder here trains, exports and loads back, from its default configuration made small."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from small_families import small_family
from tiny import supervised_logits

from mm_moslora.batch import Batch
from mm_moslora.cli.export_verbs import export
from mm_moslora.config import Recipe
from mm_moslora.models.load_model import load
from mm_moslora.planning.model_probes import conversations_of, example_of
from mm_moslora.training.training_loop import train


def test_a_run_of_a_new_family_exports_and_loads_back(tmp_path: Path) -> None:
    parts = small_family("qwen3_vl_moe")
    model = parts.model
    for part in (model, parts.processor):
        part.save_pretrained(tmp_path / "base")
    rows = []
    for number, size in enumerate(((64, 48), (90, 120))):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
        rows.append({"id": f"{number}", "image": f"{number}.png", "conversations": turns})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe.from_dict(
        {
            "model": {"vlm": str(tmp_path / "base")},
            "adapter": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"], "mixer_init": "kaiming"},
            "data": {"train": [{"path": str(tmp_path / "train.jsonl"), "image_folder": str(tmp_path)}]},
            "optim": {"lr": 1e-2},
            "train": {
                "output": str(tmp_path / "run"), "steps": 2, "global_batch": 2, "micro_batch": 2, "zero": "none",
                "precision": "fp32",
            },
            "track": {"trackers": []},
        }
    )  # fmt: skip
    train(recipe)
    tuned = load(tmp_path / "run", merge=False)
    batch = Batch.from_examples([example_of(tuned, *conversation) for conversation in conversations_of(tuned)])
    assert export(tmp_path / "run", tmp_path / "out", to="hf", dtype="fp32") == 0
    with torch.no_grad():
        live, exported, before = (
            supervised_logits(made, batch) for made in (tuned.model, load(tmp_path / "out").model, model)
        )
    torch.testing.assert_close(exported, live, rtol=0, atol=1e-4 * float(live.abs().max()))
    assert (live - before).abs().max() > 1e-3
