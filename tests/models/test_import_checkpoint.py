"""LLaVA's own layouts, and what cannot be taken over."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from llava_checkpoint import llava_state, write_llava_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_vision
from transformers import AutoModelForCausalLM

from mm_moslora.config import ModelConfig, ProjectorConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.import_checkpoint import import_parts, whole_config
from mm_moslora.utils.errors import ModelError, MoSLoRAError


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(make_vision(tmp_path_factory.mktemp("clip"), "clip"))


@pytest.fixture
def assembly(language_folder, clip):
    return load_parts(ModelConfig(language=str(language_folder), vision=VisionConfig(name=clip)))


def logits_of(assembly):
    (seen,) = assembly.image_processing.process([Image.linear_gradient("L").convert("RGB")])
    ids = torch.tensor([[*seen.placeholders, 5, 6, 7]])
    with torch.no_grad():
        return assembly.model(input_ids=ids, **seen.tensors).logits


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_whole_llava_checkpoint_is_imported(layout, assembly, tmp_path):
    write_llava_checkpoint(assembly, tmp_path / "llava")
    if layout == "bin":
        torch.save(load_file(tmp_path / "llava" / "model.safetensors"), tmp_path / "llava" / "pytorch_model.bin")
        (tmp_path / "llava" / "model.safetensors").unlink()
    imported = import_parts(tmp_path / "llava", tmp_path / "parts")
    assert (imported.kind, imported.projector, imported.largest_difference) == ("LLaVA, whole", "mlp2x_gelu", 0.0)
    torch.manual_seed(0)
    again = load_parts(whole_config(imported))
    torch.testing.assert_close(logits_of(again)[..., :384], logits_of(assembly)[..., :384], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("aspect", "theirs"), [("pad", "pad"), ("crop", "square")])
def test_how_pictures_become_squares_is_taken_over(aspect, theirs, language_folder, clip, tmp_path):
    model = ModelConfig(language=str(language_folder), vision=VisionConfig(name=clip), image_aspect=aspect)
    whole = load_parts(model)
    write_llava_checkpoint(whole, tmp_path / "llava", aspect=theirs)
    again = load_parts(whole_config(import_parts(tmp_path / "llava", tmp_path / "parts")))
    picture = [Image.linear_gradient("L").convert("RGB").resize((60, 30))]
    for name, value in whole.image_processing.process(picture)[0].tensors.items():
        torch.testing.assert_close(again.image_processing.process(picture)[0].tensors[name], value)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_a_projector_alone_starts_a_recipe(layers, nested, language_folder, clip, tmp_path):
    prefix, name = "model.mm_projector.", "mm_projector.bin"
    torch.manual_seed(0)
    shapes = [(64, 32), *[(64, 64)] * (layers - 1)]
    state = {f"{prefix}{2 * i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    state |= {f"{prefix}{2 * i}.bias": torch.randn(64) for i in range(layers)}
    torch.save({"state_dict": state, "meta": {"epoch": 1}} if nested else state, tmp_path / name)
    imported = import_parts(tmp_path / name, tmp_path / "parts")
    assert imported.largest_difference == 0.0
    weights = str(imported.folder / "projector.safetensors")
    projector = ProjectorConfig(kind=imported.projector, weights=weights)
    made = load_parts(ModelConfig(language=str(language_folder), vision=VisionConfig(name=clip), projector=projector))
    features = torch.randn(1, 16, 32)
    expected = features
    for index in range(layers):
        expected = torch.nn.functional.gelu(expected) if index else expected
        expected = expected @ state[f"{prefix}{2 * index}.weight"].T + state[f"{prefix}{2 * index}.bias"]
    torch.testing.assert_close(made.model.model.multi_modal_projector(features), expected, rtol=0, atol=1e-4)


def test_llavas_lora_folder_is_merged_into_its_base(assembly, language_folder, clip, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(language_folder)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    folder = tmp_path / "lora"
    tuned.save_pretrained(folder)
    extras = {f"base_model.model.{n}": v for n, v in llava_state(assembly.model).items() if "mm_projector" in n}
    torch.save(extras, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_tower": clip}))
    imported = import_parts(folder, tmp_path / "parts", language=str(language_folder))
    assert imported.kind == "LLaVA, LoRA"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "language")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = tuned.merge_and_unload()(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
    assert load_parts(whole_config(imported)).tokens_per_image == 16


@pytest.mark.parametrize(
    ("state", "name", "message"),
    [
        ({"model.mm_projector.query": torch.ones(1)}, "a.bin", "no linear layer and no mlpNx_gelu"),
        ({"something": torch.ones(1)}, "a.bin", "holds no projector"),
        ({"mm_projector.0.weight": torch.ones(2, 2)}, "a.bin", "a weight and a bias in each layer"),
        ({"mm_projector.0.weight": torch.ones(2, 2), "mm_projector.0.bias": torch.tensor([float("nan"), 1])},
         "a.bin", "'layers.0.bias' holds NaN"),
        ({"mm_projector.0.weight": torch.ones(2, 2).int(), "mm_projector.0.bias": torch.ones(2)},
         "a.bin", "holds torch.int32"),
        ({"mm_projector.0.weight": torch.ones(2, 2), "model.mm_projector.0.weight": torch.ones(2, 2)},
         "a.bin", "'0.weight' twice"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_taken_over_is_named(state, name, message, tmp_path):
    torch.save(state, tmp_path / name)
    with pytest.raises(ModelError, match=message):
        import_parts(tmp_path / name, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json", "model.safetensors"])
def test_no_link_out_of_the_source_is_followed(name, assembly, tmp_path):
    write_llava_checkpoint(assembly, tmp_path / "llava")
    secret, file = tmp_path / "secret", tmp_path / "llava" / name
    file.replace(secret) if file.exists() else secret.write_text("{}")
    file.symlink_to(secret)
    with pytest.raises(MoSLoRAError, match="links out of"):
        import_parts(tmp_path / "llava", tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_files_of_other_names_and_the_names_of_code_stay_behind(assembly, tmp_path):
    write_llava_checkpoint(assembly, tmp_path / "llava")
    for name in ("tokenizer_notes.txt", "generation_log.txt"):
        (tmp_path / "llava" / name).symlink_to("/etc/passwd")
    for name in ("config.json", "tokenizer_config.json"):
        file = tmp_path / "llava" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "evil.Evil"}}))
    imported = import_parts(tmp_path / "llava", tmp_path / "parts")
    written = [path for path in (tmp_path / "parts").rglob("*") if path.is_file()]
    assert not any("notes" in path.name or "log" in path.name for path in written)
    assert not any("auto_map" in path.read_text() for path in written if path.suffix == ".json")
    assert load_parts(ModelConfig(language=imported.language))


def test_a_pickle_of_anything_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"x": Evil()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ModelError, match="cannot be read as weights alone"):
        import_parts(tmp_path / "mm_projector.bin", tmp_path / "parts")
    assert not (tmp_path / "touched").exists()


def test_a_truncated_source_is_one_error(tmp_path):
    file = tmp_path / "mm_projector.safetensors"
    save_file({"mm_projector.0.weight": torch.ones(20, 20)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged or truncated"):
        import_parts(file, tmp_path / "parts")


def test_a_folder_without_weights_and_a_projector_without_parts_say_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="needs no import: put it into"):
        import_parts(tmp_path / "empty", tmp_path / "parts")
    torch.save({"model.mm_projector.weight": torch.ones(2, 2), "model.mm_projector.bias": torch.ones(2)},
               tmp_path / "mm_projector.bin")  # fmt: skip
    imported = import_parts(tmp_path / "mm_projector.bin", tmp_path / "parts2")
    assert imported.projector == "linear"
    with pytest.raises(ModelError, match="--vision, --language"):
        whole_config(imported)
