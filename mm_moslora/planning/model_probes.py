"""`mm-moslora doctor --model`: whether a model would train right, by probes of the model itself.

A finding is bad where training would be wrong or impossible. The probes' conversations are fixed: as training encodes
them, and as the model's own processor does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mm_moslora.adapters.adapter_targets import ALL_LINEAR, linear_targets
from mm_moslora.batch import Batch, Example, ProcessedImage
from mm_moslora.config import AdapterConfig, ModelConfig, Recipe
from mm_moslora.data.chat.chat_template import Template
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.models.batching.row_probe import rows_of
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers
from mm_moslora.models.memory_efficient.loss_head import form_of
from mm_moslora.models.model_sizes import sizes_of
from mm_moslora.models.pretrained_vlm import decoder_path
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vision.patch_embedding import patch_embedding_words
from mm_moslora.models.vlm import LossModule, is_multimodal, needs_padding, projectors, supervised_hidden
from mm_moslora.planning.doctor import Diagnosis, Status, findings_of
from mm_moslora.training.engine.model_execution import kernels_of, prepare_execution
from mm_moslora.utils.errors import AdapterError, ConfigError

_QUESTION, _ANSWER = "What is in the picture?", "A red square."
SIGHTED = (Turn(role="user", text=f"<image>\n{_QUESTION}"), Turn(role="assistant", text=_ANSWER))
"""The fixed conversation with a picture."""
BLIND = (
    Turn(role="user", text="Say one."), Turn(role="assistant", text="One."),
    Turn(role="user", text="And two?"), Turn(role="assistant", text="Two, as you wish."),
)  # fmt: skip
WIDE, _TALL = (64, 48), (90, 120)
"""Sizes of two pictures: processors cut and join others otherwise."""


@cache
def _picture(size: tuple[int, int]) -> Image.Image:
    """Noise with a tint, so that no tile is plain."""
    noise = Image.effect_noise(size, 60).convert("RGB")
    return Image.blend(noise, Image.new("RGB", noise.size, (200, 30, 30)), 0.5)


def stock_inputs(owner: Any, turns: Sequence[Turn], size: tuple[int, int] = WIDE) -> dict[str, Any]:
    """What a processor or tokenizer itself makes of a conversation; of one that ends with a question, the prompt."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        text = turn.text.replace("<image>\n", "")
        parts = [{"type": "image", "image": _picture(size)}] * turn.images + [{"type": "text", "text": text}]
        messages.append({"role": turn.role, "content": parts if hasattr(owner, "image_processor") else text})
    more: dict[str, Any] = {"add_generation_prompt": turns[-1].role == "user"}
    if not hasattr(owner, "image_processor") and owner.chat_template is None:  # it gets the plain one
        more["chat_template"] = Template(owner).source
    return dict(owner.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **more))


def conversations_of(parts: Parts) -> list[tuple[Sequence[Turn], tuple[int, int]]]:
    """With sizes of their pictures; all with pictures where the processor takes no text alone."""
    if not is_multimodal(parts.model):
        return [(BLIND, WIDE), (BLIND[2:], WIDE)]
    seeing: list[tuple[Sequence[Turn], tuple[int, int]]] = [(SIGHTED, WIDE), (SIGHTED, _TALL)]
    try:
        stock_inputs(parts.template_processor or parts.tokenizer, BLIND)
    except Exception:  # whatever the processor raises
        return seeing
    return [(BLIND, WIDE), *seeing]


def example_of(parts: Parts, turns: Sequence[Turn], size: tuple[int, int] = WIDE) -> Example:
    """A conversation as training encodes it."""
    pictures = pictures_of(parts, turns, size)
    encoded = ConversationEncoder.of(parts).encode(turns, pictures=[item.placeholders for item in pictures])
    return Example(id="probe", input_ids=encoded.input_ids, supervised=encoded.supervised, pictures=pictures)


def pictures_of(parts: Parts, turns: Sequence[Turn], size: tuple[int, int]) -> Sequence[ProcessedImage]:
    """The noise of a conversation's pictures, as training prepares it."""
    processing = parts.image_processing
    return processing.process([_picture(size)]) if processing and any(turn.images for turn in turns) else []


def differs_at(parts: Parts, example: Example, expected: Sequence[int]) -> int | None:
    """The first token that is not that of the processor, but for ends of answers that its template does not write."""
    ids, end = example.input_ids.tolist(), parts.tokenizer.eos_token_id
    written = [n for n, learned in zip(ids, example.supervised.tolist(), strict=True) if not learned or n != end]
    places = [first_difference(own, expected) for own in (ids, written)]
    return None if None in places else places[0]


def first_difference(ids: Sequence[int], expected: Sequence[int]) -> int | None:
    """None where the ids begin the expected ones."""
    different = (at for at, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1])
    return next(different, len(expected) if len(ids) > len(expected) else None)


