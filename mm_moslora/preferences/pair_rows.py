"""Pairs in rows without padding (`data.pack_tokens`): a prompt with its pictures stands once, before both answers.

Shapes: ``P`` pairs of a micro-batch, ``S`` tokens of the row, ``K`` tokens of all answers, ``A`` those of the longest,
``D`` width.

A row holds the conversations with the chosen answers, each followed by its rejected answer, which attends to the same
prompt and not to the chosen answer. TRL's loss gets the log-probabilities as a table with all chosen answers first.
"""

from __future__ import annotations

import functools
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mm_moslora.batch import Batch, Example
from mm_moslora.data.epoch_order import pack, plan_rows
from mm_moslora.data.preference_set import PreferenceSet, shared_prompt
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.batching.row_probe import rows_of
from mm_moslora.models.vision.feature_cache import StepFeatureCache
from mm_moslora.models.vlm import needs_padding, supervised_hidden
from mm_moslora.preferences.class_logits import logits_of_class
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError

logger = logging.getLogger(__name__)
ROW = "row"
"""Keyword argument of a model for the `Batch` of a micro-batch; see `patch_packed_forward`."""
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What TRL's DPOTrainer reads of its head."""


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """How the pairs of a run are laid into rows."""

    tokens: int
    """Most tokens of a row."""
    shares: bool
    """Whether the answers of a pair share their prompt; else it stands before each of them."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: int) -> PairRows:
        """Find what a model takes, and set its attention; ConfigError where it takes padded rows."""
        kind = model.get_decoder().config.model_type
        remedy = "Set data.pack_tokens to 0: each answer then is a padded row of its own."
        if needs_padding(model):
            raise ConfigError(f"data.pack_tokens is {tokens}, and {type(model).__name__} takes padded rows. {remedy}")
        found = rows_of(model, "auto")
        if not found.apart:
            why = "see each other" if found.moved is not None else f"may see each other; a probe failed ({found.fault})"
            raise ConfigError(
                f"data.pack_tokens is {tokens}, and in a {kind} model the conversations of one row {why}. {remedy}"
            )
        shares = rows_of(model, SEGMENTS, shared=True).apart
        if distributed.is_main():
            place = "once, before both answers" if shares else "before each of its answers"
            logger.info("Pairs stand in rows of up to %d tokens, and a prompt %s.", tokens, place)
        wanted = SEGMENTS if shares else "auto"
        set_attention(model, choose_attention(model, wanted, device=distributed.device()).name)
        return cls(tokens=tokens, shares=shares)

    def epoch(self, records: PreferenceSet, *, seed: int, epoch: int) -> list[list[int]]:
        """The rows of an epoch in drawn order, as numbers of items."""
        numbers = list(range(len(records.usable)))
        lengths = [sum(both) for both in zip(records.lengths[::2], records.lengths[1::2], strict=True)]
        if self.shares:
            lengths = [both - prompt for both, prompt in zip(lengths, records.prompts, strict=True)]
        random.Random(f"{seed} {epoch}").shuffle(numbers)
        rows = pack(numbers, lengths, tokens=self.tokens)
        (drawn,) = plan_rows(rows, seed=seed, epoch=epoch, global_batch=len(rows))
        return drawn

    def drawn(self, records: PreferenceSet, *, seed: int, rows: int) -> list[list[int]]:
        """The rows of a whole run."""
        epochs: Iterator[list[list[int]]] = (self.epoch(records, seed=seed, epoch=epoch) for epoch in itertools.count())
        return list(itertools.islice(itertools.chain.from_iterable(epochs), rows))

    def collate(self, pairs: Sequence[tuple[Example, Example]]) -> dict[str, Any]:
        """A micro-batch for DPOTrainer: the answers in a table behind an empty column, and the row."""
        shared = [tokens for pair in pairs for tokens in (0, self.shares * _prompt_of(pair))]
        row = Batch.from_examples([example for pair in pairs for example in pair], shared=shared)
        answers = [pair[side].input_ids[1:][pair[side].supervised[1:]] for side in (0, 1) for pair in pairs]
        ids = pad_sequence([torch.cat([answer.new_zeros(1), answer]) for answer in answers], batch_first=True)
        lengths = torch.tensor([len(answer) for answer in answers])[:, None]
        columns = torch.arange(ids.shape[1])[None]
        mask = (columns > 0) & (columns <= lengths)
        # TRL counts tokens by the mask alone.
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(row.input_ids)[None], "completion_mask": mask.long(),
            ROW: row,
        }  # fmt: skip


def _prompt_of(pair: tuple[Example, Example]) -> int:
    return shared_prompt(*((example.input_ids, example.supervised) for example in pair))


def patch_packed_forward(model: PreTrainedModel) -> StepFeatureCache:
    """Let a base model with TRL's head take `ROW`, and give a table ``[2 P, A]``; returns the features of pictures."""
    own, head = model.forward, _RowHead(model)

    @functools.wraps(own)
    def forward(*args: Any, **inputs: Any) -> Any:
        row: Batch | None = inputs.pop(ROW, None)
        return own(*args, **inputs) if row is None else head.table(row, inputs["labels"][:, 1:] >= 0)

    model.forward = forward  # type: ignore[method-assign]  # as TRL's head does
    return head.pictures


def gather_uneven(gather: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Gather the values ``[P]`` of all ranks, whose rows hold different numbers of pairs; other shapes as they are."""
    if values.ndim != 1:
        return gather(values)
    counts = gather(torch.tensor([len(values)], device=values.device)).tolist()
    parts = gather(nn.functional.pad(values, (0, max(counts) - len(values)))).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _RowHead(nn.Module):
    """What TRL's head takes for a model: its backbone gives the hidden states before the tokens of the answers."""

    def __init__(self, model: PreTrainedModel) -> None:
        from trl.trainer.utils import add_fused_lm_head

        super().__init__()
        self.whole, self.config = [model], model.config  # in a list: no submodule
        self.pictures = StepFeatureCache()
        with logits_of_class(model):
            add_fused_lm_head(cast(PreTrainedModel, self), outputs=FIELDS)

    def forward(self) -> None:
        """TRL's head replaces it."""

    def get_output_embeddings(self) -> nn.Module:
        """The head of the model."""
        return self.whole[0].get_output_embeddings()

    def base_model(self, *, row: Batch, **_: Any) -> BaseModelOutput:
        """The hidden states, ``[1, K, D]``."""
        return BaseModelOutput(last_hidden_state=supervised_hidden(self.whole[0], row, cache=self.pictures)[None])

    def table(self, row: Batch, mask: Tensor) -> Any:
        """The output of TRL's head for the chosen, then the rejected answers; `mask` ``[2 P, A]`` marks tokens."""
        output = self(row=row, shift_labels=row.targets[None], fused_lm_head=True, output_router_logits=False)
        by_pair = mask.unflatten(0, (2, -1)).transpose(0, 1)  # the order of the row
        for name in FIELDS:
            values = output[name]
            filled = values.new_zeros(by_pair.shape).masked_scatter(by_pair, values)
            output[name] = filled.transpose(0, 1).flatten(0, 1)
        return output
