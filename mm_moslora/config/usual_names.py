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
OF_OTHER_TRAINERS = {
    "learning_rate": "optim.lr", "lr": "optim.lr", "optim": "optim.optimizer", "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule", "warmup_steps": "optim.warmup", "warmup_ratio": "optim.warmup",
    "gradient_clipping": "optim.max_grad_norm", "max_steps": "train.steps", "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs", "output_dir": "train.output", "batch_size": "train.global_batch",
    "gradient_accumulation_steps": "train.global_batch", "per_device_train_batch_size": "train.micro_batch",
    "micro_batch_size": "train.micro_batch", "bf16": "train.precision", "fp16": "train.precision",
    "save_steps": "train.save_every", "eval_steps": "train.validate_every", "logging_steps": "train.log_every",
    "deepspeed": "train.zero", "lora_r": "adapter.rank", "lora_rank": "adapter.rank", "r": "adapter.rank",
    "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout", "target_modules": "adapter.targets",
    "lora_target": "adapter.targets", "lora_target_modules": "adapter.targets", "cutoff_len": "data.max_length",
    "model_max_length": "data.max_length", "sequence_len": "data.max_length", "max_seq_length": "data.max_length",
    "base_model": "model.vlm", "model_name_or_path": "model.vlm", "report_to": "track.trackers",
}  # fmt: skip
"""Keys of other trainers' configurations, with the key that stands for it here."""
