"""The fingerprint of a model's preprocessing: what becomes of one fixed conversation and of a few fixed pictures.

Training stores it in every checkpoint, and `export` in every export. Loading compares it with what the loaded parts
make of the same conversation. The probe decides; the named settings beside it explain a difference. A setting that
changes nothing, such as the name of a class in another release of transformers, is therefore no difference.

`compare` does the same for the inputs that another program made, such as vLLM or a processor of transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, groupby, takewhile
from operator import eq
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mm_moslora import __version__
from mm_moslora.batch import ImageProcessing
from mm_moslora.config import SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, EncoderParts
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.utils.errors import DataError, ModelError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora.utils.run_paths import PREPROCESSING, find_checkpoint
from mm_moslora.utils.text_format import visible
from mm_moslora.utils.untrusted_data import build_strictly, parse_json, read_value

logger = logging.getLogger(__name__)

FORMAT = 1
TOLERANCE = 0.03
"""Largest accepted difference of the statistics of pixels, whose spread is near 1. The two backends of pictures of
transformers 5.24 differed by up to 0.017, at 28 pixels."""
_STRETCHES = 24
"""Stretches of a tensor of pixels of which mean and standard deviation are compared."""
_SHOWN = 60
"""Characters shown of a long value, from shortly before the first difference on."""
PROBE_SIZE = (1344, 1008)
"""Width and height of the picture: more pixels than most budgets allow, and no multiple of most patches."""
COUNTED_SIZES = ((64, 48), (480, 640), (2048, 1536), (28, 28), (28, 84), (4096, 4096))
"""Pictures whose tokens are counted, so that limits show on both sides: usual budgets lie between the last ones."""
_QUESTIONS = ("What is in the picture?\nAnswer with 1 word; caf\u00e9 \u4e2d\u6587 is none.", "Is it 3.14 metres wide?")
_ANSWER = "Squares."
_ALONE = "  Which of the two?\n\n"
"""A question alone, with blanks around it."""
_LIBRARIES = ("transformers", "tokenizers", "pillow")
_LONGEST = 2**20
"""Tokens of a prompt, and characters of a token: a file of anybody must not fill the memory."""
_NO_SETTINGS = frozenset({"image_processor_type", "video_processor_type", "processor_class", "_processor_class"})
_OF_VIDEOS = ("video_frames", "video_fps")
_VIDEO = "video."
"""Before the names of a video processor's settings."""
_FLAT = "{%- set messages = flat.messages -%}"
"""Ends what exports put before the chat template of a language model; it changes no prompt."""


@dataclass(frozen=True, kw_only=True)
class _Summary:
    """See `tensor_summary`."""

    shape: list[int]
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class _Fingerprint:
    """The content of `preprocessing.json`."""

    format: int
    versions: dict[str, str]
    settings: dict[str, Any]
    prompt: list[tuple[int, int, str]]
    tokens_per_picture: dict[str, int]
    tensors: dict[str, _Summary]
    question: list[tuple[int, int, str]]
    """As `prompt`, of a question alone."""
    stop_ids: list[int]
    """Empty: unknown, and then not compared."""


class PreprocessingParts(EncoderParts, Protocol):
    """The attributes of a model that prepare its inputs."""

    @property
    def processor(self) -> Any:
        """None for a language model alone."""

    @property
    def image_processing(self) -> ImageProcessing | None:
        """None for a language model alone."""

    @property
    def stop_ids(self) -> Sequence[int]:
        """Tokens that end an answer; empty: unknown."""


def probe_picture() -> Image.Image:
    """The picture: two gradients and squares of 16 pixels, the same on every machine."""
    width, height = PROBE_SIZE
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 // (width - 1), y * 255 // (height - 1), ((x // 16 + y // 16) % 2) * 255)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def probe_messages(*, picture: bool = True) -> list[dict[str, Any]]:
    """The conversation as messages for `apply_chat_template`, which ends with a question.

    Args:
        picture: False for a language model alone, whose contents are strings.
    """
    texts = [("user", _QUESTIONS[0]), ("assistant", _ANSWER), ("user", _QUESTIONS[1])]
    if not picture:
        return [{"role": role, "content": text} for role, text in texts]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


class TrainedVideos(NamedTuple):
    """What training took from every video; None where it is not stored, or sources differ in it."""

    frames: int | None
    fps: float | None
    whole: bool
    """Whether a model that takes videos as such got them so."""


