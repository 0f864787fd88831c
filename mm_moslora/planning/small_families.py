"""Small random models of any class of transformers, and processors of image-text-to-text families without files.

Nothing is downloaded and no family is named. Configurations are cut by the names of their fields, and of several cuts
the first is taken that the class itself computes with.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import image_processing_auto, processing_auto, video_processing_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mm_moslora.adapters.experts.small_models import EQUAL_HEADS, SIZES, small_config
from mm_moslora.models.families import processor_family
from mm_moslora.models.pretrained_vlm import side_of
from mm_moslora.utils.errors import ModelError, reason_of

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
_LARGEST = 450_000_000
"""Parameters of the largest model that is made: 1.8 GB in fp32, of which a tower with its own width takes most."""
_PATIENCE = 16
"""Special tokens that a processor may ask for, one after the other."""
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def default_config(kind: str) -> PreTrainedConfig:
    """The configuration that a family has by itself, with the vision part that some leave out.

    Args:
        kind: the family's `model_type`.
    """
    config: PreTrainedConfig = AutoConfig.for_model(kind)
    for name, part in type(config).sub_configs.items():
        if "vision" in name and getattr(config, name, None) is None and part is not AutoConfig:
            setattr(config, name, part())
    tower: Any = getattr(config, "vision_config", None)
    side, patch = side_of(tower, "image_size"), side_of(tower, "patch_size")
    tokens = next((getattr(config, name) for name in _TOKENS if isinstance(getattr(config, name, None), int)), 0)
    # Some defaults do not fit together: a tower smaller than the family's, patches that do not pair, odd heads.
    if side and patch and (side // patch) ** 2 < tokens:
        tower.image_size = patch * math.ceil(tokens**0.5)
    elif side and patch and side // patch % (paired := _paired(config)):
        tower.image_size = patch * paired * math.ceil(side / patch / paired)
    width, heads = (getattr(tower, name, 0) for name in ("hidden_size", "num_attention_heads"))
    if isinstance(width, int) and isinstance(heads, int) and heads and width % heads:
        tower.num_attention_heads = math.gcd(width, heads)
    return config


def _paired(config: Any) -> int:
    """So many patches side by side are one visual token."""
    values = (getattr(config, name, None) for name in ("scale_factor", "downsample_factor"))
    return next((value for value in values if isinstance(value, int)), 1)


def small_family_model(
    config: PreTrainedConfig, *, words: int | None = None, accept: Callable[[PreTrainedModel], object]
) -> PreTrainedModel:
    """A small random model of a configuration's class, on the CPU in fp32, ready for evaluation.

    Args:
        config: of the large model, one that sees or a language model; not changed.
        words: size of the vocabulary; None: its own.
        accept: raises where the model does not compute what it should.

    Raises:
        ModelError: the class computes with none of the cuts; names the first fault.
    """
    faults = []
    for names in (SIZES[0], EQUAL_HEADS, *SIZES[1:]):
        for follow in (("hidden_size", "embed_dim"), ()) if "hidden_size" in names else ((),):
            try:
                model = _made(_cut(config, dict(names), words=words, keep=follow))
                accept(model)
            except Exception as error:  # configurations fit together in ways that only their classes know
                faults.append(f"{type(error).__name__}: {reason_of(error)}")
            else:
                return model
    raise ModelError("; ".join(dict.fromkeys(faults)))


def sees(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a vision-language model."""
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or hasattr(config, "vision_config")


def _made(config: PreTrainedConfig) -> PreTrainedModel:
    loader = AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM
    with torch.device("meta"):
        shape = loader.from_config(copy.deepcopy(config), trust_remote_code=False)
    size = sum(parameter.numel() for parameter in shape.parameters())
    if size > _LARGEST:
        raise ModelError(f"its smallest model has {size:,} parameters")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        model: PreTrainedModel = loader.from_config(config, trust_remote_code=False, dtype=torch.float32)
        for module in model.modules():  # attention of fresh weights is nearly uniform, whatever the positions
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for weight in model.parameters():  # some start at zero, and pictures behind them would not be seen
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
    return model.eval()


