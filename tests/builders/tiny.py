"""Tiny models, tokenizers and records, made here: random weights from configurations, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """A byte-level BPE tokenizer with ChatML's markers and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = ["what is the color of the shape? red green blue circle square yes no user assistant system"] * 4
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def make_language(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A tiny Llama with tied embeddings and grouped-query attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_experts(folder: Path, *, layers: int = 2) -> Path:
    """A tiny Qwen3-MoE: four experts as stacked parameters, two for each token."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, moe_intermediate_size=32, head_dim=16,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_vision(folder: Path, kind: str = "dinov2") -> Path:
    """A tiny vision tower: dinov2, with registers or without (28 px, patch 7), clip, siglip, vit or dinov3 (32, 8)."""
    import torch
    import transformers as t

    torch.manual_seed(1)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    models = {
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**small, image_size=28, patch_size=7)),
        "dinov2_registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**small, image_size=28, patch_size=7)
        ),
        "dinov3": lambda: t.DINOv3ViTModel(
            t.DINOv3ViTConfig(**small, intermediate_size=64, image_size=32, patch_size=8, num_register_tokens=4)
        ),
        "vit": lambda: t.ViTModel(t.ViTConfig(**small, intermediate_size=64, image_size=32, patch_size=8)),
        "siglip28": lambda: t.SiglipVisionModel(
            t.SiglipVisionConfig(**small, intermediate_size=64, image_size=28, patch_size=7)
        ),
        "clip": lambda: t.CLIPVisionModel(
            t.CLIPVisionConfig(**small, intermediate_size=64, image_size=32, patch_size=8)
        ),
        "siglip": lambda: t.SiglipVisionModel(
            t.SiglipVisionConfig(**small, intermediate_size=64, image_size=32, patch_size=8)
        ),
    }
    models[kind]().save_pretrained(folder)
    return folder


COLOURS = {"red": (210, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 210)}


def make_records(folder: Path, count: int = 24, *, text_only_every: int = 4) -> Path:
    """LLaVA JSONL about plain coloured pictures, two turns each, every fourth without a picture."""
    import json

    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        colour = list(COLOURS)[index % 3]
        record = {"id": f"r{index}", "conversations": []}
        turns = [("what is the color?", colour), ("is it red?", "yes" if colour == "red" else "no")]
        if text_only_every and index % text_only_every == text_only_every - 1:
            turns = [("say red" + "!" * (index % 5), "red")]
        else:
            name = f"{index}.png"
            Image.new("RGB", (20 + index % 5, 20 + index % 7), COLOURS[colour]).save(folder / "images" / name)
            record["image"] = name
            turns[0] = ("<image>\n" + turns[0][0], turns[0][1])
        for question, answer in turns:
            record["conversations"] += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps(record))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def supervised_logits(model, batch, *, dummy=None):
    """Logits at the supervised positions of a batch, ``[K, C]``."""
    from mm_moslora.models.vlm import supervised_hidden

    return model.get_output_embeddings()(supervised_hidden(model, batch, dummy=dummy))
