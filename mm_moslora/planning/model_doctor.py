"""`mm-moslora doctor --model` and `--families`: whether a model would train right, by probes of the model itself.

Every probe gives one finding. A finding is bad where training would be wrong or impossible.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mm_moslora.adapters.adapter_targets import AdaptableTargets, adaptable_targets
from mm_moslora.batch import Batch, Example
from mm_moslora.config import AdapterConfig, ModelConfig, Recipe
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.records import Turn
from mm_moslora.models.assembly import Parts, load_parts, pretrained_parts
from mm_moslora.models.batching.row_probe import rows_of
from mm_moslora.models.export.export_huggingface import why_not_stock
from mm_moslora.models.export.export_llava_checkpoint import why_not_original
from mm_moslora.models.export.gguf_model import why_not_gguf
from mm_moslora.models.language_model import refuse_head_extras
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers
from mm_moslora.models.model_sizes import sizes_of
from mm_moslora.models.pretrained_vlm import decoder_path
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vlm import (
    LossModule,
    VlmForConditionalGeneration,
    is_multimodal,
    needs_padding,
    projectors,
    supervised_hidden,
)
from mm_moslora.planning.doctor import Diagnosis, Status
from mm_moslora.planning.run_plan import DataSize, plan
from mm_moslora.planning.small_families import default_config, sees, small_family_model, stand_in_processor
from mm_moslora.training.engine.model_execution import kernels_of, prepare_execution
from mm_moslora.training.metrics.gpu_specs import parse_gpus
from mm_moslora.utils.errors import ConfigError, reason_of, suggestion

_EXACT = 1e-4
"""Largest difference of logits in fp32, as a share of the largest logit. Faults of positions or masks give 1e-2."""
_QUESTION, _ANSWER = "What is in the picture?", "A red square."
SIGHTED = (Turn(role="user", text=f"<image>\n{_QUESTION}"), Turn(role="assistant", text=_ANSWER))
"""The fixed conversation with a picture."""
BLIND = (
    Turn(role="user", text="Say one."), Turn(role="assistant", text="One."),
    Turn(role="user", text="And two?"), Turn(role="assistant", text="Two, as you wish."),
)  # fmt: skip
_WIDE, _TALL = (64, 48), (90, 120)
"""Sizes of two pictures: processors cut and join others otherwise."""
_ROUND = DataSize(samples=100_000, tokens=600)
"""Size of the data for which memory is counted: the setting that is fastest depends little on it."""


@dataclass(frozen=True, kw_only=True)
class ModelFinding(Diagnosis):
    """What a probe of a model found."""

    brief: str = ""
    """In a word or two, for the table of families; empty: the detail."""


Probe = Callable[[Parts], Iterator[ModelFinding]]


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
    if small:
        parts.model = _small_model(config, parts.template_processor or parts.tokenizer)
        if parts.processor is None:
            refuse_head_extras(parts.model, name)
    owner = parts.template_processor or parts.tokenizer
    failed: Status = (
        "bad" if owner.chat_template or parts.tokenizer.chat_template else "warn"
    )  # nothing to compare with
    recipe = Recipe(model=model, adapter=_adapter(parts))
    probes = (_parts_found, _experts, _rows, _labels, _thinking, _boxes, _exports, _logits, _step)
    findings = _findings(parts, probes, failed=failed)
    if gpus:
        findings += _findings(parts, (functools.partial(_memory, recipe=recipe, gpus=gpus),), failed="warn")
    return list(findings)


def family_table(kinds: Sequence[str] = ()) -> tuple[list[str], bool]:
    """Probe small random models of families, from the configurations of the installed transformers.

    Args:
        kinds: `model_type`s; none: all of `AutoModelForImageTextToText`.

    Returns:
        Lines of a Markdown table, and whether a family would train wrongly.

    Raises:
        ConfigError: transformers has no such family.
    """
    known = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    for kind in kinds:
        if kind not in known:
            raise ConfigError(
                f"transformers {transformers.__version__} has no image-text-to-text family {kind!r}."
                f"{suggestion(kind, known)} Expected the model_type of a configuration, such as qwen3_vl."
            )
    lines = [
        "| family | rows | conversations of a row | labels | logits | a step of MoSLoRA |",
        "|---|---|---|---|---|---|",
    ]
    wrong = False
    for kind in kinds or known:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = default_config(kind)
                processor = stand_in_processor(config)
                parts = pretrained_parts(
                    processor, model=_small_model(config, processor), base={"vlm": kind, "vlm_revision": None}
                )
                findings = _findings(parts, (_rows, _labels, _logits, _step), failed="warn")
        except Exception as error:  # whatever a family's classes raise is the finding
            lines.append(f"| `{kind}` | not tried: {_cell(f'{reason_of(error)}')} | | | | |")
            continue
        wrong |= any(item.status == "bad" for item in findings)
        lines.append(f"| `{kind}` | {' | '.join(_cell(item.brief or item.detail) for item in findings)} |")
        gc.collect()
    return lines, wrong


def _cell(text: str) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= 160 else f"{text[:157]}..."


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


def _small_model(config: PreTrainedConfig, owner: Any) -> PreTrainedModel:
    """A small random model that computes with what its processor or tokenizer makes of a conversation."""
    tokenizer, seeing = getattr(owner, "tokenizer", owner), sees(config)
    inputs = _stock_inputs(owner, SIGHTED if seeing else BLIND)
    words = max(len(tokenizer), int(getattr(config.get_text_config(), "pad_token_id", 0) or 0) + 1)

    def accept(model: PreTrainedModel) -> None:
        with torch.no_grad():
            model(**inputs)

    return small_family_model(config, words=words, accept=accept)


_BOXED = (1000, 750)
"""Width and height of a picture with boxes."""


@functools.cache
def _picture(size: tuple[int, int]) -> Image.Image:
    """Noise with a tint, so that no tile is plain."""
    noise = Image.effect_noise(size, 60).convert("RGB")
    return Image.blend(noise, Image.new("RGB", noise.size, (200, 30, 30)), 0.5)


def _stock_inputs(owner: Any, turns: Sequence[Turn], size: tuple[int, int] = _WIDE) -> dict[str, Any]:
    """What a processor or tokenizer itself makes of a conversation and a picture of this size."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        text = turn.text.replace("<image>\n", "")
        parts = [{"type": "image", "image": _picture(size)}] * turn.images + [{"type": "text", "text": text}]
        messages.append({"role": turn.role, "content": parts if hasattr(owner, "image_processor") else text})
    return dict(owner.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt"))


def _conversations(parts: Parts) -> list[tuple[Sequence[Turn], tuple[int, int]]]:
    """With sizes of their pictures; all with pictures where the processor takes no text alone."""
    if not is_multimodal(parts.model):
        return [(BLIND, _WIDE), (BLIND[2:], _WIDE)]
    seeing: list[tuple[Sequence[Turn], tuple[int, int]]] = [(SIGHTED, _WIDE), (SIGHTED, _TALL)]
    try:
        _stock_inputs(parts.template_processor or parts.tokenizer, BLIND)
    except Exception:  # whatever the processor raises
        return seeing
    return [(BLIND, _WIDE), *seeing]


def _example(parts: Parts, turns: Sequence[Turn], size: tuple[int, int] = _WIDE) -> Example:
    """A conversation as training encodes it."""
    processing = parts.image_processing
    pictures = processing.process([_picture(size)]) if processing and any(turn.images for turn in turns) else []
    encoded = ConversationEncoder.of(parts).encode(turns, pictures=[item.placeholders for item in pictures])
    return Example(id="probe", input_ids=encoded.input_ids, supervised=encoded.supervised, pictures=pictures)


def _parts_found(parts: Parts) -> Iterator[ModelFinding]:
    model: Any = parts.model
    tower = getattr(model.config, "vision_config", None)
    between = ", ".join(path.rpartition(".")[2] for path in projectors(model))
    seeing = f", tower {tower.model_type}, between them {between or 'nothing that a recipe can name'}" if tower else ""
    if tower and parts.image_processing is not None:
        whole = parts.image_processing.videos is not None
        seeing += "; a video stays a video" if whole else "; a video becomes pictures"
    detail = f"{type(model).__name__}: decoder {type(model.get_decoder()).__name__}{seeing}"
    yield ModelFinding(name="class and parts", detail=detail)


def _experts(parts: Parts) -> Iterator[ModelFinding]:
    """Only of models that have some."""
    found = _adaptable(parts)
    if found.parameters:
        yield ModelFinding(name="experts", detail=f"set adapter.target_parameters: {found.parameters}")
    for name, reason in found.left_out.items():
        yield ModelFinding(
            name="experts", status="warn", detail=f"{name} cannot carry an adapter: {reason}",
            remedy=f"Set adapter.targets: {found.targets}." if not found.parameters else "They stay as they are.",
        )  # fmt: skip


def _adaptable(parts: Parts) -> AdaptableTargets:
    model = parts.model
    return adaptable_targets(model, decoder_path(model) if is_multimodal(model) else "")


def _adapter(parts: Parts) -> AdapterConfig:
    found = _adaptable(parts)
    return AdapterConfig(targets=found.targets, target_parameters=found.parameters)


def _rows(parts: Parts) -> Iterator[ModelFinding]:
    model = parts.model
    if needs_padding(model):
        yield ModelFinding(
            name="rows", brief="padded", detail="padded: each conversation is a row of its own, on transformers' layers"
        )
    else:
        with torch.device("meta"):
            layers = use_lean_layers(type(model)(model.config))
        form = "lean" if layers else "transformers' own"
        yield ModelFinding(
            name="rows", brief=f"padding-free, {'lean' if layers else 'stock'} layers",
            detail=f"padding-free: conversations stand in one row without padding; decoder layers are {form}",
        )  # fmt: skip
    finding = rows_of(model, "auto")
    if finding.apart:
        yield ModelFinding(
            name="row probe", brief="apart", detail="changing one conversation of a row does not move the other"
        )
        return
    what = "may see each other, since the probe failed" if finding.moved is None else "see each other"
    reason = finding.fault if finding.moved is None else f"a change of one moves the other by {finding.moved:.1g}"
    padded = needs_padding(model)
    yield ModelFinding(
        name="row probe", status="ok" if padded else "warn",
        brief=f"no answer: {reason}" if finding.moved is None else f"mixed by {finding.moved:.1g}",
        detail=f"in one row, conversations {what} ({reason}){'; training never puts two into one' if padded else ''}",
        remedy="" if padded else "Set train.micro_batch to 1 and data.pack_tokens to 0; training refuses other values.",
    )  # fmt: skip


def _labels(parts: Parts) -> Iterator[ModelFinding]:
    faults, shown = [], ""
    for turns, size in _conversations(parts):
        example = _example(parts, turns, size)
        expected = _stock_inputs(parts.template_processor or parts.tokenizer, turns, size)["input_ids"][0].tolist()
        ids = example.input_ids.tolist()
        other = next((at for at, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), None)
        if other is not None or len(ids) > len(expected):
            faults.append(f"token {other if other is not None else len(expected)} is not that of the processor")
        runs = _runs(example)
        learned = [
            str(parts.tokenizer.decode(run, skip_special_tokens=True)).strip() for run, supervised in runs if supervised
        ]
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        if learned != answers:
            faults.append(f"{learned} is learned, expected {answers}")
        texts = [(_decoded(parts, run), supervised) for run, supervised in runs]
        shown = "".join(f"[[{text}]]" if supervised else text for text, supervised in texts)
    yield ModelFinding(
        name="labels", status="bad" if faults else "ok", brief=f"wrong: {faults[0]}" if faults else "right",
        detail=f"{'; '.join(faults) or 'answers alone are learned, marked by [[ ]]'}: {shown}",
        remedy="Do not train it; report this with the command." if faults else "",
    )  # fmt: skip


def _runs(example: Example) -> list[tuple[list[int], bool]]:
    """Stretches of ids that are all supervised, or not at all."""
    runs: list[tuple[list[int], bool]] = []
    for number, supervised in zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True):
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(number)
    return runs


