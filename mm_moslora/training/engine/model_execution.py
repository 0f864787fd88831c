"""How the model of a run computes: its attention, alone or over ranks, its kernels, and what its layers keep."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mm_moslora.config import Recipe
from mm_moslora.kernels.attention.attention_choice import AttentionChoice, choose_attention, set_attention
from mm_moslora.kernels.attention.gpu_attention import FLASH
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.memory_efficient.kernel_selection import (
    Kernels,
    attention_words,
    choose_kernels,
    compile_layers,
    use_kernels,
    use_lean_layers,
    use_loss_head,
)
from mm_moslora.models.memory_efficient.row_share import RowShare
from mm_moslora.models.precision import dtype_of
from mm_moslora.models.pretrained_vlm import tower_path
from mm_moslora.models.trainable_parts import checkpoint_layers, offload_inputs
from mm_moslora.models.vlm import has_own_forward, is_multimodal, needs_padding
from mm_moslora.training.engine.deepspeed_settings import prepare_deepspeed
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError

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


ULYSSES = "mm_moslora_ulysses"
"""Name under which the attention is registered with transformers."""


def row_share(ranks: int) -> RowShare:
    """The part of every row that this rank computes; groups are of `ranks` consecutive ones."""
    return RowShare(index=distributed.rank() % ranks, of=ranks)


def refuse_row_shares(model: PreTrainedModel, ranks: int, *, attention: str) -> None:
    """Refuse a model, on any device, whose rows several ranks cannot compute together."""
    if ranks == 1:
        return
    if has_own_forward(model):
        raise ConfigError(
            f"train.sequence_parallel is {ranks}, but {type(model).__name__} places pictures and positions by itself "
            "and takes whole rows. Set it to 1, or assemble a model with model.language and model.vision."
        )
    if attention not in (SEGMENTS, *FLASH):
        raise ConfigError(
            f"train.sequence_parallel is {ranks}, but {type(model.get_decoder()).__name__} runs on the attention "
            f"{attention!r}, which would see one rank's tokens only. Set it to 1, or set "
            "model.attention to auto with a model that takes this project's attention."
        )
    heads, key_heads = _heads(model)
    if heads % ranks or (key_heads % ranks and ranks % key_heads):
        raise ConfigError(
            f"train.sequence_parallel is {ranks}, but {type(model.get_decoder()).__name__} has {heads} attention heads "
            f"and {key_heads} key heads. Choose a divisor of the heads that divides the key heads or is a multiple of "
            "them."
        )


def share_rows(model: PreTrainedModel, ranks: int) -> None:
    """Have the attention of a decoder see the tokens of all ranks of a group; every rank calls it."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    config: Any = model.get_decoder().config
    heads, key_heads = _heads(model)
    groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, distributed.world_size(), ranks)]
    attention = UlyssesSPAttentionHF(
        attn=ALL_ATTENTION_FUNCTIONS[config._attn_implementation],
        batch_size=1,
        attn_head_count=heads,
        attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        kv_head_count=key_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=groups[distributed.rank() // ranks],
        seq_length_is_variable=True,
    )
    AttentionInterface.register(ULYSSES, attention)
    set_attention(model, ULYSSES)


def _heads(model: PreTrainedModel) -> tuple[int, int]:
    """Attention heads and key heads of a decoder."""
    config: Any = model.get_decoder().config
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)