def runs_of(example: Example) -> list[tuple[list[int], bool]]:
    """Stretches of ids that are all supervised, or not at all."""
    runs: list[tuple[list[int], bool]] = []
    for number, supervised in zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True):
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(number)
    return runs


def decoded(parts: Parts, ids: Sequence[int]) -> str:
    """Text with a run of image tokens as one."""
    text, image = str(parts.tokenizer.decode(list(ids))), getattr(parts.processor, "image_token", None)
    while image and image * 2 in text:
        text = text.replace(image * 2, image)
    return text.replace("\n", "\\n")


_EXACT = 1e-4
"""Largest difference of logits in fp32, as a share of the largest logit. Faults of positions or masks give 1e-2."""
Probe = Callable[[Parts], Iterator[Diagnosis]]


def _parts_found(parts: Parts) -> Iterator[Diagnosis]:
    model: Any = parts.model
    tower = getattr(model.config, "vision_config", None)
    between = ", ".join(path.rpartition(".")[2] for path in projectors(model))
    seeing = f", tower {tower.model_type}, between them {between or 'nothing that a recipe can name'}" if tower else ""
    if tower and parts.image_processing is not None:
        whole = parts.image_processing.videos is not None
        seeing += "; a video stays a video" if whole else "; a video becomes pictures"
    seeing += patch_embedding_words(model)
    detail = f"{type(model).__name__}: decoder {type(model.get_decoder()).__name__}{seeing}"
    yield Diagnosis(name="class and parts", detail=detail)


def _experts(parts: Parts) -> Iterator[Diagnosis]:
    """Only of models that have some."""
    if (targets := _adapter_of(parts).targets) != ALL_LINEAR:
        yield Diagnosis(
            name="experts", status="warn", detail="experts that are stacked parameters carry no adapter",
            remedy=f"Set adapter.targets: {targets}.",
        )  # fmt: skip


def _adapter_of(parts: Parts) -> AdapterConfig:
    """The adapter of every layer that can carry one."""
    model = parts.model
    return AdapterConfig(targets=linear_targets(model, decoder_path(model) if is_multimodal(model) else ""))


def _rows(parts: Parts) -> Iterator[Diagnosis]:
    model = parts.model
    if needs_padding(model):
        yield Diagnosis(name="rows", detail="padded: each conversation is a row of its own, on transformers' layers")
    else:
        with torch.device("meta"):
            layers = use_lean_layers(type(model)(model.config))
        form = "lean" if layers else "transformers' own"
        yield Diagnosis(
            name="rows",
            detail=f"padding-free: conversations stand in one row without padding; decoder layers are {form}",
        )  # fmt: skip
    finding = rows_of(model, "auto")
    if finding.apart:
        yield Diagnosis(name="row probe", detail="changing one conversation of a row does not move the other")
        return
    what = "may see each other, since the probe failed" if finding.moved is None else "see each other"
    reason = finding.fault if finding.moved is None else f"a change of one moves the other by {finding.moved:.1g}"
    padded = needs_padding(model)
    yield Diagnosis(
        name="row probe", status="ok" if padded else "warn",
        detail=f"in one row, conversations {what} ({reason}){'; training never puts two into one' if padded else ''}",
        remedy="" if padded else "Set train.micro_batch to 1 and data.pack_tokens to 0; training refuses other values.",
    )  # fmt: skip


def _labels(parts: Parts) -> Iterator[Diagnosis]:
    faults, shown = [], ""
    for turns, size in conversations_of(parts):
        example = example_of(parts, turns, size)
        expected = stock_inputs(parts.template_processor or parts.tokenizer, turns, size)["input_ids"][0].tolist()
        if (other := differs_at(parts, example, expected)) is not None:
            faults.append(f"token {other} is not that of the processor")
        runs = runs_of(example)
        learned = [
            str(parts.tokenizer.decode(run, skip_special_tokens=True)).strip() for run, supervised in runs if supervised
        ]
        answers = [turn.text for turn in turns if turn.role == "assistant"]
        if learned != answers:
            faults.append(f"{learned} is learned, expected {answers}")
        texts = [(decoded(parts, run), supervised) for run, supervised in runs]
        shown = "".join(f"[[{text}]]" if supervised else text for text, supervised in texts)
    yield Diagnosis(
        name="labels", status="bad" if faults else "ok",
        detail=f"{'; '.join(faults) or 'answers alone are learned, marked by [[ ]]'}: {shown}",
        remedy="Do not train it; report this with the command." if faults else "",
    )  # fmt: skip