def _cut(
    original: PreTrainedConfig, names: dict[str, int], *, words: int | None, keep: Sequence[str]
) -> PreTrainedConfig:
    """A copy with a small decoder and two layers in the other parts.

    Args:
        original: not changed.
        names: see `small_config`.
        words: size of the vocabulary.
        keep: fields of other parts that stay although they equal the decoder's width.
    """
    config, text = copy.deepcopy(original), original.get_text_config()
    small = small_config(text, names)
    small.vocab_size = words or text.vocab_size
    if hasattr(small, "vocab_size_per_layer_input"):
        small.vocab_size_per_layer_input = small.vocab_size
    _fit_sections(small, grids=hasattr(getattr(original, "vision_config", None), "spatial_merge_size"))
    if text is original:
        config = small
    elif hasattr(config, "vocab_size"):
        config.vocab_size = small.vocab_size
    widths = (getattr(text, "hidden_size", None), getattr(small, "hidden_size", None))
    for name, part in list(vars(original).items()):
        if part is text:
            setattr(config, name, small)
        elif isinstance(part, PreTrainedConfig):
            shallow = copy.deepcopy(part)
            _follow(_shallow(shallow), widths, keep)
            setattr(config, name, shallow)
    if text is not original:
        _follow(config, widths, keep)
        _clip_features(config)
    return config


