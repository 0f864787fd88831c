"""Mixers: how they start, what is refused, where they are left out, and what two-subspaces mixing is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import orthogonal

from mm_moslora.adapters import (
    MoSLoRAConfig,
    MoSLoRALinear,
    add_moslora,
    butterfly,
    delta_weight,
    fold,
    init_mixer,
    load_adapter,
    merge,
    save_adapter,
)
from mm_moslora.training.metrics.model_cost import FlopCounter, StepShape
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import llama, llava, llava_inputs, logits, train_a_bit, two_subspaces


def test_orthogonal_keeps_lengths() -> None:
    mixer = init_mixer(16, "orthogonal", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer @ mixer.T, torch.eye(16), atol=1e-5, rtol=0)


def test_kaiming_is_uniform_within_one_over_root_rank() -> None:
    mixer = init_mixer(64, "kaiming", generator=torch.Generator().manual_seed(0))
    assert mixer.abs().max() <= 1 / 8
    assert mixer.abs().max() > 0.95 / 8
    assert float(torch.linalg.svdvals(mixer).square().mean().sqrt()) == pytest.approx(3**-0.5, rel=0.05)


def test_butterfly_is_two_subspaces_mixing() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(6, 10), torch.randn(12, 6)
    torch.testing.assert_close(delta_weight(A, butterfly(6), B, 1.0), two_subspaces(A, B))
    assert int(torch.linalg.matrix_rank(butterfly(6))) == 3


def test_fold_has_the_same_update() -> None:
    torch.manual_seed(0)
    A, M, B = torch.randn(4, 10), torch.randn(4, 4), torch.randn(12, 4)
    torch.testing.assert_close(delta_weight(fold(A, M), None, B, 0.5), 0.5 * B @ M @ A)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixer_init": "zeros"}, "gradients of A, M and B are all exactly zero"),
        ({"mixer_init": "orthogonl"}, "Did you mean 'orthogonal'"),
        ({"mixer_init": "none"}, "mixer_init is 'none', expected one of orthogonal"),
        ({"factor_form": "mixd"}, "Did you mean 'mixed'"),
        ({"factor_form": "mixed", "init_lora_weights": "pissa"}, "product B A a meaning"),
        ({"use_dora": True}, "use_dora is set together with a mixer"),
        ({"mixer_pattern": {"q_proj": "zeros"}}, "mixer_pattern"),
        ({"mixer_pattern": "kaiming"}, "mixer_pattern is 'kaiming', expected a dictionary"),
        ({"mixer_pattern": {"(": "kaiming"}}, r"mixer_pattern\['\('\] .* no regular expression"),
        ({"mixer_pattern": {1: "kaiming"}}, "expected text"),
        ({"mixer_trainable": "yes"}, "mixer_trainable is 'yes', expected True or False"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        *(({"lora_dropout": rate}, "expected 0 <= lora_dropout < 1") for rate in (1.0, -0.1, float("nan"), "0.1")),
        ({"r": "16"}, "r is '16', expected a whole number"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "destroys"),
        ({"init_lora_weights": "lora_ga"}, "destroys"),
        ({"init_lora_weights": "mica", "mixer_init": "identity"}, "destroys"),
        ({"init_lora_weights": "pissa", "mixer_init": "identity", "mixer_pattern": {"q": "kaiming"}}, "destroys"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_and_contradicting_options_are_refused_with_the_reason(options: dict, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        MoSLoRAConfig(**options)


@pytest.mark.filterwarnings("ignore")
def test_loftq_is_refused() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    with pytest.raises(AdapterError, match="destroys"):
        MoSLoRAConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_meaningful_inits_are_fine_with_an_identity_mixer(init: str) -> None:
    assert MoSLoRAConfig(init_lora_weights=init, mixer_init="identity").init_lora_weights == init


def test_butterfly_needs_an_even_rank() -> None:
    with pytest.raises(AdapterError, match="even"):
        butterfly(5)


def layers(model: nn.Module) -> Iterator[MoSLoRALinear]:
    return (module for module in model.modules() if isinstance(module, MoSLoRALinear))


def test_a_pattern_leaves_modules_without_a_mixer(tmp_path: Path) -> None:
    model = add_moslora(llava(), MoSLoRAConfig(r=4, mixer_pattern={r"vision_tower\..*": "none"}), targets=["q_proj"])
    train_a_bit(model)
    mixed = {name.partition(".self_attn")[0] for name, _ in model.named_parameters() if "lora_mixer" in name}
    assert len(mixed) == 2
    assert all("language_model" in name for name in mixed)
    save_adapter(model.eval(), tmp_path / "a")
    with torch.no_grad():
        live = model(**llava_inputs()).logits
        loaded = load_adapter(llava(), tmp_path / "a", trainable=True).eval()
        assert torch.equal(loaded(**llava_inputs()).logits, live)
        torch.testing.assert_close(merge(model)(**llava_inputs()).logits, live, atol=1e-5, rtol=0)


def test_a_mixer_changes_no_start_of_a() -> None:
    """With one seed, LoRA and MoSLoRA begin at the same A in every layer."""

    def starts(**form) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = add_moslora(llama(), MoSLoRAConfig(r=4, **form), targets=["q_proj", "v_proj"])
        return [layer.factors("default").A.detach() for layer in layers(model)]

    plain = starts(mixer_pattern={".*": "none"})
    for init in ("orthogonal", "kaiming", "butterfly"):
        assert all(map(torch.equal, starts(mixer_init=init), plain))


def test_mixed_starts_are_a_fold_into_a(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = add_moslora(llama(), MoSLoRAConfig(r=4, mixer_init="identity", mixer_trainable=False), targets=["q_proj"])
    A = next(layers(plain)).factors("default").A.detach()
    torch.manual_seed(3)
    config = MoSLoRAConfig(r=4, factor_form="mixed", mixer_init="kaiming", target_modules=["q_proj", "embed_tokens"])
    model = add_moslora(llama(), config, targets=["q_proj"])
    layer = next(layers(model))
    assert not layer.lora_mixer
    mixed = layer.factors("default").A
    M = torch.linalg.lstsq(A.T, mixed.T).solution.T
    torch.testing.assert_close(M @ A, mixed, atol=1e-6, rtol=1e-4)
    assert (M - torch.eye(4)).abs().max() > 0.1
    assert M.abs().max() <= 0.5 + 1e-5  # kaiming: uniform within 1 / sqrt(R)
    save_adapter(model, tmp_path / "a")
    assert load_adapter(llama(), tmp_path / "a").peft_config["default"].factor_form == "mixed"
    embedded = add_moslora(llama(), config)
    assert torch.equal(logits(embedded), logits(llama()))


@pytest.mark.parametrize("way", ["save_adapter", "save_pretrained"])
@pytest.mark.parametrize("name", ["Sequential", "ParametrizedMixer"])
def test_a_module_in_the_place_of_a_mixer_is_refused_before_anything_is_written(
    way: str, name: str, tmp_path: Path
) -> None:
    """It trained and merged; its folder was one that no reader took, with a wrong fold."""
    model = add_moslora(llama(), MoSLoRAConfig(r=4), targets=["q_proj"])
    for layer in layers(model):
        if name == "Sequential":
            layer.lora_mixer["default"] = nn.Sequential(nn.Linear(4, 4, bias=False))
        else:
            orthogonal(layer.lora_mixer["default"])
    with pytest.raises(AdapterError, match=f"replaced by a {name}"):
        save_adapter(model, tmp_path / "a") if way == "save_adapter" else model.save_pretrained(tmp_path / "a")
    assert not list(tmp_path.glob("a/*.safetensors"))


def test_the_flops_of_a_mixer_are_those_of_its_product_with_b() -> None:
    """Beside an adapter without mixers, in one micro-batch: 8 per row of B and product."""
    shape = StepShape(tokens=14, pairs=56, supervised=12, images=0, micro_batches=1)

    def flops(**options: object) -> float:
        model = add_moslora(llama(), MoSLoRAConfig(r=4, **options), targets=["q_proj"])
        return FlopCounter(model.get_base_model()).count(shape).adapters

    assert flops() - flops(mixer_pattern={".*": "none"}) == 2 * 8 * 32 * 4 * 4


def test_forward_mode_derivatives_take_the_modules() -> None:
    """Dual numbers in the input, and in the factors."""
    model = add_moslora(
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double(), MoSLoRAConfig(r=3)
    ).double()
    train_a_bit(model)
    x, tangent = torch.randn(2, 3, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    step = 1e-6
    expected = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    M = next(layers(model)).lora_mixer["default"].weight
    name = next(name for name, parameter in model.named_parameters() if parameter is M)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(M.detach(), torch.ones_like(M))
        out = torch.func.functional_call(model, {name: dual}, (x,))
        assert forward_ad.unpack_dual(out).tangent.abs().max() > 0