def _decoded(parts: Parts, ids: Sequence[int]) -> str:
    """Text with a run of image tokens as one."""
    text, image = str(parts.tokenizer.decode(list(ids))), getattr(parts.processor, "image_token", None)
    while image and image * 2 in text:
        text = text.replace(image * 2, image)
    return text.replace("\n", "\\n")


def _thinking(parts: Parts) -> Iterator[ModelFinding]:
    encoder = ConversationEncoder.of(parts)
    thought = encoder.thought(("user", "assistant"))
    if not encoder.knows_thinking:
        detail = "the chat template knows no <think>; thinking in answers is learned as text"
    elif thought is None:
        detail = "the chat template drops <think> of answers, so thinking cannot be learned"
    else:
        switch = "two forms of prompts, to think or to answer at once" if encoder.has_switch else "one form of prompts"
        detail = f"the chat template writes <think>, with {switch}"
    yield ModelFinding(name="thinking", detail=detail)


def _boxes(parts: Parts) -> Iterator[ModelFinding]:
    processing = parts.image_processing
    if processing is None:
        return
    if processing.boxes is None:
        detail = "neither family nor vocabulary shows a form; records with boxes need model.boxes"
        yield ModelFinding(name="boxes", detail=detail)
        return
    frame = processing.frame(_BOXED)
    seen = f"{frame.width:g} x {frame.height:g}" if processing.boxes == "qwen2_5_vl" else "shares of it"
    detail = f"as {processing.boxes} writes them; of a picture of {_BOXED[0]} x {_BOXED[1]} pixels it counts {seen}"
    yield ModelFinding(name="boxes", detail=detail)