def _prompts(parts: Parts) -> Iterator[Diagnosis]:
    """Other programs ask by the template's generation prompt; this project asks as it trained."""
    turns, size = conversations_of(parts)[0]
    encoder, question = ConversationEncoder.of(parts), turns[:1]
    asked = stock_inputs(parts.template_processor or parts.tokenizer, question, size)["input_ids"][0].tolist()
    pictures = [item.placeholders for item in pictures_of(parts, question, size)]
    trained = [
        encoder.encode_prompt(question, pictures=pictures, thinking=form).tolist() for form in (None, True, False)
    ]
    places = [first_difference(asked, ids) for ids in trained]
    if None in places:
        yield Diagnosis(name="generation prompt", detail="answers are learned behind the template's own prompt")
        return
    at = max(place for place in places if place is not None)
    theirs, ours = (decoded(parts, ids[max(0, at - 4) :]) for ids in (asked, trained[0]))
    yield Diagnosis(
        name="generation prompt", status="warn",
        detail=f"the template's generation prompt ends with '{theirs}', and answers are learned behind '{ours}': this "
        "project asks as it trained, other programs such as vLLM do not",
        remedy="Correct the chat template.",
    )  # fmt: skip


def _logits(parts: Parts) -> Iterator[Diagnosis]:
    """Compares, and leaves the model as training has it."""
    model, owner = parts.model, parts.template_processor or parts.tokenizer
    conversations = conversations_of(parts)
    examples, expected = [example_of(parts, *conversation) for conversation in conversations], []
    with torch.no_grad():
        for conversation, example in zip(conversations, examples, strict=True):
            given = stock_inputs(owner, *conversation)
            if not example.pictures and given["input_ids"].shape[1] < example.length:  # ends of answers were added
                given = {"input_ids": example.input_ids[None]}
            logits = model(**given, use_cache=False).logits[0, : example.length - 1]
            expected.append(logits[example.supervised[1:]])
    _as_trained(parts)
    with torch.enable_grad():
        head: Any = model.get_output_embeddings()
        ours = form_of(head).logits(head(supervised_hidden(model, Batch.from_examples(examples))))
    theirs = torch.cat(expected)
    difference = float((ours.detach() - theirs).abs().max() / theirs.abs().max())
    wrong = not difference <= _EXACT
    yield Diagnosis(
        name="logits", status="bad" if wrong else "ok",
        detail=f"logits of a batch as it trains differ from the model's own by at most {difference:.1e} of the largest",
        remedy=f"More than {_EXACT:.0e}: do not train it; report this with the command." if wrong else "",
    )  # fmt: skip


def _as_trained(parts: Parts) -> None:
    """Put in adapters that change nothing yet, and the kernels of training; dropout is off."""
    seen = parts.is_pretrained_vlm
    model = ModelConfig(vlm="probe" if seen else None, language=None if seen else "probe", kernels="torch")
    recipe = Recipe(model=model, adapter=_adapter_of(parts))
    attach_adapters(parts, recipe.model, recipe.adapter)
    for module in parts.model.train().modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    prepare_execution(parts.model, recipe, kernels_of(recipe, "fp32"), "fp32")


def _step(parts: Parts) -> Iterator[Diagnosis]:
    if not any("lora_" in name for name, _ in parts.model.named_parameters()):  # the probe before failed
        try:
            _as_trained(parts)
        except AdapterError:
            yield Diagnosis(name="a training step", status="warn", detail="not tried: there is no adapter to train")
            return
    batch = Batch.from_examples([example_of(parts, *conversation) for conversation in conversations_of(parts)])
    loss: Tensor = LossModule(parts.model, None)(batch, bool(batch.images))
    loss.backward()
    trained = {name: weight for name, weight in parts.model.named_parameters() if weight.requires_grad}
    without = [name for name, weight in trained.items() if weight.grad is None or not weight.grad.isfinite().all()]
    size, mixers = sum(weight.numel() for weight in trained.values()), [n for n in trained if "lora_mixer" in n]
    detail = f"MoSLoRA trains {size:,} values in {len(mixers)} layers of the language model"
    yield Diagnosis(
        name="a training step", status="bad" if without else "ok",
        detail=f"{detail}, but {len(without)} of {len(trained)} factors get no finite gradient, such as {without[0]}"
        if without else f"{detail}, and every factor gets a finite gradient",
        remedy="Leave these layers out of adapter.targets." if without else "",
    )  # fmt: skip


PROBES: tuple[Probe, ...] = (_parts_found, _experts, _rows, _labels, _prompts, _logits, _step)
"""Of a model; the last two change it. The first three need no conversation."""


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
        return [refused, *_findings(parts, PROBES[:3], failed="bad")]
    owner = parts.template_processor
    # A processor that writes prompts itself gives nothing to compare with.
    silent = owner is not None and not (owner.chat_template or parts.tokenizer.chat_template)
    return _findings(parts, PROBES, failed="warn" if silent else "bad")


def _findings(parts: Parts, probes: Sequence[Probe], *, failed: Status) -> list[Diagnosis]:
    return findings_of(
        [partial(probe, parts) for probe in probes], failed=failed, what="the probe failed, so training may too",
        remedy="Train another model, or report this with the command.",
    )  # fmt: skip
