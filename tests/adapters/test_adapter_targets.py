"""Targets are resolved inside their component, and nothing is adapted or skipped without a word."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from mm_moslora.adapters import MoSLoRAConfig, adapted_modules, add_method, add_moslora, resolve_targets
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import gpt2, llama, llava, llava_inputs, logits, train_a_bit

LANGUAGE, VISION = "model.language_model", "model.vision_tower"


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    paths = resolve_targets(llama())
    assert len(paths) == 14
    assert not any("lm_head" in path or "embed" in path for path in paths)
    assert len(resolve_targets(gpt2())) == 8


def test_all_linear_does_not_leave_experts_out_without_a_word() -> None:
    sizes = {"hidden_size": 32, "moe_intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(vocab_size=64, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, **sizes)
    model = Qwen3MoeForCausalLM(config)
    message = r"all-linear would leave out \d+% .*experts.*Linear layers here: q_proj, k_proj, v_proj, o_proj"
    for call in (
        lambda: add_moslora(model, MoSLoRAConfig(r=4)),
        lambda: add_moslora(model, MoSLoRAConfig(r=4, target_modules="all-linear"), component="model"),
        lambda: add_method(model, peft.HiraConfig(r=4), targets="all-linear"),
    ):
        with pytest.raises(AdapterError, match=message):
            call()
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert len(adapted_modules(add_moslora(model, MoSLoRAConfig(r=4), targets=names))) == 8


def test_component_anchors_shared_names() -> None:
    model = llava()
    both = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    assert len(both) == 4
    assert resolve_targets(model, LANGUAGE, ["q_proj"]) == [name for name in both if name.startswith(LANGUAGE)]
    assert len(resolve_targets(model, LANGUAGE)) == 14
    assert len(resolve_targets(model, VISION)) == 12


def test_regular_expression_matches_within_the_component() -> None:
    assert resolve_targets(llava(), LANGUAGE, r"layers\.1\..*\.(q|v)_proj") == [
        f"{LANGUAGE}.layers.1.self_attn.q_proj",
        f"{LANGUAGE}.layers.1.self_attn.v_proj",
    ]


@pytest.mark.parametrize(
    ("component", "targets", "words"),
    [
        (LANGUAGE, ["q_prj"], "Did you mean 'q_proj'"),
        (LANGUAGE, ["q_proj", "fc1"], "Target 'fc1' matches no module of 'model.language_model'"),
        (LANGUAGE, r".*\.nothing", "matches the targets"),
        ("model.languag_model", "all-linear", "Did you mean 'model.language_model'"),
        (LANGUAGE, ["self_attn"], "LlamaAttention, expected Linear"),
        (LANGUAGE, ["norm"], "LlamaRMSNorm, expected Linear, Embedding"),
        (f"{LANGUAGE}.norm", "all-linear", "No module of"),
    ],
)
def test_targets_that_do_not_fit_are_errors(component: str, targets: str | list[str], words: str) -> None:
    model = llava()
    with pytest.raises(AdapterError, match=words):
        add_moslora(model, MoSLoRAConfig(r=4), component=component, targets=targets)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_language_model_of_a_llava() -> None:
    model = llava()
    inputs = llava_inputs()
    with torch.no_grad():
        before = model(**inputs).logits
    adapted = add_moslora(model, MoSLoRAConfig(r=4, task_type="CAUSAL_LM"), component=LANGUAGE)
    with torch.no_grad():
        assert torch.equal(adapted(**inputs).logits, before)
        train_a_bit(adapted)
        assert not torch.equal(adapted(**inputs).logits, before)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 42
    assert all(LANGUAGE in name for name in trained)


def test_two_components_share_an_adapter_with_ranks_of_their_own() -> None:
    config = MoSLoRAConfig(
        r=8, rank_pattern={r"model\.vision_tower\..*": 4}, mixer_pattern={r".*vision_tower.*": "kaiming"}
    )
    rows = adapted_modules(add_moslora(llava(), config, component=[LANGUAGE, VISION]))
    assert len(rows) == 26
    for row in rows:
        inside = row.path.startswith(VISION)
        assert row.rank == (4 if inside else 8)
        assert row.mixer == ("kaiming" if inside else "orthogonal")
    first = next(row for row in rows if row.path == f"{LANGUAGE}.layers.0.mlp.down_proj")
    assert (first.in_features, first.out_features, first.scaling) == (48, 32, 1.0)
    assert first.parameters == 8 * 48 + 8 * 8 + 32 * 8


def test_rows_tell_plain_lora_and_frozen_mixers_apart() -> None:
    config = MoSLoRAConfig(r=4, mixer_init="identity", mixer_trainable=False, mixer_pattern={"v_proj": "butterfly"})
    rows = {row.path[-6:]: row for row in adapted_modules(add_moslora(llama(), config, targets=["q_proj", "v_proj"]))}
    assert (rows["q_proj"].mixer, rows["q_proj"].mixer_trainable) == ("none", False)
    assert (rows["v_proj"].mixer, rows["v_proj"].mixer_trainable) == ("butterfly", False)
    assert rows["q_proj"].parameters == 4 * 64


def test_multihead_attention_keeps_its_unreachable_projection() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert resolve_targets(model) == ["1"]
    with pytest.raises(AdapterError, match="never calls it"):
        resolve_targets(model, "", ["out_proj"])


class _Int8Linear(nn.Linear):
    """A stand-in for a quantised layer: a linear layer with a weight that is not floating point."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)


def test_quantised_layers_raise_and_never_become_plain_lora() -> None:
    model = nn.Sequential(nn.Linear(8, 8), _Int8Linear())
    with pytest.raises(AdapterError, match="quantised"):
        add_moslora(model, MoSLoRAConfig(r=2))


def test_a_taken_name_and_an_unwrapped_model_are_errors() -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4))
    before = logits(model)
    with pytest.raises(AdapterError, match="already"):
        add_moslora(model, MoSLoRAConfig(r=2))
    with pytest.raises(AdapterError, match="Pass the PeftModel"):
        add_moslora(model.get_base_model(), MoSLoRAConfig(r=2))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("options", "layers", "names"),
    [
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, ["1"], ["q_proj"]),
        ({"layers_to_transform": [1]}, ["1"], ["q_proj"]),
        ({"modules_to_save": ["layers.0.self_attn.q_proj"]}, ["1"], ["q_proj"]),
    ],
)
def test_options_that_take_targets_out_are_heard(options: dict, layers: list[str], names: list[str]) -> None:
    paths = [
        row.path for row in adapted_modules(add_moslora(llama(), MoSLoRAConfig(r=4, **options), targets=["q_proj"]))
    ]
    assert [path.split(".")[2] for path in paths] == layers
    assert [path.rpartition(".")[2] for path in paths] == names


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
def test_tied_adapters_of_embedding_and_head_are_refused() -> None:
    tied = llama(tie_word_embeddings=True)
    config = MoSLoRAConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    with pytest.raises(AdapterError, match="the tied head would need the embedding's mixer transposed"):
        peft.get_peft_model(tied, config)
    assert not any("lora" in name for name, _ in tied.named_modules())
