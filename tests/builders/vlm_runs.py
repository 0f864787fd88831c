"""Language models and towers of every family, and short runs of vision-language models on made records."""

from __future__ import annotations

import json

import torch
import transformers as t
from PIL import Image
from tiny import make_tokenizer, make_vision
from video_files import write_animation

from mm_moslora.batch import Example
from mm_moslora.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    SourceConfig,
    TrackConfig,
    TrainConfig,
)
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": None,
}  # fmt: skip


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


LANGUAGES = {
    "llama3": lambda s: t.LlamaForCausalLM(t.LlamaConfig(**s, rope_parameters=LLAMA3_ROPE)),
    "qwen2.5": lambda s: t.Qwen2ForCausalLM(t.Qwen2Config(**s, tie_word_embeddings=True)),
    "qwen3": lambda s: t.Qwen3ForCausalLM(t.Qwen3Config(**s, head_dim=32)),
    "mistral": lambda s: t.MistralForCausalLM(t.MistralConfig(**s, sliding_window=64)),
    "gemma3": lambda s: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**s, head_dim=32, sliding_window=64, layer_types=["sliding_attention", "full_attention"])
    ),
    "phi3": lambda s: t.Phi3ForCausalLM(t.Phi3Config(**s)),
    "smollm2": lambda s: t.LlamaForCausalLM(t.LlamaConfig(**s, tie_word_embeddings=True)),
    "smollm3": lambda s: t.SmolLM3ForCausalLM(t.SmolLM3Config(**s, no_rope_layer_interval=2)),
    "olmo2": lambda s: t.Olmo2ForCausalLM(t.Olmo2Config(**s)),
    "gpt_neox": lambda s: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**s)),
}


def make_language_of(folder, family):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LANGUAGES[family](SMALL | ids | {"vocab_size": len(tokenizer)}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}


def open_clip_folder(folder):
    from open_clip.model import _build_vision_tower
    from safetensors.torch import save_file

    torch.manual_seed(2)
    tower = _build_vision_tower(OPEN_CLIP["embed_dim"], OPEN_CLIP["vision_cfg"])
    save_file({f"visual.{k}": v.contiguous() for k, v in tower.state_dict().items()}, folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    return folder


def vision_name(kind, tmp_path):
    if kind == "open_clip":
        return f"open_clip:{open_clip_folder(tmp_path)}"
    if kind == "timm":
        return "timm:test_vit"
    return str(make_vision(tmp_path / kind, kind))


def picture(width, height, colour=(200, 30, 30)):
    """Noise, so that no tile is plain."""
    noise = Image.effect_noise((width, height), 60).convert("RGB")
    return Image.blend(noise, Image.new("RGB", (width, height), colour), 0.5)


def example_of(assembly, turns, images=(), name="a"):
    seen = assembly.image_processing.process(images)
    encoded = ConversationEncoder.of(assembly).encode(turns, pictures=[item.placeholders for item in seen])
    return Example(id=name, input_ids=encoded.input_ids, supervised=encoded.supervised, pictures=seen)


def conversation(text, answer="red"):
    return [Turn(role="user", text=text), Turn(role="assistant", text=answer)]


def write_records(folder):
    (folder / "images").mkdir()
    rows = []
    for index in range(8):
        row = {"id": f"r{index}", "conversations": [{"from": "human", "value": "say red"}]}
        if index == 4:
            write_animation(folder / "images" / "clip.gif", 6)
            row |= {"video": "clip.gif", "conversations": [{"from": "human", "value": "<video>\nwhat color?"}]}
        elif index % 4 != 3:
            picture(30 + 9 * index, 40).save(folder / "images" / f"{index}.png")
            row["image"] = [f"{index}.png"] * (1 + (index == 2))
            row["conversations"][0]["value"] = "<image>\n" * len(row["image"]) + "what color?"
        row["conversations"].append({"from": "gpt", "value": "red"})
        rows.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder / "train.jsonl"


def recipe_for(vlm, records, output, **model):
    return Recipe(
        model=ModelConfig(vlm=str(vlm), **model),
        adapter=AdapterConfig(rank=4, alpha=8, mixer_init="kaiming"),
        data=DataConfig(
            train=[SourceConfig(path=str(records), image_folder=str(records.parent / "images"), video_frames=3)]
        ),
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(output=str(output), steps=2, global_batch=4, micro_batch=4, zero="none", precision="fp32"),
        track=TrackConfig(trackers=[]),
    )
