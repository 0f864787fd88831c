"""What people try who come from PEFT, wrong or unusual: it works, or one line says why not and nothing is changed."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import peft
import pytest
import torch
import transformers as t
from torch import nn

from mm_moslora.adapters import MoSLoRAConfig, adapted_modules, add_moslora, load_adapter, merge, save_adapter
from mm_moslora.adapters.adapter_targets import resolve_targets
from mm_moslora.adapters.layers.uncalled_layers import why_not_called
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import IDS, llama, logits, train_a_bit

NAMES = ["q_proj", "v_proj"]


def config(**changes) -> MoSLoRAConfig:
    return MoSLoRAConfig(**({"r": 4, "lora_alpha": 8, "target_modules": NAMES, "task_type": "CAUSAL_LM"} | changes))


def adapted(**changes) -> peft.PeftModel:
    model = add_moslora(llama(), config(**changes))
    train_a_bit(model)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(adapted(), folder)
    return folder


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: add_moslora(llama(), peft.LoraConfig(r=4)),
            "is a LoraConfig, expected a MoSLoRAConfig. Plain LoRA is",
        ),
        (lambda: add_moslora(None, config()), "is a NoneType, expected a torch.nn.Module"),
        (lambda: add_moslora(llama(), config(), targets=[]), r"matches the targets \[\]"),
        (lambda: add_moslora(llama(), config(target_modules="q_proj")), r"names come as a list: \['q_proj'\]"),
        (lambda: add_moslora(llama(), config(), targets="(("), "targets is .* no regular expression"),
        (lambda: add_moslora(llama(), config(), adapter_name="a.b"), "name is 'a.b', expected text without a dot"),
        (
            lambda: add_moslora(nn.DataParallel(llama()), config()),
            "wrapped already .DataParallel.*Add the adapter first",
        ),
        (lambda: save_adapter(adapted().to("meta"), "nowhere"), "on the meta device"),
        (lambda: load_adapter(llama(), __file__), "is a file, expected an adapter folder"),
        (lambda: load_adapter(llama(), "someone/adapter"), "snapshot_download"),
    ],
)
def test_a_wrong_argument_is_one_line(call, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "Target 'v_porj' matches no module.*Did you mean 'v_proj'"),
        ({"mixer_pattern": {"k_proj": "kaiming"}}, r"mixer_pattern\['k_proj'\] matches none"),
        ({"rank_pattern": {"k_proj": 2}, "target_modules": r".*\.[qv]_proj"}, r"rank_pattern\['k_proj'\] matches none"),
        ({"mixer_pattern": {"q_proj": "kaiming"}, "target_modules": "all-linear"}, None),
    ],
)
def test_get_peft_model_refuses_names_that_match_nothing(options: dict, message: str | None) -> None:
    base = llama()
    if message is None:
        peft.get_peft_model(base, config(**options))
        return
    with pytest.raises(AdapterError, match=message):
        peft.get_peft_model(base, config(**options))
    assert torch.equal(logits(peft.get_peft_model(base, config())), logits(llama()))


def test_a_pattern_that_matches_nothing_names_the_modules_that_it_could_match() -> None:
    first = ", ".join(f"model.layers.{index}.self_attn.q_proj" for index in range(5))
    with pytest.raises(AdapterError) as caught:
        add_moslora(llama(num_hidden_layers=7), config(target_modules=["q_proj"], alpha_pattern={"k_proj": 4}))
    assert f"alpha_pattern['k_proj'] matches none of the 7 modules (the first: {first})." in str(caught.value)


def test_a_peft_model_is_not_wrapped_again() -> None:
    """What it saved named modules of no base."""
    model = adapted()
    live = logits(model)
    with pytest.raises(AdapterError, match="PeftModel already"):
        peft.get_peft_model(model, config())
    with pytest.raises(AdapterError, match="'v_porj' matches no module"):
        model.add_adapter("second", config(target_modules=["q_proj", "v_porj"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 32}, "rank 4 and scaling 8 there and rank 4 and scaling 2 in the folder"),
        ({"use_rslora": True}, "q_proj has rank 4 and scaling 4 there"),
        ({"r": 2}, "rank 2 and scaling .* there and rank 4"),
        ({"target_modules": ["q_proj"]}, "in other modules"),
    ],
)
def test_a_folder_does_not_take_the_place_of_an_adapter_that_computes_otherwise(
    saved: Path, options: dict, message: str
) -> None:
    model = adapted(**options)
    live = logits(model)
    with pytest.raises(AdapterError, match=f"'default' already, .*{message}.*another adapter_name"):
        load_adapter(model, saved)
    assert torch.equal(logits(model), live)


def test_a_merged_adapter_gets_no_new_values(saved: Path) -> None:
    model = adapted()
    model.merge_adapter()
    for load in (lambda: load_adapter(model, saved), lambda: model.load_adapter(saved, "default")):
        with pytest.raises(AdapterError, match="it is merged into the weights"):
            load()


def test_a_configuration_alone_leaves_the_weights_of_its_folder_alone(saved: Path, tmp_path: Path) -> None:
    """It took the folded factors for new ones, and the mixers were gone."""
    model = load_adapter(llama(), saved)
    model.save_pretrained(tmp_path / "a")
    model.peft_config["default"].save_pretrained(str(tmp_path / "a"))
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "a")), logits(model))
    for name in ("moslora.json", "moslora.safetensors"):
        (tmp_path / "a" / name).unlink()
    with pytest.raises(AdapterError, match=r"has no mixer for .*q_proj"):
        model.peft_config["default"].save_pretrained(str(tmp_path / "a"))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged or truncated"):
        model.peft_config["default"].save_pretrained(str(tmp_path / "a"))


def test_a_configuration_alone_comes_back_whole(tmp_path: Path) -> None:
    config(mixer_init="kaiming").save_pretrained(str(tmp_path))
    assert MoSLoRAConfig.from_pretrained(str(tmp_path)).mixer_init == "kaiming"
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).r == 4
    with pytest.raises(AdapterError, match=r"has moslora.json but no moslora.safetensors"):
        load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_saves_and_merges_as_the_model_in_it(wrap, tmp_path: Path) -> None:
    model = adapted(mixer_init="kaiming")
    save_adapter(wrap(model), tmp_path / "a")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "a")), logits(model))
    live = logits(model)
    torch.testing.assert_close(logits(merge(wrap(model))), live, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", [{}, {"mixer_init": "butterfly", "mixer_trainable": False}])
def test_copies_pickles_and_other_precisions_of_an_adapted_model_work(form: dict) -> None:
    model = adapted(**form)
    live = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(twin), live)
        twin.train()(IDS, labels=IDS).loss.backward()
        assert sum(p.grad is not None for p in twin.parameters()) == sum(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(logits(copy.deepcopy(model).bfloat16()).float(), live, atol=2e-2, rtol=0)
    half = copy.deepcopy(model).half().train()
    half(IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.requires_grad)
    meta = model.to("meta").to_empty(device="cpu")
    assert not any(tensor.is_meta for tensor in meta.state_dict().values())


def mamba(kind: str) -> t.PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    if kind == "mamba":
        return t.MambaForCausalLM(t.MambaConfig(**sizes))
    if kind == "mamba 2":
        return t.Mamba2ForCausalLM(t.Mamba2Config(**sizes, num_heads=8, head_dim=8, n_groups=1))
    return t.FalconMambaForCausalLM(t.FalconMambaConfig(**sizes))


WAYS = {
    "add_moslora": lambda model, targets: add_moslora(model, config(target_modules=None), targets=targets),
    "get_peft_model": lambda model, targets: peft.get_peft_model(model, config(target_modules=targets)),
}


@pytest.mark.parametrize("kind", ["mamba", "falcon mamba"])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_whose_weight_is_read_without_a_call_is_refused(kind: str, way: str) -> None:
    """Its adapter got no gradient, and merging it changed the model."""
    model = mamba(kind)
    names = list(model.state_dict())
    with pytest.raises(
        AdapterError, match=r"mixer\.dt_proj' cannot carry MoSLoRA: .*MambaMixer .* this layer's weight"
    ):
        WAYS[way](model, ["in_proj", "dt_proj"])
    assert list(model.state_dict()) == names
    assert not any("dt_proj" in path for path in resolve_targets(model))


@pytest.mark.parametrize("kind", ["mamba", "mamba 2", "falcon mamba"])
def test_the_layers_that_a_pass_does_not_call_are_refused(kind: str) -> None:
    model = mamba(kind)
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    called: set[str] = set()
    for path, module in linear.items():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    model(IDS)
    places = {path: path.rpartition(".") for path in linear}
    reasons = {path: why_not_called(model.get_submodule(parent), name) for path, (parent, _, name) in places.items()}
    uncalled = linear.keys() - called
    assert uncalled <= {path for path, reason in reasons.items() if reason}
    assert {path for path, reason in reasons.items() if reason and "never calls" in reason} <= uncalled


@pytest.mark.parametrize(("kind", "fused"), [("mamba", 3), ("mamba 2", 1), ("falcon mamba", 3)])
def test_all_linear_leaves_out_what_fused_kernels_read(kind: str, fused: int, caplog: pytest.LogCaptureFixture) -> None:
    """They take the weight in training and call no layer; PEFT refused out_proj with an error about its own names."""
    caplog.set_level("INFO", logger="mm_moslora")
    model = add_moslora(mamba(kind), config(target_modules=None))
    assert {row.path.rpartition(".")[2] for row in adapted_modules(model)} == {"in_proj"}
    assert f"all-linear leaves out {2 * fused} layers; their weight is read without a call" in caplog.text
    assert "out_proj" in caplog.text
    with pytest.raises(
        AdapterError, match=r"out_proj' cannot carry MoSLoRA: .* hands this layer's weight to a function"
    ):
        add_moslora(mamba(kind), config(target_modules=None), targets=["out_proj"])


@pytest.mark.parametrize("way", WAYS)
def test_embeddings_that_look_up_something_else_are_refused(way: str) -> None:
    """They took an adapter and ended the first step with a traceback."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = t.OPTForCausalLM(t.OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=32))
    names = list(model.state_dict())
    with pytest.raises(AdapterError, match=r"embed_positions'? cannot carry .*forward pass \(attention_mask, .*rows"):
        WAYS[way](model, ["embed_positions", "q_proj"])
    assert list(model.state_dict()) == names
    train_a_bit(WAYS[way](model, ["embed_tokens"]))


def test_scaled_word_embeddings_take_adapters() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    gemma = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**sizes, **heads))
    model = add_moslora(gemma.eval(), config(target_modules=["embed_tokens"]))
    train_a_bit(model)
    live = logits(model.eval())
    torch.testing.assert_close(logits(merge(model)), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("factor", "value", "tolerance", "message"),
    [
        ("lora_A", float("nan"), None, "lora_A of .*q_proj holds NaN or infinity.*Nothing was merged"),
        ("lora_mixer", float("inf"), None, "lora_mixer of .*q_proj holds NaN or infinity.*Nothing was merged"),
        ("lora_B", 1.0, 0.0, "changes its output by .*expected at most 0e.*taken out of the weights again"),
    ],
)
def test_a_merge_that_would_change_the_model_is_refused_and_the_base_stays(
    factor: str, value: float, tolerance: float | None, message: str
) -> None:
    model, base = adapted(), llama().state_dict()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if factor in name)[0, 0] = value
    with pytest.raises(AdapterError, match=message):
        merge(model, tolerance=tolerance)
    found = {name.replace("base_layer.", ""): weight for name, weight in model.get_base_model().state_dict().items()}
    for name, weight in base.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0)