def _logits(parts: Parts) -> Iterator[ModelFinding]:
    """Compares, and leaves the model as training has it."""
    model, owner = parts.model, parts.template_processor or parts.tokenizer
    conversations = _conversations(parts)
    examples, expected = [_example(parts, *conversation) for conversation in conversations], []
    with torch.no_grad():
        for conversation, example in zip(conversations, examples, strict=True):
            logits = model(**_stock_inputs(owner, *conversation)).logits[0, : example.length - 1]
            expected.append(logits[example.supervised[1:]])
    recipe = _as_trained(parts)
    prepare_execution(model, recipe, kernels_of(recipe, "fp32"), "fp32")
    with torch.enable_grad():
        ours = model.get_output_embeddings()(supervised_hidden(model, Batch.from_examples(examples)))
    theirs = torch.cat(expected)
    difference = float((ours.detach() - theirs).abs().max() / theirs.abs().max())
    wrong = not difference <= _EXACT
    yield ModelFinding(
        name="logits", status="bad" if wrong else "ok", brief=f"differ by {difference:.0e}" if wrong else "equal",
        detail=f"logits of a batch as it trains differ from the model's own by at most {difference:.1e} of the largest",
        remedy=f"More than {_EXACT:.0e}: do not train it; report this with the command." if wrong else "",
    )  # fmt: skip


