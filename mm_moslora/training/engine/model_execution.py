"""How the model of a run computes: its attention, its kernels, and what its layers keep for the backward pass."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import cast

import torch
from transformers import PreTrainedModel

from mm_moslora.config import Recipe
from mm_moslora.kernels.attention.attention_choice import AttentionChoice, choose_attention, set_attention
from mm_moslora.models.memory_efficient.kernel_selection import (
    Kernels,
    attention_words,
    choose_kernels,
    compile_layers,
    use_kernels,
    use_lean_layers,
    use_loss_head,
)
from mm_moslora.models.precision import dtype_of
from mm_moslora.models.pretrained_vlm import tower_path
from mm_moslora.models.trainable_parts import checkpoint_layers, offload_inputs
from mm_moslora.models.vlm import is_multimodal, needs_padding
from mm_moslora.training.engine.deepspeed_settings import prepare_deepspeed
from mm_moslora.training.engine.ulysses import share_rows
from mm_moslora.utils import distributed

logger = logging.getLogger(__name__)


def kernels_of(recipe: Recipe, precision: str) -> Kernels:
    """The kernels that the recipe names, before a model is loaded; see `choose_kernels`."""
    return choose_kernels(
        recipe.model.kernels, distributed.device(), lean=_runs_lean(recipe), dtype=dtype_of(precision)
    )


def prepare_execution(model: PreTrainedModel, recipe: Recipe, kernels: Kernels, precision: str) -> None:
    """Set attention, kernels and memory savings of a model with its adapters, not yet in an engine."""
    _choose_attention(model, recipe, precision)
    _save_memory(model, recipe)
    if (note := use_kernels(model, kernels, lean=_runs_lean(recipe))) and distributed.is_main():
        logger.info("%s", note)


def _runs_lean(recipe: Recipe) -> bool:
    return recipe.model.lean_layers and recipe.train.compile is None


def _choose_attention(model: PreTrainedModel, recipe: Recipe, precision: str) -> None:
    """Set the attention kernel, and the part of every row that this rank computes; log what runs."""
    attention = AttentionChoice(name="")
    if not needs_padding(model):
        with distributed.failing_together("Choosing the attention"):
            attention = choose_attention(model, recipe.model.attention, device=distributed.device())
        set_attention(model, attention.name)
    log_what_runs(replace(attention, words=attention.words or attention_words(model)), precision)
    if recipe.train.sequence_parallel > 1:
        prepare_deepspeed(recipe.train.zero)
        share_rows(model, recipe.train.sequence_parallel)


def _save_memory(model: PreTrainedModel, recipe: Recipe) -> None:
    """The head over supervised positions only; lean, recomputed, offloaded and compiled layers, as the recipe says."""
    use_loss_head(model)
    if recipe.model.lean_layers:
        use_lean_layers(model)
    if again := recipe.train.gradient_checkpointing:
        checkpoint_layers(model.get_decoder(), None if again is True else again)
    if recipe.train.vision_gradient_checkpointing and is_multimodal(model):
        checkpoint_layers(cast(PreTrainedModel, model.get_submodule(tower_path(model))))
    if recipe.train.activation_offload:
        offload_inputs(model)
    if recipe.train.compile is not None:
        compile_layers(model, recipe.train.compile)


def log_what_runs(attention: AttentionChoice, precision: str) -> None:
    """Log the attention kernel, kernels that do not run, and a warning where ranks differ in GPU or kernel."""
    gpu, faults = distributed.gpu_in_words(), attention.faults
    if gpu and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        faults = (*faults, f"{gpu} emulates bf16, which is slow; set train.precision to fp16 or fp32")
    everywhere = distributed.gather_objects(([(gpu, attention.words)] if gpu else [], faults))
    if not distributed.is_main():
        return
    for fault in dict.fromkeys(fault for _, faults in everywhere for fault in faults):
        logger.warning("%s.", fault.rstrip("."))
    if attention.words:
        logger.info("Attention runs on %s.", attention.words)
    kinds: dict[str, list[int]] = {}
    for index, (on_rank, _) in enumerate(everywhere):
        for gpu, words in on_rank:
            kinds.setdefault(f"{gpu} (attention: {words})" if words else gpu, []).append(index)
    if len(kinds) > 1:
        listed = "; ".join(f"ranks {', '.join(map(str, ranks))}: {kind}" for kind, ranks in kinds.items())
        logger.warning(
            "The ranks run on different GPUs or kernels: %s. Every step takes as long as the slowest rank, and "
            "micro-batches must fit the smallest GPU.",
            listed,
        )
