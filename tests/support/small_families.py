"""Image-text-to-text families without files: default configurations, small random models, processors of their classes.

Nothing is downloaded. Configurations are cut by the names of their fields.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections import Counter
from typing import Any, cast

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import image_processing_auto, processing_auto, video_processing_auto

from mm_moslora.models.assembly import Parts, pretrained_parts
from mm_moslora.models.batching.row_probe import SIZES, small_config
from mm_moslora.models.pretrained_vlm import side_of

_DEPTH = 2
_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "layers", "encoder_layers", "vt_num_hidden_layers")
_TOKEN = re.compile(r"^(\w+_token)_(?:id|index)$")
_MISSING = re.compile(r"has no attribute '?(\w+?_token)(?:_ids?)?'?$")
_WRITTEN = re.compile(r"<[^<>\s]+>")
"""Special tokens in a text."""
_TOKENS = ("mm_tokens_per_image", "image_seq_length", "image_seq_len", "num_image_tokens")
"""Visual tokens of a picture, in configurations and processors."""
_GRID = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}
"""Settings of image processors and their names in the configurations of towers."""
_PROCESSORS: dict[str, str] = cast(Any, processing_auto).PROCESSOR_MAPPING_NAMES
_OF_PICTURES: Any = cast(Any, image_processing_auto).IMAGE_PROCESSOR_MAPPING_NAMES
_OF_VIDEOS: Any = cast(Any, video_processing_auto).VIDEO_PROCESSOR_MAPPING_NAMES
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def default_config(kind: str) -> PreTrainedConfig:
    """The configuration that a family (`model_type`) has by itself, with the vision part that some leave out."""
    config: PreTrainedConfig = AutoConfig.for_model(kind)
    for name, part in type(config).sub_configs.items():
        if "vision" in name and getattr(config, name, None) is None and part is not AutoConfig:
            setattr(config, name, part())
    tower: Any = getattr(config, "vision_config", None)
    side, patch = side_of(tower, "image_size"), side_of(tower, "patch_size")
    tokens = next((getattr(config, name) for name in _TOKENS if isinstance(getattr(config, name, None), int)), 0)
    # Some defaults do not fit together: a tower smaller than the family's, patches that do not pair.
    if side and patch and (side // patch) ** 2 < tokens:
        tower.image_size = patch * math.ceil(tokens**0.5)
    elif side and patch and side // patch % (paired := _paired(config)):
        tower.image_size = patch * paired * math.ceil(side / patch / paired)
    return config


def _paired(config: Any) -> int:
    """So many patches side by side are one visual token."""
    values = (getattr(config, name, None) for name in ("scale_factor", "downsample_factor"))
    return next((value for value in values if isinstance(value, int)), 1)


def small_family(kind: str) -> Parts:
    """A small random model of a family on the CPU in fp32, ready for evaluation, and its processor."""
    config = default_config(kind)
    processor = stand_in_processor(config)
    words = max(len(processor.tokenizer), int(getattr(config.get_text_config(), "pad_token_id", 0) or 0) + 1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(_cut(config, words), dtype=torch.float32)
        for module in model.modules():  # attention of fresh weights is nearly uniform, whatever the positions
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for weight in model.parameters():  # some start at zero, and pictures behind them would not be seen
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
    return pretrained_parts(processor, model=model.eval(), base={"vlm": kind, "vlm_revision": None})


def _cut(original: PreTrainedConfig, words: int) -> PreTrainedConfig:
    """A copy with a small decoder, a vocabulary of so many words, and two layers in the tower."""
    config, text = copy.deepcopy(original), original.get_text_config()
    small: Any = small_config(text, SIZES[0])
    small.vocab_size = words
    if sections := (small.rope_parameters or {}).get("mrope_section", [1, 1, 1] if _grids(original) else None):
        half = int(small.head_dim * small.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
        scaled = [part * half // sum(sections) for part in sections]
        scaled[0] += half - sum(scaled)
        small.rope_parameters = small.rope_parameters | {"mrope_section": scaled}
    config.text_config = small
    tower: Any = config.vision_config  # type: ignore[attr-defined]
    depth = next(getattr(tower, name) for name in _DEPTHS if isinstance(getattr(tower, name, None), int))
    for name, value in list(vars(tower).items()):
        if name in _DEPTHS and isinstance(value, int):
            setattr(tower, name, min(value, _DEPTH))
        elif name.endswith("layer_id") and isinstance(value, int):
            setattr(tower, name, min(value, _DEPTH - 1))
        elif isinstance(value, list | tuple) and len(value) == depth:
            setattr(tower, name, value[:_DEPTH])
        elif isinstance(value, list | tuple) and "index" in name:
            setattr(tower, name, sorted({min(item, _DEPTH - 1) for item in value}))
        elif name == "out_hidden_size":
            setattr(tower, name, small.hidden_size)
    return config


def _grids(config: Any) -> bool:
    return hasattr(config.vision_config, "spatial_merge_size")


def stand_in_processor(config: PreTrainedConfig) -> Any:
    """A processor of a family's own class over a byte-level vocabulary, with ChatML; the config gets its tokens."""
    processor, ids = _with_its_tokens(getattr(transformers, _PROCESSORS[config.model_type]), config)
    processor.chat_template = _CHATML.replace("IMAGE", processor.image_token)
    for key in config.to_dict():
        if match := _TOKEN.match(key):
            token = getattr(processor, match[1], None) or getattr(processor.tokenizer, match[1], None)
            if isinstance(token, str):
                setattr(config, key, processor.tokenizer.convert_tokens_to_ids(token))
    if hasattr(config, "image_token_id"):  # some write another token into prompts than they put in its place
        config.image_token_id = Counter(ids).most_common(1)[0][0]
    return processor


