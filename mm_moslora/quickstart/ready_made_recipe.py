"""The recipe of `mm-moslora init` for a ready-made model: room for the user's records, within a card's memory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mm_moslora.config import DataConfig, ModelConfig, Recipe
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_examples import encode_record
from mm_moslora.data.record_faults import RecordError, Where
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.planning.run_plan import DataSize, plan
from mm_moslora.quickstart.own_data import OwnData
from mm_moslora.training.metrics.gpu_memory import GIB
from mm_moslora.training.metrics.gpu_specs import Gpus, card_of, parse_gpus
from mm_moslora.utils.errors import ConfigError

STEP_TOKENS = 8000
"""Target tokens per step."""
STEPS, MOST_EPOCHS = 100, 5
_MEASURED = 2000
"""Records whose tokens are counted, evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """Tokens of the records, pictures included."""

    mean: float
    longest: int


def ready_made_recipe(
    folder: Path, data: OwnData, *, vlm: str, sources: str, gpu: str | None = None
) -> tuple[str, int]:
    """The recipe for a folder or hub id that fits `gpu`, or this machine's card, if any; and its number of steps."""
    name = str(Path(vlm).resolve()) if Path(vlm).is_dir() else vlm
    card = _card(gpu)
    lengths = _lengths(load_parts(ModelConfig(vlm=name), weights="none"), data)
    batch = min(32, max(4, 2 ** round(math.log2(STEP_TOKENS / lengths.mean))))
    per_epoch = math.ceil(data.epoch / batch)
    steps = min(STEPS, MOST_EPOCHS * per_epoch)

    text = partial(_text, folder, data, name, sources, lengths, schedule=(batch, steps, per_epoch), card=card)
    if card is None:
        Recipe.from_yaml(recipe := text())
        return recipe, steps
    size = DataSize(samples=data.epoch, tokens=lengths.mean)
    refused: list[str] = []
    for quantisation in ("none", "nf4"):
        try:
            planned = plan(Recipe.from_yaml(text(quantisation=quantisation)), card, size)
        except ConfigError as error:  # of what this model cannot have
            refused.append(f"{quantisation}: {error}")
            continue
        if best := planned.best:
            recipe = text(quantisation=quantisation, micro_batch=best.micro_batch, again=best.checkpointing)
            return recipe, steps
        least = min(option.peak for option in planned.options)
        refused.append(f"{quantisation}: needs {least / GIB:.1f} GiB")
    raise ConfigError(
        f"{vlm} does not fit {card.name} with {card.memory / GIB:.1f} GiB ({'; '.join(refused)}). Name a smaller "
        "model, or a larger card with --gpu."
    )


def _card(gpu: str | None) -> Gpus | None:
    """The named card, or this machine's first one; None without any."""
    if gpu is not None:
        card = parse_gpus(gpu)
        if card.count > 1:
            raise ConfigError(f"--gpu is {gpu!r}, expected one card; `mm-moslora plan` looks at several.")
        return card
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return card_of(properties.name, float(properties.total_memory))


def _lengths(parts: Parts, data: OwnData) -> _Lengths:
    """Count the tokens of the records as training will; those that it cannot use are left out."""
    encoder, processing = ConversationEncoder.of(parts), parts.image_processing
    config = DataConfig(max_length=2**31)
    videos = None if processing is None else processing.videos
    rules = PictureRules(folder=data.images, follow_links=data.follow_links, videos=videos)
    records: Sequence[Any] = [*data.train, *(record for part in data.repeated.values() for record in part)]
    lengths: list[int] = []
    for number in range(0, len(records), math.ceil(len(records) / _MEASURED)):
        try:
            record = parse_record(records[number], Where(file=data.images, line=None, row=number), rules)
            lengths.append(len(encode_record(record, encoder, processing, config=config).input_ids))
        except RecordError:
            continue
    if not lengths:
        raise ConfigError("No record can be prepared for this model. Run `mm-moslora data check` on its own recipe.")
    return _Lengths(mean=sum(lengths) / len(lengths), longest=max(lengths))


def _text(
    folder: Path,
    data: OwnData,
    vlm: str,
    sources: str,
    lengths: _Lengths,
    *,
    schedule: tuple[int, int, int],
    card: Gpus | None,
    quantisation: str = "none",
    micro_batch: int | None = None,
    again: bool | int = False,
) -> str:
    batch, steps, per_epoch = schedule
    fits = f"fits {card.name}, by `mm-moslora plan`" if card else "no GPU here; lower it where memory ends"
    bits = "  quantisation: nf4   # 4 bits, since it does not fit the card otherwise\n" if quantisation == "nf4" else ""
    return f"""\
# Written by `mm-moslora init` from {data.source.encode("unicode_escape").decode()}. Change what you like.
name: {_quoted(folder.name)}
model:
  # It keeps its encoder, its chat template and its way with pictures; adapters train in its language model.
  vlm: {_quoted(vlm)}
{bits}adapter: {{rank: 64, alpha: 128}}
data:
  train:
{sources}
  # A conversation takes {lengths.mean:,.0f} tokens on average, pictures included, and {lengths.longest:,} at most.
  max_length: {max(128, 64 * math.ceil(lengths.longest * 1.05 / 64))}
optim: {{lr: 1.0e-4, warmup: 0.05}}
train:
  output: {_quoted(str(folder / "run"))}
  # {batch} conversations a step; {per_epoch} steps are an epoch, so these see the data {steps / per_epoch:.2g} times.
  steps: {steps}
  global_batch: {batch}
  micro_batch: {micro_batch or batch}   # {fits}
  gradient_checkpointing: {json.dumps(again)}
  save_every: 50
track: {{trackers: []}}
"""


def _quoted(value: str) -> str:
    """A value as YAML, of which JSON is a subset."""
    return json.dumps(value, ensure_ascii=False)
