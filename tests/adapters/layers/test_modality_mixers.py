"""Mixers by modality: each token goes through its own, wherever the model runs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vlms import FAMILIES, make_vlm

from mm_moslora.adapters import (
    MoSLoRAConfig,
    MoSLoRALinear,
    add_moslora,
    export_adapter,
    load_adapter,
    mark_visual,
    merge,
    save_adapter,
    take_modality,
)
from mm_moslora.adapters.adapter_inspection import inspect_adapter
from mm_moslora.batch import Batch
from mm_moslora.cli import run
from mm_moslora.config import AdapterConfig, ModelConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.decoding.generation import generate, generate_beams, score_options
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.training.metrics.activation_memory import activation_memory
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import llama, llava, llava_inputs, train_a_bit
from tests.builders.tiny import supervised_logits
from tests.models.decoding.test_generation import alone, prompts
from tests.models.test_pretrained_vlm import conversation, example_of, picture

DECODER = "model.language_model"


def config(**options: object) -> MoSLoRAConfig:
    return MoSLoRAConfig(r=4, lora_alpha=8, mixer_form="by_modality", **options)


def adapted(**options: object) -> nn.Module:
    model = add_moslora(llava(), config(**options), component=DECODER, targets=["q_proj", "down_proj"])
    train_a_bit(model)
    return model


def layer_of(model: nn.Module) -> MoSLoRALinear:
    return next(layer for layer in model.modules() if isinstance(layer, MoSLoRALinear))


def updates(layer: MoSLoRALinear, x: Tensor) -> dict[str, Tensor]:
    """``s B M A x`` with either mixer, from the tensors alone."""
    mixer, z = layer.lora_mixer["default"], x @ layer.lora_A["default"].weight.T
    return {
        name: layer.scaling["default"] * (z @ getattr(mixer, name).T) @ layer.lora_B["default"].weight.T
        for name in ("text", "visual")
    }


def test_a_token_goes_through_the_mixer_of_its_modality() -> None:
    model = adapted()
    seen: list[tuple[Tensor, Tensor]] = []
    layer = layer_of(model)
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    inputs = llava_inputs()
    with torch.no_grad():
        model(**inputs)
        ((x, output),) = seen
        expected = updates(layer, x)
        visual = (inputs["input_ids"] == 3)[..., None]
        assert visual.sum() == 4
        update = output - layer.base_layer(x)
    assert not torch.allclose(expected["text"], expected["visual"], atol=1e-2)
    torch.testing.assert_close(update, torch.where(visual, expected["visual"], expected["text"]), atol=1e-5, rtol=1e-4)


def test_both_mixers_begin_as_the_dense_form_does_and_nothing_changes() -> None:
    torch.manual_seed(3)
    own = add_moslora(llava(), config(), component=DECODER, targets=["q_proj"])
    torch.manual_seed(3)
    dense = add_moslora(llava(), MoSLoRAConfig(r=4, lora_alpha=8), component=DECODER, targets=["q_proj"])
    mixer, other = (layer_of(model).lora_mixer["default"] for model in (own, dense))
    assert torch.equal(mixer.text, other.weight)
    assert torch.equal(mixer.visual, other.weight)
    inputs = llava_inputs()
    with torch.no_grad():
        assert torch.equal(own(**inputs).logits, llava()(**inputs).logits)


def test_gradients_of_checkpointed_layers_are_those_of_others() -> None:
    found = []
    for again in (False, True):
        model = adapted().train()
        if again:
            checkpointed(model)
        model(**llava_inputs()).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if "lora_mixer" in name})
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-7) for name in found[0])
    assert all(gradient.abs().max() > 0 for gradient in found[0].values())


def checkpointed(model: nn.Module) -> nn.Module:
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def test_a_checkpointed_layer_never_takes_the_input_of_another_pass() -> None:
    sighted, text = llava_inputs(), {"input_ids": torch.tensor([[5, 7, 8, 9, 10, 11, 12, 13]])}
    longer = {"input_ids": torch.tensor([[5, 7, 8, 9, 10, 11, 12, 13, 14]])}

    def gradients(model: nn.Module, *passes: dict[str, Tensor], between: dict[str, Tensor] | None = None) -> Tensor:
        model.zero_grad()
        total = sum(model(**inputs).logits.square().mean() for inputs in passes)
        if between is not None:
            with torch.no_grad():
                model(**between)
        total.backward()
        return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_mixer" in name])

    plain, again = adapted().train(), checkpointed(adapted())
    for passes in ((sighted,), (text,), (sighted, longer), (longer, sighted), (sighted, sighted)):
        torch.testing.assert_close(gradients(again, *passes), gradients(plain, *passes), atol=1e-6, rtol=1e-4)
    expected = gradients(plain, sighted)
    torch.testing.assert_close(gradients(again, sighted, between=text), expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(AdapterError, match="2 forward passes with 8 tokens each came before this backward pass"):
        gradients(again, sighted, text)
    torch.testing.assert_close(gradients(again, sighted), expected, atol=1e-6, rtol=1e-4)


def test_an_input_counts_for_its_own_pass_alone() -> None:
    model = adapted()
    decoder, embeddings = model.get_decoder(), torch.randn(1, 8, 32)
    with torch.no_grad():
        model(**llava_inputs())
        with pytest.raises(AdapterError, match="do not say which are visual"):
            decoder(inputs_embeds=embeddings)
        with pytest.raises(AdapterError, match="do not say which are visual"):
            decoder.forward(inputs_embeds=embeddings)
        ids = torch.tensor([[5, 7, 8]])
        found = decoder(input_ids=ids).last_hidden_state
        assert torch.equal(found, model.get_base_model().model(input_ids=ids).last_hidden_state)
    with pytest.raises(AdapterError, match=r"torch\.int64 \[8, 1\], expected bool \[1, 8\]"):
        mark_visual(embeddings, torch.ones(8, 1, dtype=torch.long))


def test_replicas_of_dataparallel_are_refused() -> None:
    replica = copy.deepcopy(adapted().get_base_model())
    for module in replica.modules():  # as torch makes them: tensors in the place of parameters
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, parameter.detach())
    with pytest.raises(AdapterError, match="does not run under torch's DataParallel"):
        replica(**llava_inputs())


@pytest.mark.parametrize("kind", ["assembled", "qwen2_vl"])
def test_a_plan_counts_what_is_kept(kind: str, tmp_path: Path, language_folder: Path, vision_folder: Path) -> None:
    settings = ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision_folder)))
    if kind != "assembled":
        settings = ModelConfig(vlm=str(make_vlm(tmp_path, kind)))
    dense, own = (
        activation_memory(settings, AdapterConfig(rank=4, alpha=8, mixer_form=form))
        for form in ("dense", "by_modality")
    )
    assert own.kept_per_layer >= dense.kept_per_layer > 0


def test_a_step_without_pictures_gives_the_visual_mixers_gradients_of_zero() -> None:
    model = adapted().train()
    model(torch.tensor([[5, 7, 8]])).logits.square().mean().backward()
    mixer = layer_of(model).lora_mixer["default"]
    assert mixer.visual.grad.abs().max() == 0
    assert mixer.text.grad.abs().max() > 0


@pytest.fixture(scope="module")
def assembly(language_folder: Path, vision_folder: Path):
    model = ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision_folder)))
    built = load_parts(model)
    attach_adapters(built, model, AdapterConfig(rank=4, alpha=8, mixer_form="by_modality"))
    train_a_bit(built.model)
    built.model.eval()
    return built


def test_decoding_and_packed_rows_agree_with_the_whole_model(assembly) -> None:
    given = prompts(assembly)
    model, options = assembly.model, [[5, 6], [9], [200, 4, 77]]
    assert generate(model, given, max_new_tokens=6, stop_ids=[]) == alone(model, given, 6, [])
    scores = score_options(model, given, [options] * len(given))
    for prompt, found in zip(given, scores, strict=True):
        for option, score in zip(options, found, strict=True):
            ids = torch.cat([prompt.input_ids, torch.tensor(option)])
            visual = ids == assembly.image_token_id
            embeddings = model.get_input_embeddings()(ids)
            if prompt.features is not None:
                embeddings = embeddings.masked_scatter(visual[:, None], prompt.features)
            with torch.no_grad():
                logits = model(inputs_embeds=mark_visual(embeddings[None], visual[None])).logits[0].log_softmax(-1)
            places = range(len(prompt.input_ids) - 1, len(ids) - 1)
            expected = sum(float(logits[place, token]) for place, token in zip(places, option, strict=True))
            assert score.logprob == pytest.approx(expected, abs=1e-4)


def test_packed_rows_of_lean_layers_read_as_conversations_alone(assembly) -> None:
    examples = [
        example_of(assembly, conversation("<image>\nwhat is it?", "a red square"), [picture(24, 20)], "a"),
        example_of(assembly, conversation("say blue", "blue"), [], "b"),
        example_of(assembly, conversation("<image>\nand this?", "blue"), [picture(20, 28, (20, 40, 200))], "c"),
    ]
    model = copy.deepcopy(assembly.model).train()  # its tokens are watched apart from those of the first
    assert use_lean_layers(model) == 2
    packed = supervised_logits(model, Batch.from_examples(examples)).detach()
    expected = []
    for example in examples:
        given = {"pixel_values": example.pictures[0].tensors["pixel_values"]} if example.pictures else {}
        with torch.no_grad():
            logits = assembly.model(input_ids=example.input_ids[None], **given).logits[0]
        expected.append(logits[:-1][example.supervised[1:]])
    torch.testing.assert_close(packed, torch.cat(expected), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ready_made_models_read_rows_as_conversations_alone(family: str, tmp_path: Path) -> None:
    settings = ModelConfig(vlm=str(make_vlm(tmp_path, family)))
    parts = load_parts(settings)
    attach_adapters(parts, settings, AdapterConfig(rank=4, alpha=8, mixer_form="by_modality"))
    train_a_bit(parts.model)
    examples = [
        example_of(parts, conversation("<image>\nwhat is it?", "a red square"), [picture(50, 70)], "a"),
        example_of(parts, conversation("say blue", "blue"), name="b"),
        example_of(parts, conversation("<image>\nand this?", "blue"), [picture(90, 40)], "c"),
    ]
    together = supervised_logits(parts.model.train(), Batch.from_examples(examples)).detach()
    with torch.no_grad():
        alone_ones = [supervised_logits(parts.model.eval(), Batch.from_examples([example])) for example in examples]
    torch.testing.assert_close(together, torch.cat(alone_ones), atol=2e-4, rtol=1e-3)
    for layer in parts.model.modules():
        if isinstance(layer, MoSLoRALinear):
            layer.lora_mixer["default"].visual.data.neg_()
    with torch.no_grad():
        turned = [supervised_logits(parts.model, Batch.from_examples([example])) for example in examples]
    assert torch.equal(turned[1], alone_ones[1])
    assert (turned[0] - alone_ones[0]).abs().max() > 1e-3


def test_the_mixer_of_a_visual_token_decides_the_answer_of_the_assembled_model(assembly) -> None:
    with_picture, text = prompts(assembly)[0], prompts(assembly)[3]
    before = [score_options(assembly.model, [prompt], [[[5, 6]]])[0][0].logprob for prompt in (with_picture, text)]
    kept = {}
    for layer in assembly.model.modules():
        if isinstance(layer, MoSLoRALinear):
            mixer = layer.lora_mixer["default"]
            kept[mixer] = mixer.visual.data
            mixer.visual.data = -mixer.visual.data
    after = [score_options(assembly.model, [prompt], [[[5, 6]]])[0][0].logprob for prompt in (with_picture, text)]
    for mixer, visual in kept.items():
        mixer.visual.data = visual
    assert after[1] == before[1]
    assert abs(after[0] - before[0]) > 1e-3


def test_beams_are_refused(assembly) -> None:
    with pytest.raises(AdapterError, match="do not say which are visual: those of a beam search"):
        generate_beams(assembly.model, prompts(assembly)[:1], beams=2, max_new_tokens=2, stop_ids=[])


@pytest.mark.parametrize("modality", ["text", "visual"])
def test_one_modality_is_a_plain_adapter(modality: str, tmp_path: Path, capsys) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "both")
    loaded = load_adapter(llava(), tmp_path / "both")
    inputs = llava_inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(AdapterError, match=r"'by_modality' depends on the layer's input.*adapters modality"):
        merge(loaded)
    out = tmp_path / modality
    assert run(["adapters", "modality", str(tmp_path / "both"), "--keep", modality, "--output", str(out)]) == 0
    assert f"the {modality} mixers" in capsys.readouterr().out
    for mixer in (layer.lora_mixer["default"] for layer in model.modules() if isinstance(layer, MoSLoRALinear)):
        mixer.text.data = mixer.visual.data = getattr(mixer, modality).data
    merged = load_adapter(llava(), out)
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)
    merge(merged)
    assert inspect_adapter(out)
    assert export_adapter(out, tmp_path / "peft", layout="peft").is_dir()
    with pytest.raises(AdapterError, match="has mixer_form 'dense', which is one for all tokens"):
        take_modality(out, tmp_path / "again", "text")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (llama, {"targets": ["q_proj"]}, "LlamaForCausalLM has no token in the place of a picture"),
        (llava, {"targets": ["q_proj"]}, "vision_tower.*q_proj is no layer of the decoder"),
        (llava, {"component": DECODER, "targets": ["embed_tokens"]}, "embed_tokens is no layer of the decoder"),
    ],
)
def test_models_and_places_without_visual_tokens_are_refused(model, options: dict, message: str) -> None:
    fresh = model()
    with pytest.raises(AdapterError, match=message):
        add_moslora(fresh, config(), **options)
    assert not any(isinstance(module, MoSLoRALinear) for module in fresh.modules())


def test_a_layer_that_sees_other_tokens_is_refused() -> None:
    model = adapted()
    with torch.no_grad():
        model(**llava_inputs())
        handle = layer_of(model).register_forward_pre_hook(lambda _, args: (args[0][:, :3],))
        with pytest.raises(AdapterError, match="a layer got 3 tokens, the model 8"):
            model(**llava_inputs())
        handle.remove()
        with pytest.raises(AdapterError, match="do not say which are visual"):
            model(inputs_embeds=torch.zeros(1, 3, 32))
