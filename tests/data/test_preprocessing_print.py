"""The fingerprint of the preprocessing: what agrees, what differs, where it is stored, and who compares it."""

from __future__ import annotations

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mm_moslora_eval.backends.open_model import open_model
from tiny import make_vision
from transformers import AutoProcessor
from vlms import FAMILIES, make_vlm

from mm_moslora.cli.cli_app import run as command
from mm_moslora.config import ModelConfig, VisionConfig
from mm_moslora.data.preprocessing_print import (
    check_preprocessing,
    compare,
    differences,
    preprocessing_of,
    probe_messages,
    probe_picture,
    stored_preprocessing,
    trained_videos,
    write_preprocessing,
)
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_huggingface import export_model
from mm_moslora.models.load_model import load
from mm_moslora.serve.served_models import load_models
from mm_moslora.serve.terminal_chat import Chat
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import DataError, ModelError
from mm_moslora.utils.run_paths import PREPROCESSING

ROOT = Path(__file__).parents[2]


def as_hf(folder):
    """What evaluation as `hf:FOLDER` finds: whether the preprocessing differs."""
    return open_model(f"hf:{folder}", other_preprocessing=True).name.endswith(", other preprocessing")


def stock_inputs(folder, **backend):
    """What a user of transformers gives the model."""
    processor = AutoProcessor.from_pretrained(folder, **backend)
    text = processor.apply_chat_template(probe_messages(), add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[[probe_picture()]], return_tensors="pt", add_special_tokens=False)


def exported(parts, folder):
    """An export with its fingerprint."""
    export_model(parts, folder)
    write_preprocessing(preprocessing_of(parts), folder)
    return folder


@pytest.fixture
def assembled(language_folder, vision_folder):
    def make(**model):
        return ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision_folder)), **model)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ready_made_model_agrees_with_its_export_and_with_its_own_processor(family, tmp_path):
    parts = load_parts(ModelConfig(vlm=str(make_vlm(tmp_path / "model", family))))
    folder = exported(parts, tmp_path / "export")
    assert not check_preprocessing(folder, load(folder))
    if family != "paligemma":  # has no chat template, so every program words its prompts itself
        assert compare(folder, stock_inputs(folder)) == []
        assert not as_hf(folder)


@pytest.mark.parametrize("aspect", ["pad", "resize", "crop", "anyres"])
def test_an_assembled_model_agrees_with_its_export_and_both_backends_of_its_processor(aspect, assembled, tmp_path):
    config = assembled(image_aspect=aspect)
    if aspect == "anyres":
        config = replace(config, vision=VisionConfig(name=str(make_vision(tmp_path / "clip", "clip"))))
    folder = exported(load_parts(config), tmp_path / "export")
    assert not check_preprocessing(folder, load(folder))
    for backend in ("pil", "torchvision"):
        assert compare(folder, stock_inputs(folder, backend=backend)) == []
    assert not as_hf(folder)


def test_a_language_model_alone_has_a_fingerprint_of_its_prompt(language_folder, tmp_path):
    folder = exported(load_parts(ModelConfig(language=str(language_folder))), tmp_path / "export")
    assert not check_preprocessing(folder, load(folder))
    stored = stored_preprocessing(folder)
    assert stored["tensors"] == {}
    assert stored["prompt"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_aspect": "resize"}, "pixel_values"),
        ({"image_aspect": "crop"}, "pixel_values"),
        ({"system_prompt": "Answer in French."}, "the prompt"),
        ({"chat_template": "v1"}, "the prompt"),
    ],
)
def test_other_pictures_and_prompts_differ_and_both_values_are_shown(change, named, assembled):
    own, other = (preprocessing_of(load_parts(config)) for config in (assembled(), assembled(**change)))
    assert differences(own, own) == []
    (line,) = differences(own, other)
    assert named in line
    assert re.search(" here, .* in training", line)


def test_the_statistics_of_pixels_and_the_order_of_colours_are_seen(assembled, tmp_path):
    folder = exported(load_parts(assembled()), tmp_path / "export")
    inputs = stock_inputs(folder)
    pixels = inputs["pixel_values"]
    assert compare(folder, {"pixel_values": pixels.flip(1)})
    assert compare(folder, {"pixel_values": pixels * 0.229 / 0.2686})  # the spread of CLIP in place of ImageNet's
    assert compare(folder, {"pixel_values": pixels[..., :-1]}) == [
        "pixel_values has shape [3, 28, 27] here, [3, 28, 28] in training"
    ]
    assert compare(folder, {"pixel_values": pixels.to(torch.bfloat16)}) == []
    assert compare(folder, {"pixel_values": [pixels[0].numpy()]}) == []
    assert compare(folder, {"input_ids": inputs["input_ids"][0].tolist()}) == []


