"""In and out: LLaVA's own layouts, XTuner's, and what cannot be expressed."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import make_vision
from transformers import AutoModelForCausalLM

from mm_moslora.adapters import load_adapter
from mm_moslora.config import ModelConfig, ProjectorConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_llava_checkpoint import export_original, original_state
from mm_moslora.models.importing.import_checkpoint import import_parts, whole_config
from mm_moslora.models.importing.import_xtuner import lora_settings, write_factors
from mm_moslora.models.vision.vision_tower import load_vision
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
def test_a_whole_llava_checkpoint_goes_out_and_comes_back(layout, assembly, tmp_path):
    assert export_original(assembly, tmp_path / "llava") == 0.0
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert (config["model_type"], config["mm_projector_type"]) == ("llava_llama", "mlp2x_gelu")
    names = load_file(tmp_path / "llava" / "model.safetensors").keys()
    assert {"lm_head.weight", "model.mm_projector.0.weight", "model.layers.0.self_attn.q_proj.weight"} <= names
    if layout == "bin":
        torch.save(load_file(tmp_path / "llava" / "model.safetensors"), tmp_path / "llava" / "pytorch_model.bin")
        (tmp_path / "llava" / "model.safetensors").unlink()
    imported = import_parts(tmp_path / "llava", tmp_path / "parts")
    assert (imported.kind, imported.projector, imported.largest_difference) == ("LLaVA, whole", "mlp2x_gelu", 0.0)
    torch.manual_seed(0)
    again = load_parts(whole_config(imported))
    torch.testing.assert_close(logits_of(again)[..., :384], logits_of(assembly)[..., :384], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("aspect", "theirs"), [("pad", "pad"), ("crop", "square"), ("resize", None)])
def test_how_pictures_become_squares_goes_out_and_comes_back(aspect, theirs, language_folder, clip, tmp_path):
    model = ModelConfig(language=str(language_folder), vision=VisionConfig(name=clip), image_aspect=aspect)
    whole = load_parts(model)
    if theirs is None:
        with pytest.raises(ModelError, match=r"squeezed ones.*--to llava or hf"):
            export_original(whole, tmp_path / "llava")
        return
    export_original(whole, tmp_path / "llava")
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["image_aspect_ratio"] == theirs
    again = load_parts(whole_config(import_parts(tmp_path / "llava", tmp_path / "parts")))
    picture = [Image.linear_gradient("L").convert("RGB").resize((60, 30))]
    for name, value in whole.image_processing.process(picture)[0].tensors.items():
        torch.testing.assert_close(again.image_processing.process(picture)[0].tensors[name], value)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("layout", ["llava", "xtuner"])
def test_a_projector_alone_starts_a_recipe(layers, layout, language_folder, clip, tmp_path):
    prefix, name = ("model.mm_projector.", "mm_projector.bin") if layout == "llava" else ("projector.model.", "it.pth")
    torch.manual_seed(0)
    shapes = [(64, 32), *[(64, 64)] * (layers - 1)]
    state = {f"{prefix}{2 * i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    state |= {f"{prefix}{2 * i}.bias": torch.randn(64) for i in range(layers)}
    torch.save({"state_dict": state, "meta": {"epoch": 1}} if layout == "xtuner" else state, tmp_path / name)
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
    extras = {f"base_model.model.{n}": v for n, v in original_state(assembly.model).items() if "mm_projector" in n}
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


class _Mixed(torch.nn.Module):
    """The layer of the MoSLoRA authors' fork of PEFT, from its definition."""

    def __init__(self, base, A, AB, B, scaling):
        super().__init__()
        self.base, self.A, self.AB, self.B, self.scaling = base, A, AB, B, scaling

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.AB.T @ self.B.T)


def _mixed(model, rank, scaling):
    """Put their layers into a model; gives the factors by module path and name."""
    found = {}
    for path, base in [(n, m) for n, m in model.named_modules() if n.endswith(("q_proj", "fc2", "down_proj"))]:
        A, AB, B = (torch.randn(s) / 4 for s in ((rank, base.in_features), (rank, rank), (base.out_features, rank)))
        found |= {f"{path}.lora_A": A, f"{path}.lora_AB": AB, f"{path}.lora_B": B}
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _Mixed(base, A, AB, B, scaling))
    return found


