"""Whether the conversations of one row see each other in a decoder: a probe of a small random model of its class.

The first conversation of a row of two is changed; the second one must not move. Recurrences and convolutions that run
on, and masks without the positions that tell conversations apart, move it.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mm_moslora.batch import Batch, Example
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.models.memory_efficient.decoder_layers import packed_row_hidden
from mm_moslora.utils.errors import reason_of

logger = logging.getLogger(__name__)

_WORDS, _LENGTHS = 97, (21, 17)
_MOST = 300_000_000
"""Parameters of the largest model that is made: 1.2 GB in fp32."""
_ROUNDING = 2e-6
"""Share of the largest hidden value. Experts that get other tokens beside them round otherwise, by 1e-7."""
_LAYERS = 8
"""Most layers, where no list in the configuration shows when all kinds have occurred."""
_FEWER = {
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "num_experts_per_token": 2, "moe_k": 2, "n_group": 1, "num_expert_group": 1, "topk_group": 1,
    "num_nextn_predict_layers": 0, "vocab_size_per_layer_input": _WORDS,
}  # fmt: skip
_NARROW = {"hidden_size": 64, "d_model": 64, "n_embd": 64, "word_embed_proj_dim": 64, "lru_width": 64}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1, "n_head": 4, "n_heads": 4}
CUTS = (_FEWER | _NARROW | _HEADS, _FEWER | _NARROW, _FEWER)
"""Most values of fields, tried in this order: narrow, then with its own widths."""
_FINDINGS: dict[str, RowFinding] = {}


@dataclass(frozen=True, kw_only=True)
class RowFinding:
    """What the probe found for one class of decoders."""

    moved: float | None
    """How far the second conversation moved, as a share of its largest hidden value; None: the probe failed."""
    fault: str = ""
    """Why the probe failed."""

    @property
    def apart(self) -> bool:
        """Whether the conversations of a row are surely apart."""
        return self.moved is not None and self.moved <= _ROUNDING


def rows_of(model: PreTrainedModel, attention: str) -> RowFinding:
    """Probe the class of a model's decoder; once per class, layer pattern and attention in a process.

    Args:
        model: causal language model or VLM, on any device, the meta device too; its weights are not read.
        attention: the recipe's `model.attention`.
    """
    decoder = model.get_decoder()
    kinds = _layer_kinds(getattr(decoder, "config", None))
    key = f"{type(decoder).__module__}.{type(decoder).__qualname__} {attention} {kinds}"
    if key not in _FINDINGS:
        begun = time.monotonic()
        _FINDINGS[key] = _probed(decoder, attention)
        logger.debug("%s: the rows were probed in %.1f s.", type(decoder).__name__, time.monotonic() - begun)
    return _FINDINGS[key]


def _probed(decoder: PreTrainedModel, attention: str) -> RowFinding:
    fault = ""
    for names in CUTS:
        try:
            config = small_decoder(decoder.config, names)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
                torch.manual_seed(0)
                made = _made(type(decoder), config)
                set_attention(made, choose_attention(made, attention, device=torch.device("cpu")).name)
                return RowFinding(moved=_moved(made))
        except Exception as error:  # configurations fit together in ways that only their classes know
            fault = fault or f"{type(error).__name__}: {reason_of(error)}"
    return RowFinding(moved=None, fault=fault)


def _made(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    build: Any = kind._from_config
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(copy.deepcopy(config)).parameters())
    if size > _MOST:
        raise ValueError(f"its smallest model has {size} parameters")
    made: PreTrainedModel = build(config, dtype=torch.float32).eval()
    return made


def _moved(model: PreTrainedModel) -> float:
    first, second = (torch.randint(2, _WORDS, (length,)) for length in _LENGTHS)
    before, after = (_second_of(model, row, second) for row in (first, first.flip(0)))
    return float((before - after).abs().max() / before.abs().max())


def _second_of(model: PreTrainedModel, *rows: Tensor) -> Tensor:
    """The hidden states of the last conversation of a row."""
    examples = [
        Example(id=str(number), input_ids=ids, supervised=torch.ones(len(ids)).bool())
        for number, ids in enumerate(rows)
    ]
    batch = Batch.from_examples(examples)
    hidden = packed_row_hidden(model, batch, input_ids=batch.input_ids[None], position_ids=batch.position_ids[None])
    return hidden[len(rows[0]) - 1 :]


def small_decoder(original: PreTrainedConfig, names: Mapping[str, int]) -> PreTrainedConfig:
    """A copy of a decoder's configuration in which these names have at most these values.

    Args:
        original: not changed.
        names: one of `CUTS`.
    """
    config = copy.deepcopy(original)
    for name in ("quantization_config", "pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0 if name.endswith("id") else None)  # some classes refuse to have no token
    layers = _layers(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == _depth(original):
            setattr(config, name, type(value)(value[:layers]))
        elif isinstance(value, int) and not isinstance(value, bool):
            least = _WORDS if name == "vocab_size" else 64 if "intermediate_size" in name else names.get(name)
            if least is not None and value > least:
                setattr(config, name, least)
    config.num_hidden_layers = layers
    if "hidden_size" in names:
        _fit(config)
    return config


def _fit(config: Any) -> None:
    """Make the heads of a narrow state-space layer fill its width."""
    for heads, width, expand in (
        ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
        ("num_heads", "head_dim", "expand"),
    ):
        if all(isinstance(getattr(config, name, None), int) for name in (heads, width, expand)):
            setattr(config, heads, 4)
            setattr(config, width, getattr(config, expand) * 64 // 4)


def _depth(config: Any) -> int:
    return int(config.num_hidden_layers)


def _layer_kinds(config: Any) -> list[str]:
    """The kind of every layer, where a configuration lists them."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return [str(kind) for kind in kinds]


def _layers(config: Any) -> int:
    """As few layers as hold every kind."""
    kinds = _layer_kinds(config)
    if not kinds:
        return min(_depth(config), _LAYERS)
    return max(min(2, len(kinds)), *(kinds.index(kind) + 1 for kind in set(kinds)))