def _with_its_tokens(processor_class: type, config: Any) -> tuple[Any, list[int]]:
    """A processor whose vocabulary has all special tokens that it names or writes, and what it makes of a picture."""
    tokens = [match[1] for key in config.to_dict() if (match := _TOKEN.match(key))]
    texts: list[str] = []
    while True:
        try:
            processor = processor_class(**_arguments(processor_class, config, _tokenizer(tokens, texts)))
            vocabulary = processor.tokenizer.get_vocab()
            own = [value for key, value in vars(processor).items() if key.endswith("token") and isinstance(value, str)]
            ids: list[int] = []
            if vocabulary.keys() >= {*own}:
                given = {"text": [processor.image_token], "images": [[Image.new("RGB", (64, 48))]]}
                ids = processor(**given, return_tensors="pt")["input_ids"][0].tolist()
                own = _WRITTEN.findall(processor.tokenizer.decode(ids))
        except AttributeError as error:
            if (match := _MISSING.search(str(error))) is None or match[1] in tokens:
                raise
            tokens.append(match[1])
            continue
        missing = [token for token in dict.fromkeys(own) if token not in vocabulary]
        if not missing:
            return processor, ids
        texts += missing


def _arguments(processor_class: type, config: Any, tokenizer: Any) -> dict[str, Any]:
    """What the class asks for: its parts, and settings that the configuration has, too."""
    vision: Any = getattr(config, "vision_config", None)
    arguments: dict[str, Any] = {}
    for name in inspect.signature(processor_class).parameters:
        if name.endswith("tokenizer"):
            arguments[name] = tokenizer
        elif name == "image_processor":
            arguments[name] = _picture_part(_OF_PICTURES, config)
        elif name == "video_processor":
            arguments[name] = _picture_part(_OF_VIDEOS, config)
        elif name == "feature_extractor":
            arguments[name] = transformers.SequenceFeatureExtractor(1, 16_000, 0.0)
        elif owner := next((owner for owner in (config, vision) if getattr(owner, name, None) is not None), None):
            arguments[name] = getattr(owner, name)
        elif name in _TOKENS and (side := side_of(vision, "image_size")):
            arguments[name] = (side // side_of(vision, "patch_size") // _paired(config)) ** 2
    return arguments


def _picture_part(classes: Any, config: Any) -> Any:
    """An image or video processor with pictures of the tower's size, where that has one."""
    own = _PROCESSORS.get(config.model_type)
    kinds = [config.model_type, *(kind for kind, name in _PROCESSORS.items() if name == own)]
    known = next(classes[kind] for kind in kinds if classes.get(kind))
    part = getattr(transformers, known if isinstance(known, str) else known.get("torchvision") or known.get("pil"))
    vision = getattr(config, "vision_config", None)
    side, patch = side_of(vision, "image_size"), side_of(vision, "patch_size")
    sizes: dict[str, Any] = {
        key: dict.fromkeys(value, side)
        for key in ("size", "crop_size", "max_image_size")
        if isinstance(value := getattr(part, key, None), dict)
        and value
        and (key == "max_image_size" or "longest_edge" not in value)
    }
    grid = {
        key: getattr(vision, name)
        for key, name in _GRID.items()
        if hasattr(part, key) and isinstance(getattr(vision, name, None), int)
    }
    made = part(**(sizes if side else {}), **grid)
    if patch and getattr(made, "image_seq_length", 0) is None:  # a checkpoint's file says it
        made.image_seq_length = (side // patch) ** 2
    return made


def _tokenizer(tokens: list[str], texts: list[str]) -> Any:
    """A byte-level tokenizer with ChatML's markers, these named special tokens and these texts as special tokens."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĊĊĊ"]  # line breaks join, as in most vocabularies
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|begin|>"}
    extra = {name: f"<|{name}|>" for name in tokens if name not in named}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **named)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", *texts]}, replace_extra_special_tokens=False
    )
    return tokenizer
