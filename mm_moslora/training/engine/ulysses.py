"""Sequence parallelism by DeepSpeed's Ulysses (2309.14509): the ranks of a group compute one packed row together."""

# Around the attention a rank gives the others their tokens and gets all tokens for its share of the heads, so the
# attention sees whole segments. To the rest of the engine each is a data-parallel rank with the loss of its own tokens.

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mm_moslora.kernels.attention.attention_choice import set_attention
from mm_moslora.kernels.attention.gpu_attention import FLASH
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.memory_efficient.row_share import RowShare
from mm_moslora.models.vlm import has_own_forward
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError

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
