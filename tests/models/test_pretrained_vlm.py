"""Ready-made vision-language models: their own ids and logits, MoSLoRA in the language model, saved and loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import supervised_logits
from torch import nn
from vlm_runs import conversation, example_of, picture, recipe_for, write_records
from vlms import FAMILIES, make_vlm

from mm_moslora.batch import Batch
from mm_moslora.config import (
    AdapterConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.batching.padded_batch import PaddedCollator
from mm_moslora.models.export.export_huggingface import export_model
from mm_moslora.models.load_model import load
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vlm import part_of
from mm_moslora.serve.terminal_chat import Chat
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ConfigError, ModelError

SIZES = ((50, 70), (200, 40), (33, 90))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family, made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = make_vlm(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


def stock_inputs(assembly, family, image, question, answer):
    """What the processor itself makes of one question, one picture and one answer."""
    processor = assembly.processor
    if family == "paligemma":
        inputs = processor(images=[[image]], text=[f"<image>{question}"], suffix=[answer], return_tensors="pt")
        inputs.pop("labels")
        return inputs
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    return processor(images=[[image]], text=[text], return_tensors="pt", add_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_each_sample_the_logits_that_the_model_gives_its_processors_inputs(family, folders):
    assembly = load_parts(ModelConfig(vlm=str(folders(family))))
    image = picture(50, 70)
    sighted = example_of(assembly, conversation("<image>\nwhat color?"), [image])
    stock = stock_inputs(assembly, family, image, "what color?", "red")
    length = sighted.length
    assert stock["input_ids"][0, :length].tolist() == sighted.input_ids.tolist()
    blind = example_of(assembly, [*conversation("say red"), *conversation("is it red?", "yes")], name="b")
    several = example_of(assembly, conversation("<image>\n<image>\nsame?", "no"), [picture(40, 40), picture(30, 60)])
    with torch.no_grad():
        expected = assembly.model(**stock).logits[0, :length][:-1][sighted.supervised[1:]]
        alone = [supervised_logits(assembly.model, Batch.from_examples([item])) for item in (blind, sighted, several)]
        together = supervised_logits(assembly.model, Batch.from_examples([blind, sighted, several]))
    torch.testing.assert_close(alone[1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_trainers_get_the_loss_of_ours(family, folders):
    """The stock model on a collated batch, with an adapter around it as in `Trainer(model=peft_model)`."""
    config = ModelConfig(vlm=str(folders(family)))
    assembly = load_parts(config)
    examples = [
        example_of(assembly, conversation("<image>\nwhat color?"), [picture(50, 70)]),
        example_of(assembly, [*conversation("say red"), *conversation("is it red?", "yes")], name="b"),
        example_of(assembly, conversation("<image>\n<image>\nsame?", "no"), [picture(40, 40), picture(30, 60)]),
    ]
    batch = Batch.from_examples(examples)
    with torch.no_grad():  # attention of fresh weights is nearly uniform, whatever the positions
        for name, weight in assembly.model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(30)
    attach_adapters(assembly, config, AdapterConfig(rank=2))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(supervised_logits(assembly.model, batch), batch.targets)
        found = assembly.peft_model(
            **PaddedCollator(model=assembly.peft_model)([examples[0], None, *examples[1:]])
        ).loss
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_a_picture_are_known_from_its_size(family, folders):
    parts = load_parts(ModelConfig(vlm=str(folders(family))), weights="none")
    counted = [len(ids) for size in SIZES for ids in parts.image_processing.placeholders([size])]
    assert counted == [len(parts.image_processing.process([picture(*size)])[0].placeholders) for size in SIZES]
    pair = parts.image_processing.placeholders([(40, 40), (30, 60)])
    assert [len(p) for p in pair] == [
        len(s.placeholders) for s in parts.image_processing.process([picture(40, 40), picture(30, 60)])
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_tunes_the_language_model_alone_and_its_checkpoint_answers(family, folders, tmp_path):
    recipe = recipe_for(folders(family), write_records(tmp_path), tmp_path / "run")
    result = train(recipe)
    assert not (tmp_path / "run" / "quarantine.jsonl").read_text()
    adapter = json.loads((result.checkpoint / "manifest.json").read_text())["trainable"]
    assert adapter
    assert all("lora_" in name and part_of(name) == "language" for name in adapter)
    tuned = load(tmp_path / "run")
    base = load_parts(recipe.model)
    example = example_of(tuned, conversation("<image>\nwhat color?"), [picture(60, 40)])
    batch = Batch.from_examples([example])
    with torch.no_grad():
        merged = supervised_logits(tuned.model, batch)
        live = supervised_logits(load(tmp_path / "run", merge=False).model, batch)
        before = supervised_logits(base.model, batch)
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-4)
    assert (merged - before).abs().max() > 1e-3
    exported = export_model(tuned, tmp_path / "out")
    assert exported.stock
    assert exported.max_logit_difference < 1e-5
    picture(60, 40).save(tmp_path / "p.png")
    chat = Chat(load(tmp_path / "out"), max_new_tokens=3)
    chat.show(tmp_path / "p.png")
    assert isinstance(chat.ask("what color?"), str)


def test_a_processor_that_prepares_no_pictures_is_named(folders):
    processing = load_parts(ModelConfig(vlm=str(folders("qwen2_5_vl")))).image_processing
    processing.processor.image_processor.do_resize = False
    with pytest.raises(ModelError, match=r"Qwen2_5_VLProcessor prepares no picture of 33 x 47 pixels: .*do_resize"):
        processing.process([picture(33, 47)])


@pytest.mark.parametrize("mode", ["adapter", "last_n"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_a_projector_that_trains_beside_the_tower_comes_back(family, mode, folders, tmp_path):
    """Qwen-VL's lies in the tower and carries its adapters, too."""
    vision = VisionConfig(mode=mode, last_n=int(mode == "last_n"))
    options = {"vision": vision, "projector": ProjectorConfig(mode="full")}
    recipe = recipe_for(folders(family), write_records(tmp_path), tmp_path / "run", **options)
    recipe = replace(recipe, train=replace(recipe.train, vision_gradient_checkpointing=True))
    train(recipe)
    tuned, live = load(tmp_path / "run"), load(tmp_path / "run", merge=False)
    batch = Batch.from_examples([example_of(tuned, conversation("<image>\nwhat color?"), [picture(60, 40)])])
    with torch.no_grad():
        merged = supervised_logits(tuned.model, batch)
        torch.testing.assert_close(merged, supervised_logits(live.model, batch), rtol=0, atol=1e-4)
    base = load_parts(recipe.model)
    changed = {part_of(n) for (n, a), b in zip(tuned.model.named_parameters(), base.model.parameters(), strict=True)
               if not torch.equal(a, b)}  # fmt: skip
    assert changed == {"language", "vision", "projector"}
    assert export_model(tuned, tmp_path / "out").max_logit_difference < 1e-5


