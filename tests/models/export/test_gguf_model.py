"""GGUF: what transformers' own GGUF reader makes of the text file, what the mmproj file holds, and what is refused."""

from __future__ import annotations

import gguf
import pytest
import torch
from tiny import make_tokenizer, make_vision
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from vlm_runs import LANGUAGES, make_language_of

from mm_moslora.config import ModelConfig, ProjectorConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.gguf_model import export_gguf
from mm_moslora.utils.errors import ModelError


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(make_vision(tmp_path_factory.mktemp("clip"), "clip"))


def values(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("family", ["smollm2", "mistral", "qwen2.5", "qwen3"])
def test_transformers_reads_the_text_file_and_gives_the_same_logits(family, monkeypatch, tmp_path):
    if family == "qwen3":  # transformers' reader knows only the family's usual width of heads
        monkeypatch.setitem(LANGUAGES, family, lambda s: Qwen3ForCausalLM(Qwen3Config(**s, head_dim=128)))
    assembly = load_parts(ModelConfig(language=make_language_of(tmp_path / "language", family)))
    files = export_gguf(assembly, tmp_path / "out")
    assert (files.mmproj, files.largest_difference) == (None, 0.0)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, assembly.model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_the_tower_and_the_projector_go_into_a_file_of_their_own(half, language_folder, clip, tmp_path):
    assembly = load_parts(ModelConfig(language=str(language_folder), vision=VisionConfig(name=clip)))
    files = export_gguf(assembly, tmp_path / "out", half=half)
    assert files.largest_difference < (1e-3 if half else 1e-12)
    reader = gguf.GGUFReader(files.mmproj)
    names = {tensor.name for tensor in reader.tensors}
    # Layer -2 of three is the second; llama.cpp leaves out the last layer of a file that does not name its layer.
    assert not any(name.startswith("v.blk.2") or "post_ln" in name for name in names)
    found = values(reader)
    assert found["clip.vision.block_count"] == 2
    assert found["clip.vision.feature_layer"] == [2]
    assert not found["clip.use_gelu"]  # this one has OpenAI's quick GELU


def test_what_llama_cpp_has_no_place_for_is_refused(language_folder, clip, tmp_path):
    siglip = str(make_vision(tmp_path / "siglip", "siglip"))
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Whitespace

    odd = make_tokenizer()
    odd.backend_tokenizer.pre_tokenizer = Sequence([Whitespace(), ByteLevel(add_prefix_space=False)])
    odd.save_pretrained(make_language_of(tmp_path / "odd", "smollm2"))
    cases = [
        (ModelConfig(language=str(tmp_path / "odd")), "cut text into words as GPT-2"),
        (ModelConfig(language=make_language_of(tmp_path / "n", "gpt_neox")), "not gpt_neox"),
        (ModelConfig(language=str(language_folder), vision=VisionConfig(name=siglip)), "CLIP towers only"),
        (
            ModelConfig(
                language=str(language_folder),
                vision=VisionConfig(name=clip),
                projector=ProjectorConfig(kind="perceiver"),
            ),
            "one CLIP tower and mlp2x_gelu",
        ),
    ]
    for config, message in cases:
        with pytest.raises(ModelError, match=message):
            export_gguf(load_parts(config), tmp_path / "out")