def preprocessing_of(
    parts: PreprocessingParts, *, video_frames: Sequence[int] = (), video_fps: Sequence[float] = ()
) -> dict[str, Any]:
    """The fingerprint of a model's preprocessing; empty, with a warning, where its parts refuse the probe."""
    try:
        encoder, images = ConversationEncoder.of(parts), parts.image_processing
        pictures = [] if images is None else images.process([probe_picture()])
        counts = _tokens_per_picture(images)
        turns = [
            Turn.asking(_QUESTIONS[0], images=len(pictures)), Turn(role="assistant", text=_ANSWER),
            Turn.asking(_QUESTIONS[1]),
        ]  # fmt: skip
        ids = encoder.encode_prompt(turns, pictures=[picture.placeholders for picture in pictures]).tolist()
        alone = encoder.encode_prompt([Turn.asking(_ALONE)], pictures=[]).tolist()
        settings = _settings(parts, encoder)
        texts = {number: str(parts.tokenizer.decode([number])) for number in {*ids, *alone}}
    except Exception as error:  # processors raise nearly anything
        logger.warning("The preprocessing has no fingerprint, since it refuses the probe: %s", error)
        return {}
    return {
        "format": FORMAT,
        "versions": {"mm_moslora": __version__} | {name: version(name) for name in _LIBRARIES},
        "settings": settings
        | {
            key: sorted(set(values))
            for key, values in zip(_OF_VIDEOS, (video_frames, video_fps), strict=True)
            if values
        },
        "prompt": _runs(ids, texts),
        "tokens_per_picture": counts,
        "tensors": {name: tensor_summary(value) for item in pictures for name, value in sorted(item.tensors.items())},
        "question": _runs(alone, texts),
        "stop_ids": list(parts.stop_ids),
    }


def write_preprocessing(fingerprint: Mapping[str, Any], folder: Path) -> None:
    """Write a fingerprint into a new folder; nothing where it is empty."""
    if fingerprint:
        text = json.dumps(fingerprint, indent=1, ensure_ascii=False)
        (folder / PREPROCESSING).write_text(text + "\n", encoding="utf-8")


def stored_preprocessing(path: str | Path) -> dict[str, Any]:
    """The fingerprint of a run, a checkpoint or an export; empty where it has none, refused where it is damaged."""
    folder = Path(path)
    file = (folder if (folder / PREPROCESSING).is_file() else find_checkpoint(folder)) / PREPROCESSING
    try:
        stored: dict[str, Any] = read_json(file)
        if stored.get("format") != FORMAT:
            raise ValueError(f"has format {stored.get('format')!r}, this version reads {FORMAT}")
        fingerprint = asdict(build_strictly(_Fingerprint, stored, source=str(file)))
        for prompt in (fingerprint["prompt"], fingerprint["question"]):
            counts = [count for number, count, _ in prompt if number >= 0 and count > 0]
            if len(counts) < len(prompt) or sum(counts) > _LONGEST:
                raise ValueError("holds a prompt that no model reads")
        for key in _OF_VIDEOS:
            for value in read_value(list[Any], fingerprint["settings"].get(key, []), source=str(file), where=key):
                build_strictly(SourceConfig, {"path": PREPROCESSING, key: value}, source=str(file))
        return fingerprint
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file} cannot be read ({error}). Copy the folder again, or delete this file: pictures and prompts are "
            "then not compared with those of the training."
        ) from error


def preprocessing_digest(path: str | Path) -> str:
    """SHA-256 of what decides in the fingerprint of a folder; settings and versions only explain a difference."""
    decides = {key: value for key, value in stored_preprocessing(path).items() if key not in ("settings", "versions")}
    return sha256_of_values(decides, ascii_only=True) if decides else ""


def compare(path: str | Path, inputs: Mapping[str, Any]) -> list[str]:
    """What differs between a training's preprocessing and another program's; empty: they agree.

    Args:
        inputs: what a processor returns for `probe_messages` and `probe_picture`, or as much of it as can be had, such
            as `{"input_ids": request_output.prompt_token_ids}` of vLLM.

    Raises:
        DataError: there is nothing to compare: the folder has no fingerprint, or `inputs` none of its names.
        ModelError: there is no model, or its fingerprint cannot be read.
    """
    stored = stored_preprocessing(path)
    if not stored:
        raise DataError(f"{path} has no {PREPROCESSING} to compare with.")
    own = _of_inputs(inputs, stored)
    if not any(own.values()):
        raise DataError(
            f"The inputs are {', '.join(sorted(inputs)) or 'empty'}; expected some of "
            f"{', '.join(['input_ids', *sorted(stored['tensors'])])}."
        )
    return [visible(line) for line in differences(own, stored)]