def test_a_smaller_budget_of_pixels_is_refused_with_both_numbers_of_tokens(tmp_path):
    folder = exported(load_parts(ModelConfig(vlm=str(make_vlm(tmp_path / "model", "qwen2_5_vl")))), tmp_path / "export")
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            text = (folder / file).read_text().replace('"longest_edge": 7056', '"longest_edge": 3136')
            (folder / file).write_text(text)
    ids = stock_inputs(folder)["input_ids"]
    assert any("tokens here" in line for line in compare(folder, {"input_ids": ids}))
    expected = r"picture of 480x640 is 2 here, 6 in training.*Different settings: image.size.*3136.*7056.*--other-pre"
    with pytest.raises(ModelError, match=expected):
        check_preprocessing(folder, load(folder))


def rewritten(source, folder, file, change):
    """A copy of an export in which a JSON file was changed."""
    shutil.copytree(source, folder)
    data = json.loads((folder / file).read_text())
    change(data)
    (folder / file).write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """An export of Qwen2.5-VL with the budget of its own default."""
    folder = tmp_path_factory.mktemp("qwen")
    default = with_budget(make_vlm(folder / "model", "qwen2_5_vl"), folder / "default", 3136, 12_845_056)
    return exported(load_parts(ModelConfig(vlm=str(default))), folder / "export")


def with_budget(source, folder, least, most):
    def change(processor):
        processor["image_processor"]["size"] = {"shortest_edge": least, "longest_edge": most}

    return rewritten(source, folder, "processor_config.json", change)


@pytest.mark.parametrize(("least", "most"), [(3136, 4_000_000), (784, 12_845_056), (2352, 12_845_056)])
def test_budgets_and_floors_of_usual_sizes_are_refused_by_every_backend(least, most, qwen, tmp_path):
    folder = with_budget(qwen, tmp_path / "other", least, most)
    for check in (lambda: check_preprocessing(folder, load(folder)), lambda: open_model(f"hf:{folder}")):
        with pytest.raises(ModelError, match=r"number of tokens of a picture of (4096x4096|28x28|28x84) is"):
            check()


def test_another_end_of_answers_is_refused_by_every_backend(qwen, tmp_path):
    folder = rewritten(
        qwen, tmp_path / "other", "generation_config.json", lambda config: config.update(eos_token_id=[0])
    )
    for check in (lambda: check_preprocessing(folder, load(folder)), lambda: open_model(f"hf:{folder}")):
        with pytest.raises(ModelError, match=r"ids of tokens that end an answer is \[0, 2\] here, \[2\] in training"):
            check()


def with_template(source, folder, found, put):
    shutil.copytree(source, folder)
    template = folder / "chat_template.jinja"
    assert found in template.read_text()
    template.write_text(template.read_text().replace(found, put, 1))
    return folder


def test_a_template_that_differs_in_blanks_or_in_first_questions_is_refused(qwen, tmp_path):
    trims = with_template(qwen, tmp_path / "trims", "part['text'] }}", "part['text'] | trim }}")
    with pytest.raises(ModelError, match=r"a question alone \(\d+ tokens here"):
        check_preprocessing(trims, load(trims))
    # The project's own prompts do not ask how many messages there are.
    greets = with_template(qwen, tmp_path / "greets", "{% for", "{% if messages | length == 1 %}Hi{% endif %}{% for")
    for folder in (trims, greets):
        with pytest.raises(ModelError, match=r"a question alone \(\d+ tokens here"):
            open_model(f"hf:{folder}")