def test_a_system_prompt_goes_into_the_processors_template(folders):
    assembly = load_parts(ModelConfig(vlm=str(folders("qwen2_5_vl")), system_prompt="Be brief."))
    text = assembly.tokenizer.decode(example_of(assembly, conversation("say red")).input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vlm": "a", "language": "b"}, "name exactly one of them"),
        ({"language": "b", "quantisation": "nf4", "language_mode": "full"}, "weights of 4 or 8 bits do not train"),
        ({}, "name exactly one of them"),
        ({"vlm": "a", "vision": VisionConfig(name="clip")}, "brings its own"),
        ({"language": "a", "vision": VisionConfig()}, "brings its own"),
    ],
)
def test_a_recipe_names_either_parts_or_a_whole_model(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**options)


@pytest.mark.parametrize(
    ("kept", "lacking"),
    [
        ([], r"an image processor \(preprocessor_config\.json\) and a tokenizer \(tokenizer\.json\)"),
        (["tokenizer.json", "tokenizer_config.json"], r"an image processor \(preprocessor_config\.json\)\. Put"),
    ],
)
def test_a_model_without_its_processor_says_what_to_put_beside_it(kept, lacking, folders, tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors", *kept):
        if (folders("qwen2_vl") / name).is_file():
            shutil.copy(folders("qwen2_vl") / name, tmp_path / name)
    with pytest.raises(ModelError, match=rf"without {lacking}.*AutoProcessor") as caught:
        load_parts(ModelConfig(vlm=str(tmp_path)))
    assert "huggingface" not in str(caught.value)
