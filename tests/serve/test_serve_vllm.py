"""The files of the vLLM recipe of docs/serving.md have the names that vLLM reads.

vLLM's LLaVA maps `model.language_model.` to `language_model.model.` and takes LoRA tensors of the linear layers below
it; names that match nothing are passed over in silence there, so they are checked here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import make_vision

from mm_moslora.adapters import add_moslora, export_adapter, save_adapter
from mm_moslora.adapters.moslora_config import MoSLoRAConfig
from mm_moslora.config import ModelConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_huggingface import export_model
from tests.eval.eval_data import picture

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def names(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def as_vllm(name: str) -> str:
    """A checkpoint's name of a language-model weight, old layout or new, as vLLM's module path."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    return name.removesuffix(".weight")


@pytest.fixture(scope="module", params=["clip", "siglip"])
def handed_over(request: Any, language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vllm")
    vision = make_vision(root / "vision", request.param)
    assembly = load_parts(ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision))))
    torch.manual_seed(0)
    assembly.peft_model = add_moslora(
        assembly.model, MoSLoRAConfig(r=4, lora_alpha=8, mixer_init="kaiming", rank_pattern={"o_proj": 2}),
        component="model.language_model",
    )  # fmt: skip
    save_adapter(assembly.peft_model, root / "adapter")
    export_adapter(root / "adapter", root / "for-vllm", layout="vllm")
    assembly.model = assembly.peft_model.unload()
    assembly.peft_model = None
    export_model(assembly, root / "base", require_stock=True)
    return root


def test_the_base_is_stock_llava_with_its_processor(handed_over: Path) -> None:
    config = json.loads((handed_over / "base" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["model_type"] == "llama"
    assert config["image_token_index"] if "image_token_index" in config else config["image_token_id"]
    files = {path.name for path in (handed_over / "base").iterdir()}
    assert {"preprocessor_config.json", "processor_config.json", "tokenizer.json"} <= files
    assert "chat_template.jinja" in files or json.loads((handed_over / "base" / "tokenizer_config.json").read_text())
    tops = {re.sub(r"^model\.", "", name).split(".")[0] for name in names(handed_over / "base" / "model.safetensors")}
    assert (
        {"language_model", "vision_tower", "multi_modal_projector"}
        <= tops
        <= {"language_model", "vision_tower", "multi_modal_projector", "lm_head"}
    )


def test_every_adapter_tensor_has_a_linear_layer_of_its_size(handed_over: Path) -> None:
    base = {as_vllm(name): shape for name, shape in names(handed_over / "base" / "model.safetensors").items()}
    adapter = names(handed_over / "for-vllm" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2  # two layers, seven linears, A and B
    for name, shape in adapter.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert found is not None, name
        module = as_vllm(found[1])
        assert module in base, f"{module} is no module of the base"
        assert module.rpartition(".")[2] in LINEARS
        assert shape == ((4, base[module][1]) if found[2] == "A" else (base[module][0], 4))


def test_the_adapter_configuration_is_one_that_vllm_accepts(handed_over: Path) -> None:
    config = json.loads((handed_over / "for-vllm" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert set(config["target_modules"]) == LINEARS
    assert config["r"] == config["lora_alpha"] == 4
    assert not config["rank_pattern"]
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert {path.name for path in (handed_over / "for-vllm").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_harness_gets_the_answers_of_the_folder_from_a_server(server: Any, models: Any) -> None:
    """This project's own server in the place of vLLM, which speaks the same protocol. It does not count stop tokens."""
    from mm_moslora_eval.backends.local_model import LocalModel
    from mm_moslora_eval.backends.open_model import open_model
    from mm_moslora_eval.protocol.model_interface import IMAGE, Message, Request

    first, second = (picture(1),), (picture(2),)
    questions = [("what color?", first), ("what color?", second), ("say yes", ()), ("red?", first)]
    requests = [
        Request(
            id=str(number), images=pictures, max_new_tokens=6,
            messages=(Message(role="user", content=(*([IMAGE] * len(pictures)), "\n" * bool(pictures) + text)),),
        )
        for number, (text, pictures) in enumerate(questions)
    ]  # fmt: skip
    backends = (open_model(f"openai:{server.url}/v1#tiny"), LocalModel(models.assembly, name="tiny", reference=True))
    asked, expected = (
        {number: (answer.text, answer.finish_reason) for number, answer in backend.generate(requests, batch_size=8)}
        for backend in backends
    )
    assert asked == expected
    assert len(set(expected.values())) == len(requests)
