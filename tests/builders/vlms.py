"""Tiny ready-made vision-language models with their real processors, made here; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as t
from tiny import make_tokenizer

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "head_dim": 8, "bos_token_id": None,
}  # fmt: skip
CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{%- for message in messages -%}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}<image>\n{% endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _tokenizer(*special: str, **named: str):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    if named:
        tokenizer = t.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
            extra_special_tokens=named,
        )  # fmt: skip
    tokenizer.chat_template = None
    return tokenizer


def _text(kind: type, tokenizer, **more):
    return kind(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                **TEXT, **more)  # fmt: skip


def _llava():
    tokenizer = _tokenizer("<image>")
    size = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = t.LlavaProcessor(
        t.CLIPImageProcessor(**size), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=VICUNA,
    )  # fmt: skip
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**CLIP), text_config=_text(t.LlamaConfig, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor


def _llava_next():
    tokenizer = _tokenizer("<image>")
    pins = [[32, 64], [64, 32], [64, 64]]
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pins
    )
    processor = t.LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=VICUNA,
    )  # fmt: skip
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**CLIP), text_config=_text(t.MistralConfig, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pins,
    )  # fmt: skip
    return t.LlavaNextForConditionalGeneration(config), processor


def _llava_onevision():
    tokenizer = _tokenizer("<image>", "<video>")
    pins = [[32, 32], [32, 64], [64, 32], [64, 64]]
    size = {"height": 32, "width": 32}
    processor = t.LlavaOnevisionProcessor(
        t.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pins), tokenizer,
        t.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )  # fmt: skip
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**CLIP, vision_use_head=False), text_config=_text(t.Qwen2Config, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pins,
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), vision_feature_select_strategy="full",
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen_tokens():
    tokenizer = _tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{text}|>")
        for name, text in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    return tokenizer, ids


def _qwen_vl(name: str, text_config: type, vision: dict, sections: list[int], *, side: int = 28, **images: int):
    """A model and a processor of one of the families; `side` pixels make a visual token."""
    tokenizer, ids = _qwen_tokens()
    generation = "Qwen3VL" if name == "Qwen3VL" else "Qwen2VL"
    processor = getattr(t, f"{name}Processor")(
        t.Qwen2VLImageProcessor(size={"shortest_edge": side**2, "longest_edge": (3 * side) ** 2}, **images), tokenizer,
        getattr(t, f"{generation}VideoProcessor")(), chat_template=CHATML.replace("IMAGE", QWEN_IMAGE),
    )  # fmt: skip
    text = _text(text_config, tokenizer).to_dict()
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}}
    text.pop("model_type")
    config = getattr(t, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(t, f"{name}ForConditionalGeneration")(config), processor


def _qwen2_5_vl():
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
              "fullatt_block_indexes": [1], "window_size": 56}  # fmt: skip
    return _qwen_vl("Qwen2_5_VL", t.Qwen2Config, vision, [1, 1, 2])


def _qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return _qwen_vl("Qwen2VL", t.Qwen2Config, vision, [1, 1, 2])


def _qwen3_vl():
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
              "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    return _qwen_vl("Qwen3VL", t.Qwen3Config, vision, [2, 1, 1], side=32, patch_size=16)


def _idefics_parts(kind: str):
    """Tokenizer, processor and the settings of a configuration, as Idefics3 and SmolVLM share them."""
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = _tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows)
    tokenizer.eos_token = "<end_of_utterance>"
    images = getattr(t, f"{kind}ImageProcessor")(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    side = {"longest_edge": 32}
    videos = [t.SmolVLMVideoProcessor(size=side, max_image_size=side, num_frames=64, fps=1)]
    processor = getattr(t, f"{kind}Processor")(
        images, tokenizer, *(videos if kind == "SmolVLM" else []), image_seq_len=4, chat_template=SMOL
    )
    settings = {
        "vision_config": CLIP, "text_config": _text(t.LlamaConfig, tokenizer), "scale_factor": 2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return processor, settings


def _smolvlm():
    processor, settings = _idefics_parts("SmolVLM")
    return t.SmolVLMForConditionalGeneration(t.SmolVLMConfig(**settings)), processor


def _idefics3():
    processor, settings = _idefics_parts("Idefics3")
    return t.Idefics3ForConditionalGeneration(t.Idefics3Config(**settings)), processor


def _internvl():
    tokenizer = _tokenizer(
        "<img>", "</img>", "<IMG_CONTEXT>", "<video>", start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    images = t.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = t.InternVLProcessor(
        images, tokenizer, t.InternVLVideoProcessor(size=size), image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )  # fmt: skip
    vision = t.InternVLVisionConfig(**{**CLIP, "image_size": [32, 32], "patch_size": [8, 8]})
    config = t.InternVLConfig(
        vision_config=vision, text_config=_text(t.Qwen2Config, tokenizer), image_seq_length=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip
    return t.InternVLForConditionalGeneration(config), processor


def _paligemma():
    tokenizer = _tokenizer("<image>")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    images = t.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, tokenizer)
    text = _text(t.GemmaConfig, processor.tokenizer)
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**CLIP, vision_use_head=False), text_config=text, projection_dim=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return t.PaliGemmaForConditionalGeneration(config), processor


FAMILIES = {
    "llava": _llava, "llava_next": _llava_next, "llava_onevision": _llava_onevision, "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "smolvlm": _smolvlm, "idefics3": _idefics3,
    "internvl": _internvl, "paligemma": _paligemma,
}  # fmt: skip


def make_video_vlm(folder: Path, family: str) -> Path:
    """A model whose chat template has a place for videos; that of SmolVLM's processor has one of its own."""
    return make_vlm(
        folder, family, parts=PARTS.replace("{% else %}", "{% elif part['type'] == 'video' %}VIDEO{% else %}")
    )


def make_vlm(folder: Path, family: str, *, parts: str = PARTS) -> Path:
    """Save one tiny model with its processor."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    if parts != PARTS and family != "smolvlm":
        image = processor.image_token if family == "internvl" else QWEN_IMAGE
        video = processor.video_token if family == "internvl" else QWEN_IMAGE.replace("image", "video")
        processor.chat_template = CHATML.replace(PARTS, parts).replace("IMAGE", image).replace("VIDEO", video)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
