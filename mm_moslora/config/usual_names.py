"""Names of open registries that a recipe may use without asking the registry, which would import torch.

Any other name is looked up in its registry, to which libraries and files of users add (`training/preflight.py:
check_names`). `tests/config/test_names.py` compares these names with the registries.
"""

from __future__ import annotations

PROJECTOR_KINDS = (
    "linear", "fused_mlp", "avg_pool", "pixel_shuffle", "c_abstractor", "perceiver", "qformer",
    *(f"mlp{depth}x_gelu" for depth in range(1, 10)),
)  # fmt: skip
"""`model.projector.kind`."""
ATTENTION = (
    "auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    "mm_moslora_segments",
)  # fmt: skip
"""`model.attention`."""
COMPILE_BACKENDS = ("inductor", "cudagraphs", "eager", "aot_eager")
"""`train.compile`."""
TOWER_LIBRARIES = ("open_clip", "timm")
"""Prefixes of `model.vision.name`, before a colon."""
REWARDS = ("exact", "relaxed", "letter", "yes_no", "contains", "vqa", "anls", "mmmu", "mathvista", "iou", "iou_50")
"""`grpo.rewards`. Others are those of imported files."""
