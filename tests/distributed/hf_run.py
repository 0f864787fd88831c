"""A run of Hugging Face's Trainer with DeepSpeed on our model, data and collator, in every rank."""

from __future__ import annotations

import json
from pathlib import Path

from mm_moslora.config import load_recipe
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.batching.padded_batch import PaddedCollator
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.training.engine.deepspeed_settings import prepare_deepspeed
from mm_moslora.utils.distributed import seed_everything


def train(recipe_path: str, steps: str, stage: str) -> int:
    import torch
    from transformers import Trainer, TrainingArguments

    from mm_moslora.utils import distributed

    recipe = load_recipe(recipe_path)
    distributed.join()
    prepare_deepspeed("zero2")
    seed_everything(recipe.train.seed)
    assembly = load_parts(recipe.model, dtype=torch.float32)
    attach_adapters(assembly, recipe.model, recipe.adapter, seed=recipe.train.seed)
    output = Path(recipe.train.output)
    output.mkdir(parents=True, exist_ok=True)
    encoder = ConversationEncoder.of(assembly)
    data = TrainingSet(recipe.data.train, encoder, assembly.image_processing, config=recipe.data)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    nothing_whole = {"stage3_param_persistence_threshold": 0} if stage == "3" else {}
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=int(steps), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=recipe.optim.lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False,
        optim="adamw_torch", disable_tqdm=True,
        deepspeed={
            "zero_optimization": {"stage": int(stage), **nothing_whole}, "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )  # fmt: skip
    collate = PaddedCollator(model=assembly.model)
    trainer = InOrder(model=assembly.model.train(), args=arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    if distributed.is_main():
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (output / "losses.json").write_text(json.dumps(logged))
    return 0