def _fit_sections(config: Any, *, grids: bool) -> None:
    """Positions of three parts share the rotary half of a head, which is smaller now; some classes have a default."""
    rope = getattr(config, "rope_parameters", None) or {}
    if sections := rope.get("mrope_section", [1, 1, 1] if grids else None):
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        scaled = [part * half // sum(sections) for part in sections]
        scaled[0] += half - sum(scaled)
        config.rope_parameters = rope | {"mrope_section": scaled}


def _shallow(config: Any) -> Any:
    depth = next((getattr(config, name) for name in _DEPTHS if isinstance(getattr(config, name, None), int)), 0)
    for name, value in list(vars(config).items()):
        if name in _DEPTHS and isinstance(value, int):
            setattr(config, name, min(value, _DEPTH))
        elif name.endswith("layer_id") and isinstance(value, int):
            setattr(config, name, min(value, _DEPTH - 1))
        elif isinstance(value, list | tuple) and depth > _DEPTH:
            if len(value) == depth:
                setattr(config, name, value[:_DEPTH])
            elif "indices" in name and all(isinstance(item, int) for item in value):
                setattr(config, name, [min(item, _DEPTH - 1) for item in value])
            elif "index" in name and all(isinstance(item, int) for item in value):
                setattr(config, name, sorted({min(item, _DEPTH - 1) for item in value}))
    return _clip_features(config)


def _clip_features(config: Any) -> Any:
    """Layers of a tower whose outputs are read are those that it still has."""
    for name, value in list(vars(config).items()):
        if "feature_layer" in name and isinstance(value, list | tuple):
            setattr(config, name, [max(-_DEPTH, min(item, _DEPTH - 1)) for item in value])
    return config


def _follow(config: Any, widths: tuple[int | None, int | None], keep: Sequence[str]) -> None:
    """What equals the decoder's width in another part is a width of what that part gives to the decoder."""
    for name, value in list(vars(config).items()):
        out = name in ("out_hidden_size", "text_hidden_size") or (
            name == "hidden_size" and hasattr(config, "embed_dim")
        )
        if type(value) is int and (out or (value == widths[0] and name not in keep)):
            setattr(config, name, widths[1])


def stand_in_processor(config: PreTrainedConfig) -> Any:
    """A processor of a family's own class over a byte-level vocabulary, with ChatML; the configuration gets its tokens.

    Args:
        config: of the family, changed in place: the numbers of its special tokens.

    Raises:
        ModelError: transformers has no processor for it, or it is not made from its parts alone.
    """
    kind = config.model_type
    if (name := _PROCESSORS.get(kind)) is None:
        raise ModelError(f"transformers {transformers.__version__} names no processor for {kind}")
    processor, ids = _with_its_tokens(getattr(transformers, name), config)
    if processor_family(processor).adds_text:
        raise ModelError(f"{type(processor).__name__} writes prompts itself, and takes no chat template")
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
    name = processor_class.__name__
    for _ in range(_PATIENCE):
        try:
            processor = processor_class(**_arguments(processor_class, config, _tokenizer(tokens, texts)))
            vocabulary = processor.tokenizer.get_vocab()
            own = [value for key, value in vars(processor).items() if key.endswith("token") and isinstance(value, str)]
            ids: list[int] = []
            if vocabulary.keys() >= {*own}:
                if getattr(processor, "image_token", None) is None:
                    raise ModelError(f"{name} has no image token")
                given = {"text": [processor.image_token], "images": [[Image.new("RGB", (64, 48))]]}
                ids = processor(**given, return_tensors="pt")["input_ids"][0].tolist()
                own = _WRITTEN.findall(processor.tokenizer.decode(ids))
            missing = [token for token in dict.fromkeys(own) if token not in vocabulary]
        except AttributeError as error:
            if (match := _MISSING.search(str(error))) is None or match[1] in tokens:
                raise ModelError(f"{name} is not made from its parts alone: {reason_of(error)}") from error
            tokens.append(match[1])
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{name} is not made from its parts alone: {reason_of(error)}") from error
        else:
            if not missing:
                return processor, ids
            texts += missing
    raise ModelError(f"{name} asks for ever more special tokens")


def _arguments(processor_class: type, config: Any, tokenizer: Any) -> dict[str, Any]:
    """Arguments of a processor's constructor: its parts by default, and settings that the configuration has, too."""
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
        elif name == "num_additional_image_tokens":
            arguments[name] = int(vision.model_type == "clip_vision_model")
        elif owner := next((owner for owner in (config, vision) if getattr(owner, name, None) is not None), None):
            arguments[name] = getattr(owner, name)
        elif name == "vision_feature_select_strategy":  # such classes always leave CLS out
            arguments[name] = "default"
        elif name in _TOKENS and (side := side_of(vision, "image_size")):
            arguments[name] = (side // side_of(vision, "patch_size") // _paired(config)) ** 2
    return arguments


def _picture_part(classes: Any, config: Any) -> Any:
    """An image or video processor with pictures of the tower's size, where that has one."""
    own = _PROCESSORS.get(config.model_type)
    kinds = [config.model_type, *(kind for kind, name in _PROCESSORS.items() if name == own)]
    known = next((classes[kind] for kind in kinds if classes.get(kind)), None)
    if known is None:
        raise ModelError("transformers names no processor of pictures or videos for it")
    name = known if isinstance(known, str) else known.get("torchvision") or known.get("pil")
    part = getattr(transformers, name)
    vision = getattr(config, "vision_config", None)
    side, patch = side_of(vision, "image_size"), side_of(vision, "patch_size")
    sizes: dict[str, Any] = {
        key: dict.fromkeys(value, side)
        for key in ("size", "crop_size", "max_image_size")
        if isinstance(value := getattr(part, key, None), dict)
        and value
        and (key == "max_image_size" or "longest_edge" not in value)
    }
    if isinstance(tile := getattr(part, "max_image_size", None), dict):  # a picture of as many tiles as by default
        sizes["size"] = {key: value // tile.get(key, value) * side for key, value in part.size.items()}
    grid = {
        key: getattr(vision, name)
        for key, name in _GRID.items()
        if hasattr(part, key) and isinstance(getattr(vision, name, None), int)
    }
    made = part(**(sizes if side else {}), **grid)
    if patch and getattr(made, "image_seq_length", 0) is None:  # a checkpoint's file says it
        made.image_seq_length = (side // patch) ** 2
    return made


def _tokenizer(tokens: Sequence[str], texts: Sequence[str]) -> Any:
    """A byte-level tokenizer with ChatML's markers, these named special tokens and these texts as special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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
