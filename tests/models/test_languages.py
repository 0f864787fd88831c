"""The test matrix: every language model, every tower and every projector at least once, built, trained with MoSLoRA on
text-only, one-image, several-image and video records, saved, loaded, exported and asked."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
import transformers as t
from safetensors.torch import save_file
from tiny import make_vision, supervised_logits
from vlm_runs import conversation, make_language_of, picture, recipe_for, vision_name, write_records

from mm_moslora.batch import Batch, Example
from mm_moslora.config import ModelConfig, ProjectorConfig, VisionConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.images.video_clip import Clip
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_huggingface import export_model
from mm_moslora.models.language_model import load_language
from mm_moslora.models.load_model import load
from mm_moslora.serve.terminal_chat import Chat
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ModelError, reason_of

# Language model, tower, projector: each tower and each projector with at least one language model.
MATRIX = [
    ("llama3", "clip", "mlp2x_gelu"),
    ("qwen2.5", "siglip", "pixel_shuffle"),
    ("qwen3", "dinov2", "mlp2x_gelu"),
    ("mistral", "dinov2_registers", "mlp3x_gelu"),
    ("gemma3", "siglip", "mlp2x_gelu"),
    ("phi3", "dinov3", "perceiver"),
    ("llama3", "vit", "linear"),
    ("smollm2", "open_clip", "avg_pool"),
    ("smollm3", "timm", "c_abstractor"),
    ("olmo2", "fused", "fused_mlp"),
    ("gpt_neox", "clip", "qformer"),
]


def vision_of(kind, folder):
    if kind == "fused":
        a, b = (str(make_vision(folder / name, name)) for name in ("dinov2", "siglip28"))
        return VisionConfig(name=a, fuse_with=b)
    folder.mkdir()
    if kind == "timm":  # a folder as timm publishes it: by name alone the weights would be random
        torch.manual_seed(1)
        tower = timm.create_model("test_vit", num_classes=0)
        save_file(tower.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text('{"architecture": "test_vit"}')
        return VisionConfig(name=str(folder))
    return VisionConfig(name=vision_name(kind, folder))


@pytest.mark.parametrize(("language", "tower", "projector"), MATRIX)
def test_a_combination_is_built_trained_saved_loaded_exported_and_asked(language, tower, projector, tmp_path):
    model = ModelConfig(
        language=make_language_of(tmp_path / "language", language),
        vision=vision_of(tower, tmp_path / "vision"),
        projector=ProjectorConfig(kind=projector, queries=4, depth=1),
    )
    recipe = dataclasses.replace(recipe_for("x", write_records(tmp_path), tmp_path / "run"), model=model)
    train(recipe)
    assert not (tmp_path / "run" / "quarantine.jsonl").read_text()
    tuned, live, fresh = load(tmp_path / "run"), load(tmp_path / "run", merge=False), load_parts(model)
    encoder = ConversationEncoder(
        tuned.tokenizer, image_token_id=tuned.image_token_id, tokens_per_image=tuned.tokens_per_image
    )  # fmt: skip
    examples = []
    for name, text, images in (
        ("text", "say red", []), ("one", "<image>\nwhat color?", [picture(60, 40)]),
        ("two", "<image>\n<image>\nsame?", [picture(40, 40), picture(30, 60)]),
        ("video", "<image><image><image>\nwhat color?", Clip(tmp_path / "images" / "clip.gif", "", 3).frames()),
    ):  # fmt: skip
        encoded = encoder.encode(conversation(text))
        seen = tuned.image_processing.process(images)
        examples.append(Example(id=name, input_ids=encoded.input_ids, supervised=encoded.supervised, pictures=seen))
    with torch.no_grad():
        alone = torch.cat([supervised_logits(tuned.model, Batch.from_examples([item])) for item in examples])
        mixed = supervised_logits(tuned.model, Batch.from_examples(examples))
        unmerged = supervised_logits(live.model, Batch.from_examples(examples))
        before = supervised_logits(fresh.model, Batch.from_examples(examples))
    torch.testing.assert_close(mixed, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed, unmerged, rtol=0, atol=1e-4)
    assert (mixed - before).abs().max() > 1e-3
    exported = export_model(tuned, tmp_path / "out")
    assert exported.max_logit_difference < 1e-5
    picture(60, 40).save(tmp_path / "p.png")
    answers = []
    for folder in (tmp_path / "run", tmp_path / "out"):
        chat = Chat.from_folder(folder, max_new_tokens=3)
        chat.show(tmp_path / "p.png")
        answers.append(chat.ask("what color?"))
    assert answers[0] == answers[1]


def test_a_model_without_a_tokenizer_says_why(tmp_path) -> None:
    """transformers gives the reasons as a list below a line that ends with a colon."""
    t.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^model\.language is .* does not load as .*: Couldn't .*: \(1\) a .*, .*\.$"):
        load_language(str(tmp_path), None, dtype=torch.float32)
    for config in (t.Qwen2Config(), t.GemmaConfig()):  # their empty tokenizers would make every text empty
        config.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="its tokenizer has no vocabulary"):
            load_language(str(tmp_path), None, dtype=torch.float32)
    assert reason_of(ValueError("one of: \n(1) a, \n(2) b. \nInstall c")) == "one of: (1) a, (2) b"
    assert reason_of(ValueError("nothing:")) == "nothing:"
