"""`mm-moslora doctor --model` and `--families`: whether a model would train right, by probes of the model itself.

Every probe gives one finding. A finding is bad where training would be wrong or impossible.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mm_moslora.config import ModelConfig, Recipe
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.models.assembly import Parts, load_parts, pretrained_parts
from mm_moslora.models.language_model import refuse_head_extras
from mm_moslora.models.model_sizes import sizes_of
from mm_moslora.models.pretrained_vlm import refuse_without_head
from mm_moslora.planning.doctor import Diagnosis, Status
from mm_moslora.planning.model_probes import (
    FAMILY_PROBES,
    PROBES,
    PROBES_WITHOUT_TEMPLATE,
    ModelFinding,
    Probe,
    adapter_of,
    memory,
)
from mm_moslora.planning.probe_conversations import BLIND, SIGHTED, stock_inputs
from mm_moslora.planning.small_families import default_config, sees, small_family_model, stand_in_processor
from mm_moslora.training.metrics.gpu_specs import parse_gpus
from mm_moslora.utils.errors import ConfigError, ModelError, reason_of


def diagnose_model(name: str, *, revision: str | None = None, small: bool = False, gpus: str = "") -> list[Diagnosis]:
    """Probe a model: what trains and how, labels, logits, rows, thinking, exports, memory.

    Args:
        name: folder or hub id.
        revision: of the hub.
        small: build the class small and random from its configuration, with the model's own processor or tokenizer,
            instead of reading weights.
        gpus: list of GPUs to count memory on, as in `plan`; empty: none.

    Raises:
        ModelError: no configuration, or the model does not load.
        ConfigError: `gpus` names no known card.
    """
    if gpus:
        parse_gpus(gpus)  # before anything is loaded
    config = sizes_of(name, revision, key="--model")
    if sees(config):
        model = ModelConfig(vlm=name, vlm_revision=revision)
    else:
        model = ModelConfig(language=name, language_revision=revision)
    parts = load_parts(model, weights="none" if small else "all")
    without = _without_template(parts)
    if small:
        if without:
            return [without]
        parts.model = _small_model(config, parts.template_processor or parts.tokenizer, name)
        if parts.processor is None:
            refuse_head_extras(parts.model, name)
    owner = parts.template_processor
    # A processor that writes prompts itself gives nothing to compare with.
    failed: Status = "warn" if owner and not (owner.chat_template or parts.tokenizer.chat_template) else "bad"
    recipe = Recipe(model=model, adapter=adapter_of(parts))
    findings: list[Diagnosis] = [without] if without else []
    findings += _findings(parts, PROBES_WITHOUT_TEMPLATE if without else PROBES, failed=failed)
    if gpus:
        findings += _findings(parts, (functools.partial(memory, recipe=recipe, gpus=gpus),), failed="warn")
    return findings


def _without_template(parts: Parts) -> ModelFinding | None:
    """The finding of a model whose conversations cannot be encoded."""
    try:
        ConversationEncoder.of(parts)
    except ConfigError as error:
        return ModelFinding(
            name="chat template", status="bad", detail=f"training refuses it: {error}",
            remedy="No conversation was probed. Put a chat_template.jinja into its folder.",
        )  # fmt: skip
    return None


def family_findings(kind: str) -> list[ModelFinding]:
    """Probe a small random model of a family, from its default configuration in the installed transformers.

    Args:
        kind: its `model_type`.

    Raises:
        Exception: whatever its classes raise where no small model or processor of it can be made.
    """
    config = default_config(kind)
    processor = stand_in_processor(config)
    model = _small_model(config, processor, kind)
    refuse_without_head(model, kind)
    parts = pretrained_parts(processor, model=model, base={"vlm": kind, "vlm_revision": None})
    return _findings(parts, FAMILY_PROBES, failed="warn")


def _findings(parts: Parts, probes: Sequence[Probe], *, failed: Status) -> list[ModelFinding]:
    findings: list[ModelFinding] = []
    for probe in probes:
        try:
            findings += probe(parts)
        except Exception as error:  # one probe must not hide the others
            name = getattr(probe, "__name__", "memory").strip("_").replace("_", " ")
            reason = f"{type(error).__name__}: {reason_of(error)}"
            findings.append(ModelFinding(
                name=name, status=failed, detail=f"the probe failed, so training may too: {reason}",
                brief=f"fails: {reason}", remedy="Train another model, or report this with the command.",
            ))  # fmt: skip
    return findings


def _small_model(config: PreTrainedConfig, owner: Any, name: str) -> PreTrainedModel:
    """A small random model that computes with what its processor or tokenizer makes of a conversation."""

    def accept(model: PreTrainedModel) -> None:
        with torch.no_grad():
            model(**inputs, use_cache=False)

    try:
        tokenizer = getattr(owner, "tokenizer", owner)
        inputs = stock_inputs(owner, SIGHTED if sees(config) else BLIND)
        words = max(len(tokenizer), int(getattr(config.get_text_config(), "pad_token_id", 0) or 0) + 1)
        return small_family_model(config, words=words, accept=accept)
    except Exception as error:  # whatever its classes raise
        raise ModelError(
            f"No small model of {name} can be built from its configuration: {reason_of(error)}."
        ) from error