def _of_inputs(inputs: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a fingerprint that a processor's inputs show."""
    ids = as_tensor(inputs.get("input_ids", [])).flatten().tolist()
    tensors = {name: tensor_summary(as_tensor(inputs[name])) for name in stored["tensors"] if name in inputs}
    return {"prompt": [[number, 1, ""] for number in ids], "tensors": tensors}


def check_preprocessing(path: str | Path, parts: PreprocessingParts, *, accepted: bool = False) -> bool:
    """Whether parts prepare inputs otherwise than the training of their folder; an error unless `accepted`."""
    if not (stored := stored_preprocessing(path)) or not (own := preprocessing_of(parts)):
        return False
    notes = {key: differing_values(own[key], stored[key]) for key in ("settings", "versions")}
    return _refuse(path, differences(own, stored), notes, accepted=accepted)


def check_processor(
    path: str | Path,
    processor: Any,
    *,
    images: ImageProcessing | None = None,
    stop_ids: Sequence[int] = (),
    accepted: bool = False,
) -> bool:
    """The same for an export's processor, or a language model's tokenizer, as transformers alone calls it.

    A processor without a chat template is not compared, since every program words its prompts itself.
    """
    template = getattr(processor, "chat_template", None)
    if not (Path(path) / PREPROCESSING).is_file() or template is None:
        return False
    sees = getattr(processor, "image_processor", None) is not None
    tokenizer, messages = getattr(processor, "tokenizer", processor), probe_messages(picture=sees)
    asked = [{"role": "user", "content": [{"type": "text", "text": _ALONE}] if sees else _ALONE}]
    text, alone = (
        processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) for turns in (messages, asked)
    )
    more = {"images": [[probe_picture()]]} if sees else {}
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    inputs = processor(text=[text], return_tensors="pt", add_special_tokens=special, **more)
    stored, alone_ids = stored_preprocessing(path), tokenizer(alone, add_special_tokens=special)["input_ids"]
    own = _of_inputs(inputs, stored) | {"question": [[number, 1, ""] for number in alone_ids]}
    own |= {"tokens_per_picture": _tokens_per_picture(images), "stop_ids": list(stop_ids)}
    return _refuse(path, differences(own, stored), {}, accepted=accepted)


def hand_on_preprocessing(path: str | Path, parts: PreprocessingParts, folder: Path) -> None:
    """Write the fingerprint of a trained model into its export; what the parts make now, where the two differ."""
    stored = stored_preprocessing(path)
    frames, fps = (stored.get("settings", {}).get(key, ()) for key in _OF_VIDEOS)
    own = preprocessing_of(parts, video_frames=frames, video_fps=fps)
    write_preprocessing(stored if stored and own and not differences(own, stored) else own, folder)


def trained_videos(path: str | Path) -> TrainedVideos:
    """See `TrainedVideos`; of a run, a checkpoint or an export."""
    settings = stored_preprocessing(path).get("settings", {})
    frames, fps = (settings.get(key, ()) for key in _OF_VIDEOS)
    whole = not settings or any(key.startswith(_VIDEO) for key in settings)
    return TrainedVideos(
        frames[0] if len(frames) == 1 and not fps else None, fps[0] if len(fps) == 1 and not frames else None, whole
    )