def _xtuner(folder, language, clip):
    """A checkpoint of XTuner with mixers in both parts, its configuration, and what its parts compute."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_pretrained(language)
    tower = load_vision(VisionConfig(name=clip))[0].eval()
    state = {"projector.model.0.weight": torch.randn(64, 32), "projector.model.0.bias": torch.randn(64)}
    start = "base_model.model."
    state |= {f"llm.{start}{name}.default.weight": value for name, value in _mixed(llm, 4, 2.0).items()}
    for name, value in _mixed(tower, 2, 0.25).items():  # earlier transformers had one more level of names
        state[f"visual_encoder.{start}vision_model.{name.removeprefix('vision_model.')}.default.weight"] = value
    torch.save({"state_dict": state, "meta": {"iter": 9}}, folder / "iter_9.pth")
    (folder / "config.py").write_text(
        "from peft import LoraConfig\nmodel = dict(type=LLaVAModel, freeze_llm=True,\n"
        "    llm_lora=dict(type=LoraConfig, r=4, lora_alpha=8, lora_use_mixer=True, lora_dropout=0.05, bias='none',\n"
        "        task_type='CAUSAL_LM'),\n"
        "    visual_encoder_lora=dict(type=LoraConfig, r=2, lora_alpha=0.5, lora_use_mixer=True, bias='none'))\n"
    )
    return state, llm, tower


def test_xtuners_factors_and_mixers_are_those_of_their_layers(language_folder, clip, tmp_path):
    _, llm, tower = _xtuner(tmp_path, language_folder, clip)
    imported = import_parts(
        tmp_path / "iter_9.pth", tmp_path / "parts", language=str(language_folder), vision=clip,
        xtuner_config=tmp_path / "config.py",
    )  # fmt: skip
    ids, pixels = torch.arange(5, 15)[None], torch.randn(1, 3, 32, 32)
    read = load_adapter(AutoModelForCausalLM.from_pretrained(language_folder), tmp_path / "parts" / "llm_adapter")
    seen = load_adapter(load_vision(VisionConfig(name=clip))[0], tmp_path / "parts" / "visual_encoder_adapter")
    made = load_parts(whole_config(imported))
    assert imported.projector == "mlp1x_gelu"
    with torch.no_grad():
        expected, features = llm(ids).logits, tower(pixels).last_hidden_state
        torch.testing.assert_close(read(ids).logits, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(seen(pixels).last_hidden_state, features, rtol=0, atol=2e-5)
        torch.testing.assert_close(made.model(input_ids=ids).logits[..., :-1], expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(made.model.model.vision_tower(pixels).last_hidden_state, features, rtol=0, atol=2e-4)
    assert (AutoModelForCausalLM.from_pretrained(language_folder)(ids).logits - expected).abs().max() > 0.05


V = "llm.base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: {n: v for n, v in s.items() if n != f"{V}AB.default.weight"}, "", "holds no lora_AB of .*layers.1"),
        (lambda s: s | {f"{V}A.default.weight": torch.ones(2, 64)}, "", "q_proj"),
        (lambda s: s | {f"{V}AB.default.bias": torch.ones(4)}, "", "not understood"),
        (lambda s: s, "lora_use_mixer=False", "holds mixers of llm, and llm_lora does not set"),
        (lambda s: s, "use_dora=True, lora_use_mixer=True", "no right reading"),
        (lambda s: s, "lora_use_mixer=True, lora_alpha=alpha", "no llm_lora=dict"),
        (lambda s: s, None, "--xtuner-config FILE.py"),
        (lambda s: s | {n.replace("base_model.model.", ""): 2 * v for n, v in s.items()}, "", "twice"),
    ],
)
def test_an_xtuner_checkpoint_that_is_not_understood_is_one_clear_error(
    change, config, message, language_folder, clip, tmp_path
):
    state, _, _ = _xtuner(tmp_path, language_folder, clip)
    torch.save(change({name: value for name, value in state.items() if "visual" not in name}), tmp_path / "iter_9.pth")
    text = (tmp_path / "config.py").read_text()
    if config:
        alpha = "" if "lora_alpha" in config else "lora_alpha=8, "
        (tmp_path / "config.py").write_text(text.replace("lora_alpha=8, lora_use_mixer=True", alpha + config))
    with pytest.raises(MoSLoRAError, match=message):
        import_parts(
            tmp_path / "iter_9.pth", tmp_path / "parts", language=str(language_folder),
            xtuner_config=None if config is None else tmp_path / "config.py",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        ("old = dict(llm_lora=dict(type=LoraConfig, r=4, lora_alpha=64))", "", "", "may change the values of llm_lora"),
        ("", "model.update(dict(llm_lora=dict(r=4, lora_alpha=64)))", "", "may change the values of llm_lora"),
        ("", "model['llm_lora']['lora_alpha'] = 64", "", "line 2 may change"),
        ("", "model.llm_lora.lora_alpha = 64", "", "line 2 may change"),
        ("", "cfg.merge_from_dict({'model.llm_lora.r': 2})", "", "line 2 may change"),
        ("_base_ = ['a.py']", "", "", "line 1 may change"),
        ("with read_base():\n    from .a import *", "", "", "line 1 may change"),
        ("", "", ", **{'r': 2}", "ValueError"),
        ("", "", ", lora_use_scale=True", "sets lora_use_scale to True, which is not understood"),
        ("same = dict(llm_lora=dict(type=LoraConfig, r=4, lora_alpha=8))", "text = 'llm_lora of 8'", "", None),
    ],
)
def test_a_configuration_of_xtuner_has_one_meaning_without_being_run(before, after, options, message, tmp_path):
    config = tmp_path / "config.py"
    model = f"model = dict(llm_lora=dict(type=LoraConfig, r=4, lora_alpha=8{options}))"
    config.write_text("\n".join(line for line in (before, model, after) if line))
    if message is None:
        assert lora_settings("llm", config) == {"r": 4, "lora_alpha": 8}
        return
    with pytest.raises(MoSLoRAError, match=message):
        lora_settings("llm", config)


def test_whole_weights_of_xtuner_are_finite_floats(language_folder, tmp_path):
    state = {"projector.model.0.weight": torch.ones(64, 32), "projector.model.0.bias": torch.ones(64)}
    for number, value in enumerate((torch.full((64,), float("nan")), torch.ones(64, dtype=torch.int8))):
        torch.save(state | {"llm.model.norm.weight": value}, tmp_path / "a.pth")
        with pytest.raises(ModelError, match=r"'model.norm.weight' holds (NaN|torch\.int8)"):
            import_parts(tmp_path / "a.pth", tmp_path / f"parts{number}", language=str(language_folder))


def test_modules_of_xtuner_that_share_a_tensor_are_written(tmp_path):
    shared = torch.ones(2, 2)
    folder = write_factors(
        "llm", {"a.lora_A.weight": shared, "b.lora_A.weight": shared}, tmp_path / "a",
        model=torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)}), settings={"r": 2},
    )  # fmt: skip
    assert len(load_file(folder / "adapter_model.safetensors")) == 2


def test_what_llava_has_no_place_for_is_refused_with_the_nearest_choice(language_folder, clip, tmp_path):
    siglip = str(make_vision(tmp_path / "siglip", "siglip"))
    other = load_parts(ModelConfig(language=str(language_folder), vision=VisionConfig(name=siglip)))
    with pytest.raises(ModelError, match=r"CLIP towers only, this one is siglip_vision_model.*--to llava or hf"):
        export_original(other, tmp_path / "out")
    linear = ModelConfig(
        language=str(language_folder), vision=VisionConfig(name=clip), projector=ProjectorConfig(kind="linear")
    )
    with pytest.raises(ModelError, match=r"mlp2x_gelu, not VlmForConditionalGeneration"):
        export_original(load_parts(linear), tmp_path / "out")


@pytest.mark.parametrize(
    ("state", "name", "message"),
    [
        ({"model.mm_projector.query": torch.ones(1)}, "a.bin", "no linear layer and no mlpNx_gelu"),
        ({"something": torch.ones(1)}, "a.bin", "holds no projector"),
        ({"projector.model.0.weight": torch.ones(2, 2)}, "a.pth", "a weight and a bias in each layer"),
        ({"projector.model.0.weight": torch.ones(2, 2), "projector.model.0.bias": torch.tensor([float("nan"), 1])},
         "a.pth", "'layers.0.bias' holds NaN"),
        ({"projector.model.0.weight": torch.ones(2, 2).int(), "projector.model.0.bias": torch.ones(2)},
         "a.pth", "holds torch.int32"),
        ({"mm_projector.0.weight": torch.ones(2, 2), "model.mm_projector.0.weight": torch.ones(2, 2)},
         "a.bin", "'0.weight' twice"),
        ({"projector.model.0.weight": torch.ones(2, 2), "projector.model.0.bias": torch.ones(2),
          "visual_encoder.x": torch.ones(1)}, "a.pth", "changes the vision tower; name the one.*--vision"),
        ({"projector.model.0.weight": torch.ones(2, 2), "projector.model.0.bias": torch.ones(2),
          "resampler.x": torch.ones(1)}, "a.pth", "'resampler.x', which is none of"),
        ({"projector.model.0.weight": torch.ones(2, 2), "projector.model.0.bias": torch.ones(2),
          "llm.model.norm.weight": torch.ones(64)}, "a.pth", "name the one it was trained from"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_taken_over_is_named(state, name, message, tmp_path):
    torch.save(state, tmp_path / name)
    with pytest.raises(ModelError, match=message):
        import_parts(tmp_path / name, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json", "model.safetensors"])
def test_no_link_out_of_the_source_is_followed(name, assembly, tmp_path):
    export_original(assembly, tmp_path / "llava")
    secret, file = tmp_path / "secret", tmp_path / "llava" / name
    file.replace(secret) if file.exists() else secret.write_text("{}")
    file.symlink_to(secret)
    with pytest.raises(MoSLoRAError, match="links out of"):
        import_parts(tmp_path / "llava", tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_files_of_other_names_and_the_names_of_code_stay_behind(assembly, tmp_path):
    export_original(assembly, tmp_path / "llava")
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