def test_a_checkpoint_keeps_it_and_chat_serve_eval_and_export_refuse_another(recipe, tmp_path, capsys):
    source = replace(recipe.data.train[0], video_frames=3)
    train(replace(recipe, data=replace(recipe.data, train=[source]), train=replace(recipe.train, steps=1)))
    run = tmp_path / "run"
    (checkpoint,) = run.glob("checkpoint-*")
    assert PREPROCESSING in json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert Chat.from_folder(run).video_frames == 3
    assert command(["export", str(run), str(tmp_path / "whole")]) == 0
    assert command(["export", str(run), str(tmp_path / "lora"), "--to", "lora"]) == 0
    assert command(["export", str(run), str(tmp_path / "vllm"), "--to", "vllm"]) == 0
    for name in ("whole", "lora", "vllm"):
        assert stored_preprocessing(tmp_path / name) == stored_preprocessing(run)
        assert trained_videos(tmp_path / name) == (3, None, False)
    assert compare(tmp_path / "whole", stock_inputs(tmp_path / "whole")) == []
    assert open_model(f"hf:{tmp_path / 'whole'}").name == f"hf:{tmp_path / 'whole'}"

    config = checkpoint / "config.yaml"
    config.write_text(config.read_text().replace("image_aspect: pad", "image_aspect: resize"))
    export = ["export", str(run), str(tmp_path / "other")]
    capsys.readouterr()
    assert command(export) == 1
    assert not (tmp_path / "other").exists()
    assert "image.do_pad is False here, True in training" in capsys.readouterr().err
    for use in (Chat.from_folder, load_models, lambda path, **more: open_model(str(path), **more)):
        with pytest.raises(ModelError, match=r"pixel_values.* here, .* in training.*--other-preprocessing"):
            use(run)
        use(run, other_preprocessing=True)
        assert "This is accepted" in capsys.readouterr().err
    assert open_model(str(run), other_preprocessing=True).name == f"{run}, other preprocessing"
    assert command([*export, "--other-preprocessing"]) == 0
    assert not check_preprocessing(tmp_path / "other", load(tmp_path / "other"))

    (checkpoint / PREPROCESSING).unlink()
    assert open_model(str(run)).name == str(run)
    with pytest.raises(DataError, match="to compare with"):
        compare(run, {"input_ids": [1]})


def test_an_export_whose_processor_was_changed_is_refused_as_hf(assembled, tmp_path):
    folder = exported(load_parts(assembled()), tmp_path / "export")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant", "<|im_start|>model"))
    with pytest.raises(ModelError, match=r"the prompt .* from token \d+ on"):
        open_model(f"hf:{folder}")
    assert open_model(f"hf:{folder}", other_preprocessing=True).name.endswith(", other preprocessing")


def damaged(**changes):
    """A fingerprint that is right but for these keys."""
    right = {"format": 1, "versions": {}, "settings": {}, "prompt": [], "tokens_per_picture": {}, "tensors": {}}
    return json.dumps(right | changes)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "prompt": [[1, 2]]}',
             '{"format": 1, "prompt": [], "tensors": {"a": 1}, "settings": {}, "versions": {}}',
             '{"format": 1, "prompt": [[1, 9999999999999, "a"]], "tensors": {}, "settings": {}, "versions": {}}',
             damaged(prompt=[[1, 10**9, "a"], [1, 1 - 10**9, "a"]]), damaged(prompt=[[1, "3", "a"]]),
             damaged(tensors={"a": {"shape": [1], "values": ["1.0", "x"]}}), damaged(tokens_per_picture={"1x1": []}),
             damaged(settings={"video_frames": 3}), damaged(settings={"video_frames": ["x"]}),
             damaged(settings={"video_frames": [10**9]}), damaged(settings={"video_frames": [-5]}),
             damaged(settings={"video_fps": [1e9]}), damaged(question=[[1, 10**9, "a"]]), damaged(stop_ids=["x"])],
)  # fmt: skip
def test_a_damaged_file_is_one_error_that_says_what_to_do(text, assembled, tmp_path):
    folder = exported(load_parts(assembled()), tmp_path / "export")
    (folder / PREPROCESSING).write_text(text)
    with pytest.raises(ModelError, match="delete this file"):
        compare(folder, {"input_ids": [1]})


def test_inputs_without_anything_to_compare_are_refused(assembled, tmp_path):
    folder = exported(load_parts(assembled()), tmp_path / "export")
    with pytest.raises(DataError, match="attention_mask; expected some of input_ids, pixel_values"):
        compare(folder, {"attention_mask": [1]})


def test_a_processor_that_refuses_the_probe_stops_nothing(assembled, caplog):
    parts = load_parts(assembled(), weights="none")
    parts.image_processing.process = None
    assert preprocessing_of(parts) == {}
    assert "no fingerprint" in caplog.text


def test_every_function_that_loads_a_trained_model_compares_its_preprocessing():
    lacking = []
    for path in [*(ROOT / "mm_moslora").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        loads = any(
            isinstance(node, ast.ImportFrom) and node.module == "mm_moslora.models.load_model"
            and "load" in [alias.name for alias in node.names]
            for node in ast.walk(tree)
        )  # fmt: skip
        for node in ast.walk(tree) if loads else ():
            if isinstance(node, ast.FunctionDef):
                calls = [call.func.id for call in ast.walk(node)
                         if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]  # fmt: skip
                if calls.count("load") and not calls.count("check_preprocessing"):
                    lacking.append(f"{path.name}: {node.name}")
    assert not lacking