def differences(own: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints in what the first has, for people: `here`, in the second `in training`."""
    texts = {number: text for prompt in (stored["prompt"], own["prompt"]) for number, _, text in prompt if text}
    differing = _differing_ids("the prompt", own["prompt"], stored["prompt"], texts) if own["prompt"] else []
    question = own.get("question", stored["question"])
    differing = differing or _differing_ids("a question alone", question, stored["question"], texts)
    differing += differing_values(_counts(own), _counts(stored))
    differing += _differing_tensors(own["tensors"], stored["tensors"])
    missing = stored["tensors"].keys() - own["tensors"].keys() if "settings" in own else ()  # others may name a part
    return differing + [f"{name} is missing here" for name in sorted(missing)]


def _differing_ids(
    what: str, own: Sequence[Sequence[Any]], stored: Sequence[Sequence[Any]], texts: Mapping[int, str]
) -> list[str]:
    """The first difference of the tokens of two prompts; of another program's tokens the texts may not be known."""
    ids, expected = (list(chain.from_iterable([number] * count for number, count, _ in runs)) for runs in (own, stored))
    if ids == expected:
        return []
    first = _agreement(ids, expected)
    lengths = f"{len(ids)} tokens here, {len(expected)} in training"
    shown = [
        "".join(texts.get(number, f"[{number}]") for number in some[max(0, first - 2) : first + 6])
        for some in (ids, expected)
    ]
    return [f"{what} ({lengths}) has from token {first} on {shown[0]!r} here, {shown[1]!r} in training"]


def _counts(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    counts = fingerprint.get("tokens_per_picture", {})
    ends = fingerprint.get("stop_ids")  # empty: unknown
    return {f"the number of tokens of a picture of {size}": count for size, count in counts.items()} | (
        {"the ids of tokens that end an answer": ends} if ends else {}
    )


def as_tensor(value: Any) -> Tensor:
    """A tensor of an array, of nested lists, or of a list of tensors of one shape."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor | np.ndarray):
        return torch.stack([torch.as_tensor(item) for item in value])
    return torch.as_tensor(value)


def tensor_summary(value: Tensor) -> dict[str, Any]:
    """Shape without leading ones, which programs differ in, and values: all of a few, statistics of many."""
    shape = list(value.shape)
    while shape and shape[0] == 1:
        del shape[0]
    flat = value.detach().flatten().double().cpu()
    if len(flat) > 2 * _STRETCHES:
        flat = torch.cat([torch.stack([part.mean(), part.std()]) for part in flat.tensor_split(_STRETCHES)])
    return {"shape": shape, "values": [round(number, 4) for number in flat.tolist()]}


def _differing_tensors(own: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Differences of the tensors that both have; see `tensor_summary`."""
    differing = []
    for name in sorted(own.keys() & stored.keys()):
        (shape, values), (old_shape, old_values) = (
            (item[name]["shape"], item[name]["values"]) for item in (own, stored)
        )
        if shape != old_shape or len(values) != len(old_values):
            differing.append(f"{name} has shape {shape} here, {old_shape} in training")
            continue
        far = max(range(len(values)), key=lambda index: abs(values[index] - old_values[index]), default=None)
        if far is not None and not abs(values[far] - old_values[far]) <= TOLERANCE:
            what = ("mean", "spread")[far % 2] if len(values) == 2 * _STRETCHES else "a value"
            differing.append(f"{name}: {what} {values[far]:.4g} here, {old_values[far]:.4g} in training")
    return differing


def differing_values(own: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Differences of the values that both have; long ones are shown from shortly before their first difference on."""
    differing = []
    for key in sorted(key for key in own.keys() & stored.keys() if own[key] != stored[key]):
        one, other = str(own[key]), str(stored[key])
        if max(len(one), len(other)) > _SHOWN:
            start = max(0, _agreement(one, other) - _SHOWN // 3)
            one, other = (f"{'...' * (start > 0)}{text[start : start + _SHOWN]!r}" for text in (one, other))
        differing.append(f"{key} is {one} here, {other} in training")
    return differing


def _agreement(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    return sum(takewhile(bool, map(eq, one, other)))


def _refuse(path: str | Path, differing: Sequence[str], notes: Mapping[str, Sequence[str]], *, accepted: bool) -> bool:
    if not differing:
        return False
    reasons = "".join(f" Different {name}: {'; '.join(items)}." for name, items in notes.items() if items)
    text = (
        f"Pictures or prompts are prepared otherwise than in the training of {path}: {'; '.join(differing)}.{reasons}"
    )
    text = visible(text)
    if not accepted:
        raise ModelError(
            f"{text} The answers would be worse. Restore the settings or versions of the training, or accept the "
            "difference with --other-preprocessing."
        )
    logger.warning("%s This is accepted.", text)
    return True


def _tokens_per_picture(images: ImageProcessing | None) -> dict[str, int]:
    counts = [] if images is None else images.placeholders(COUNTED_SIZES)
    return {f"{width}x{height}": len(ids) for (width, height), ids in zip(COUNTED_SIZES, counts, strict=False)}


def _runs(ids: Sequence[int], texts: Mapping[int, str]) -> list[list[Any]]:
    """Runs of one token as number, count and text."""
    return [[number, len(list(same)), texts[number]] for number, same in groupby(ids)]


def _settings(parts: PreprocessingParts, encoder: ConversationEncoder) -> dict[str, Any]:
    """Named settings in a form that JSON gives back unchanged."""
    tokenizer: PreTrainedTokenizerBase = parts.tokenizer
    images = getattr(parts.processor, "image_processor", None)
    values = {
        "processor": type(parts.processor or tokenizer).__name__,
        "chat_template": str(encoder.template.source).rpartition(_FLAT)[2],
        "special_tokens": tokenizer.special_tokens_map,
        "thinking": encoder.thinking,
        "image_token": parts.image_token_id,
        "boxes": None if parts.image_processing is None else parts.image_processing.boxes,
    }
    if images is not None:
        values |= {"image_processor": type(images).__name__.removesuffix("Pil").removesuffix("Fast")}
        values |= {f"image.{key}": value for key, value in images.to_dict().items() if key not in _NO_SETTINGS}
    if parts.image_processing is not None and parts.image_processing.videos is not None:
        videos = parts.processor.video_processor.to_dict()
        values |= {f"{_VIDEO}{key}": value for key, value in videos.items() if key not in _NO_SETTINGS}
    plain: dict[str, Any] = parse_json(json.dumps(values, default=_plain))
    return {name: _without_unset(value) for name, value in sorted(plain.items())}


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else str(value)


def _without_unset(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value
