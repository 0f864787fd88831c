"""`mm-moslora doctor --model`: whether a model would train right, by probes of the model itself.

Every probe gives findings. A finding is bad where training would be wrong or impossible.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mm_moslora.config import ModelConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.models.model_sizes import sizes_of
from mm_moslora.planning.doctor import Diagnosis, Status
from mm_moslora.planning.model_probes import PROBES, PROBES_WITHOUT_TEMPLATE, Probe
from mm_moslora.utils.errors import ConfigError, reason_of


def diagnose_model(name: str, *, revision: str | None = None) -> list[Diagnosis]:
    """Probe a model: what trains, rows, labels, logits."""
    config = sizes_of(name, revision, key="--model")
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or hasattr(config, "vision_config"):
        model = ModelConfig(vlm=name, vlm_revision=revision)
    else:
        model = ModelConfig(language=name, language_revision=revision)
    return probe_model(load_parts(model))


def probe_model(parts: Parts) -> list[Diagnosis]:
    """The findings of all probes that the model allows; it gets adapters, and the kernels of training."""
    try:
        ConversationEncoder.of(parts)
    except ConfigError as error:
        refused = Diagnosis(
            name="chat template", status="bad", detail=f"training refuses it: {error}",
            remedy="No conversation was probed. Put a chat_template.jinja into its folder.",
        )  # fmt: skip
        return [refused, *_findings(parts, PROBES_WITHOUT_TEMPLATE, failed="bad")]
    owner = parts.template_processor
    # A processor that writes prompts itself gives nothing to compare with.
    silent = owner is not None and not (owner.chat_template or parts.tokenizer.chat_template)
    return _findings(parts, PROBES, failed="warn" if silent else "bad")


def _findings(parts: Parts, probes: Sequence[Probe], *, failed: Status) -> list[Diagnosis]:
    findings: list[Diagnosis] = []
    for probe in probes:
        try:
            findings += probe(parts)
        except Exception as error:  # one probe must not hide the others
            reason = f"{type(error).__name__}: {reason_of(error)}"
            findings.append(Diagnosis(
                name=probe.__name__.strip("_").replace("_", " "), status=failed,
                detail=f"the probe failed, so training may too: {reason}",
                remedy="Train another model, or report this with the command.",
            ))  # fmt: skip
    return findings