def _as_trained(parts: Parts) -> Recipe:
    """Put in adapters that change nothing yet; dropout is off."""
    seen = parts.is_pretrained_vlm
    model = ModelConfig(vlm="probe" if seen else None, language=None if seen else "probe", kernels="torch")
    recipe = Recipe(model=model, adapter=_adapter(parts))
    attach_adapters(parts, recipe.model, recipe.adapter)
    for module in parts.model.train().modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return recipe


def _step(parts: Parts) -> Iterator[ModelFinding]:
    if not any("lora_" in name for name, _ in parts.model.named_parameters()):  # the probe before says why
        yield ModelFinding(name="a training step", status="warn", detail="not tried: there is no adapter to train")
        return
    batch = Batch.from_examples([_example(parts, *conversation) for conversation in _conversations(parts)])
    loss: Tensor = LossModule(parts.model, None)(batch, bool(batch.images))
    loss.backward()
    trained = {name: weight for name, weight in parts.model.named_parameters() if weight.requires_grad}
    without = [name for name, weight in trained.items() if weight.grad is None or not weight.grad.isfinite().all()]
    size, mixers = sum(weight.numel() for weight in trained.values()), [n for n in trained if "lora_mixer" in n]
    experts = sum(trained[name].ndim > 2 for name in mixers)
    layers = f"{len(mixers) - experts} layers{f', {experts} stacks of experts' if experts else ''}"
    detail = f"MoSLoRA trains {size:,} values in {layers} of the language model"
    yield ModelFinding(
        name="a training step", status="bad" if without else "ok",
        brief=f"no gradient for {len(without)} of {len(trained)}" if without else layers,
        detail=f"{detail}, but {len(without)} of {len(trained)} factors get no finite gradient, such as {without[0]}"
        if without else f"{detail}, and every factor gets a finite gradient",
        remedy="Leave these layers out of adapter.targets." if without else "",
    )  # fmt: skip


def _exports(parts: Parts) -> Iterator[ModelFinding]:
    model = parts.model
    refused = {
        "llava": why_not_stock(model) if isinstance(model, VlmForConditionalGeneration) else None,
        "llava-original": why_not_original(model, str(parts.base.get("vision") or "")),
        "gguf": why_not_gguf(parts),
    }
    ways = ["hf", "lora", *(name for name, reason in refused.items() if reason is None)]
    reasons = "".join(f"; not {name}: {reason.split('. ')[0]}" for name, reason in refused.items() if reason)
    yield ModelFinding(name="exports", detail=f"export --to {', '.join(ways)}{reasons}")


def _memory(_: Parts, *, recipe: Recipe, gpus: str) -> Iterator[ModelFinding]:
    best = (planned := plan(recipe, parse_gpus(gpus), _ROUND)).best
    if best is None:
        peak = planned.own.peak / 2**30
        yield ModelFinding(
            name="memory", status="warn", detail=f"no setting fits {gpus}; the recipe's own takes {peak:.0f} GiB",
            remedy=planned.remedy or "Load it in 4 bits (model.quantisation: nf4).",
        )  # fmt: skip
        return
    detail = f"{best.peak / 2**30:.1f} GiB per GPU of {gpus}, by {best.label}"
    yield ModelFinding(name="memory", detail=detail)
