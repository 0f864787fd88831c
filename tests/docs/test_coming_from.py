"""The way from LLaVA: every flag of its scripts has a line, and every key that is named exists."""

from __future__ import annotations

import re

import pytest

from mm_moslora.config import load_recipe
from mm_moslora.config.recipe import leaves
from tests.docs.blocks import ROOT

FLAGS = {
    "bf16", "data_path", "dataloader_num_workers", "deepspeed", "evaluation_strategy", "gradient_accumulation_steps",
    "gradient_checkpointing", "group_by_modality_length", "image_aspect_ratio", "image_folder", "lazy_preprocess",
    "learning_rate", "logging_steps", "lora_alpha", "lora_enable", "lora_r", "lr_scheduler_type", "mm_projector_lr",
    "mm_projector_type", "mm_use_im_patch_token", "mm_use_im_start_end", "mm_vision_select_layer", "model_max_length",
    "model_name_or_path", "num_train_epochs", "output_dir", "per_device_eval_batch_size",
    "per_device_train_batch_size", "pretrain_mm_mlp_adapter", "report_to", "save_steps", "save_strategy",
    "save_total_limit", "tf32", "tune_mm_mlp_adapter", "version", "vision_tower", "warmup_ratio", "weight_decay",
}  # fmt: skip
"""Of scripts/v1_5/pretrain.sh, finetune.sh and finetune_lora.sh."""


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    """Both columns of the table."""
    text = (ROOT / "docs" / "tutorials" / "coming_from.md").read_text(encoding="utf-8")
    table = text[text.index("| LLaVA | here |") : text.index("```yaml")]
    lines = [line for line in table.splitlines() if line.startswith(("| `", "| none"))]
    return [(left, right) for left, right in (line.strip("| ").split(" | ") for line in lines)]


def test_every_flag_of_llavas_scripts_has_a_line(rows: list[tuple[str, str]]) -> None:
    named = {flag for left, _ in rows for flag in re.findall(r"--(\w+)", left)}
    assert named == FLAGS


def test_every_key_of_the_table_exists(rows: list[tuple[str, str]]) -> None:
    recipe = load_recipe("llava15_7b_pretrain").to_dict()
    known = set(leaves(recipe)) | {"data.train", "data.validation", "track.trackers"}
    keys = {key for _, right in rows for key in re.findall(r"`([a-z_]+\.[a-z_.]+)\b", right)}
    assert len(keys) > 25
    assert keys <= known, keys - known


def test_what_a_row_sets_is_a_recipe(rows: list[tuple[str, str]]) -> None:
    for _, right in rows:
        for key, value in re.findall(r"`([a-z_]+\.[a-z_.]+): ([^`]+)`", right):
            load_recipe("llava15_7b_pretrain", [f"{key}={value}"])
