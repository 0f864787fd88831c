"""Quantised bases in the fused kernel: the numbers of the modules, and no dense weight between the two passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext

import peft
import pytest
import torch
from torch import Tensor, nn

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, merge, use_kernel
from mm_moslora.adapters.layers.base_weights import weight_of
from mm_moslora.adapters.layers.fused_linear import FusedLinear
from mm_moslora.models.meta_model import kept_bytes

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

WIDTH, INNER, TOKENS = 64, 192, 24
HALF, FULL = torch.bfloat16, torch.float32


def four_bit(layer: nn.Linear, *, compute: torch.dtype | None, quant: str = "nf4", nested: bool = True) -> nn.Module:
    options = {"quant_type": quant, "compress_statistics": nested}
    own = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=compute, **options)
    own.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=own, **options)
    own.bias = layer.bias
    return own.to("cpu")


def in_llm_int8(layer: nn.Linear) -> nn.Module:
    own = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    own.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    own.bias = layer.bias
    return own.to("cpu")


BASES: dict[str, Callable[[nn.Linear, torch.dtype], nn.Module]] = {
    "nf4": lambda layer, dtype: four_bit(layer, compute=dtype),
    "fp4": lambda layer, dtype: four_bit(layer, compute=dtype, quant="fp4"),
    "nf4 once": lambda layer, dtype: four_bit(layer, compute=dtype, nested=False),
}


class Block(nn.Module):
    """Three layers that read one input, and one that reads what they give."""

    def __init__(self, base: Callable[[nn.Linear, torch.dtype], nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = [nn.Linear(WIDTH, INNER, bias=bias).to(dtype) for bias in (True, False, True)]
        self.q_proj, self.k_proj, self.v_proj = (base(layer, dtype) for layer in made)
        self.out = base(nn.Linear(INNER, WIDTH).to(dtype), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x))


def adapted(kind: str = "nf4", dtype: torch.dtype = FULL, *, wide: bool = True, **options: object) -> peft.PeftModel:
    return with_adapter(Block(BASES[kind], dtype), wide=wide, **options)


def with_adapter(block: nn.Module, *, wide: bool = True, **options: object) -> peft.PeftModel:
    config = MoSLoRAConfig(**({"r": 8, "lora_alpha": 16} | options))
    torch.manual_seed(1)
    model = add_moslora(block, config, autocast_adapter_dtype=wide).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def rows(dtype: torch.dtype = FULL) -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def run(model: nn.Module, x: Tensor, *, seed: int = 3) -> dict[str, Tensor]:
    """Output and all gradients."""
    model.zero_grad(set_to_none=True)
    x.grad = None
    torch.manual_seed(seed)
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"y": y.detach(), "x": x.grad.clone()}


def error(found: Tensor, true: Tensor) -> float:
    if torch.equal(found, true):
        return 0.0
    return float((found.double() - true.double()).norm() / true.double().norm())


def layers(model: nn.Module) -> list[FusedLinear]:
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def exact(model: nn.Module) -> nn.Module:
    """The same model in float64, with the dequantised weights as plain ones."""
    twin = with_adapter(Block(lambda layer, _: layer, FULL))
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" in name}, strict=False)
    for layer, own in zip(layers(twin), layers(model), strict=True):
        base, plain = own.get_base_layer(), layer.get_base_layer()
        x = torch.zeros(1, own.in_features, dtype=getattr(base, "compute_dtype", None) or base.weight.dtype)
        plain.weight.data = weight_of(base, x)(FULL)
        if base.bias is not None:
            plain.bias.data = base.bias.detach()
    return twin.double()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", BASES)
def test_fused_layers_give_the_numbers_of_the_modules(kind: str, dropout: float) -> None:
    model, x = adapted(kind, lora_dropout=dropout), rows()
    with use_kernel(model, "reference"):
        stock = run(model, x)
    assert all(layer.fused_operands(x.expand(2, TOKENS, WIDTH)) is not None for layer in layers(model)[:3])
    fused = run(model, x)
    assert fused.keys() == stock.keys()
    assert len(fused) == 14
    for name, value in stock.items():
        assert fused[name].dtype == value.dtype
        assert error(fused[name], value) < 1e-5, name


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_in_half_precision_they_are_as_near_to_the_truth_as_the_modules(kind: str, wide: bool) -> None:
    model, x = adapted(kind, HALF, wide=wide), rows(HALF)
    truth = run(exact(model), x.detach().double().requires_grad_())
    with use_kernel(model, "reference"):
        stock = run(model, x)
    fused = run(model, x)
    assert fused["y"].dtype == stock["y"].dtype == HALF
    for name, value in truth.items():
        assert fused[name].dtype == stock[name].dtype
        assert error(fused[name], value) < max(2 * error(stock[name], value), 0.006), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", BASES)
def test_they_keep_less(kind: str, dropout: float) -> None:
    model, x = adapted(kind, HALF, lora_dropout=dropout), rows(HALF).repeat(16, 1, 1)
    with use_kernel(model, "reference"):
        stock = kept_bytes(lambda: model(x), model)
    assert kept_bytes(lambda: model(x), model) < 0.6 * stock


@pytest.mark.parametrize("stored", [FULL, HALF, torch.float16])
@pytest.mark.parametrize("compute", [FULL, HALF, torch.float16])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_a_weight_is_made_dense_with_the_values_that_bitsandbytes_multiplies_with(
    stored: torch.dtype, compute: torch.dtype, quant: str
) -> None:
    torch.manual_seed(0)
    base = four_bit(nn.Linear(WIDTH, INNER, bias=False).to(stored), compute=compute, quant=quant)
    columns = torch.eye(WIDTH, dtype=compute).requires_grad_()
    dense = weight_of(base, columns)(compute)
    assert torch.equal(dense, base(columns).t())
    assert base.weight.quant_state.dtype == stored
    if stored == compute:  # otherwise bitsandbytes multiplies with a value rounded otherwise in its backward pass
        base(columns).backward(torch.eye(INNER, dtype=compute)[:WIDTH])
        assert torch.equal(columns.grad, dense[:WIDTH])


def test_a_pass_makes_each_weight_dense_once_and_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    dequantise = bnb.functional.dequantize_4bit

    def counted(*args: object) -> Tensor:
        assert not any(ref() is not None for ref in made), "two dense weights at a time"
        dense = dequantise(*args)
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", counted)
    model, x = adapted(), rows()
    y = model(x)
    assert len(made) == 4
    y.sum().backward()
    assert len(made) == 8
    assert not any(ref() is not None for ref in made)


@pytest.mark.parametrize("autocast", [False, True])
def test_where_the_compute_dtype_is_not_the_inputs_the_modules_compute(autocast: bool) -> None:
    """A float32 model over a base that computes in bfloat16; under autocast to bfloat16 the kernel serves it, too."""
    block = Block(lambda layer, _: four_bit(layer, compute=HALF), FULL)
    model, x = with_adapter(block), rows()
    with torch.autocast("cpu", HALF) if autocast else nullcontext():
        assert (layers(model)[0].fused_operands(x) is not None) == autocast
        with use_kernel(model, "reference"):
            stock = run(model, x)
        fused = run(model, x)
    for name, value in stock.items():
        assert fused[name].dtype == value.dtype, name
        assert error(fused[name], value) < (0.02 if autocast else 1e-9), name
    with torch.autocast("cpu", torch.float16):
        assert layers(model)[0].fused_operands(x) is None


@pytest.mark.parametrize("kind", BASES)
def test_hooks_and_replaced_forwards_of_the_base_still_run(kind: str) -> None:
    model, x = adapted(kind), rows()
    seen = []
    handle = model.base_model.model.out.get_base_layer().register_forward_hook(lambda *_: seen.append("hook"))
    model(x)
    handle.remove()
    base = model.base_model.model.k_proj.get_base_layer()
    own = base.forward
    base.forward = lambda x: seen.append("forward") or own(x)
    model(x)
    assert seen == ["hook", "forward"]
    last = model.base_model.model.v_proj
    kind_of_base = type(last.get_base_layer())
    changed = {"forward": lambda self, x: seen.append("class") or kind_of_base.forward(self, x)}
    last.get_base_layer().__class__ = type("Changed", (kind_of_base,), changed)
    model(x)
    assert seen[2:] == ["forward", "class"]


def test_switching_disabling_and_merging_compute_as_the_modules_do() -> None:
    model, x = adapted(), rows()
    model.add_adapter("second", MoSLoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "out"]))
    nn.init.normal_(model.base_model.model.out.lora_B["second"].weight, std=0.2)

    def check() -> Tensor:
        with use_kernel(model, "reference"):
            stock = run(model, x)
        fused = run(model, x)
        for name, value in stock.items():
            assert error(fused[name], value) < 1e-5, name
        return fused["y"]

    first = check()
    model.set_adapter("second")
    assert error(check(), first) > 0.01
    model.base_model.set_adapter(["default", "second"])
    assert layers(model)[0].fused_operands(x) is None
    check()
    model.set_adapter("default")
    with model.disable_adapter():
        base = check()
    assert error(base, first) > 0.01
    model.merge_adapter()
    assert error(check(), first) < 0.3 * error(base, first)
    model.unmerge_adapter()
    assert error(check(), first) < 0.3 * error(base, first)
    assert isinstance(merge(model), Block)


def test_llm_int8_computes_as_its_library_does_with_the_mixer() -> None:
    model, x = with_adapter(Block(lambda layer, _: in_llm_int8(layer), FULL)), rows()
    assert all(layer.__class__.__name__ == "MoSLoRALinear8bit" for layer in model.base_model.model.children())
    found = run(model, x)
    assert sum("lora_mixer" in name for name in found) == 4


def test_evaluation_takes_the_librarys_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), rows()
    called = []
    monkeypatch.setattr(
        bnb, "matmul_4bit", lambda *args, own=bnb.matmul_4bit, **rest: called.append(1) or own(*args, **rest)
    )
    model(x)
    assert called == []
    with torch.no_grad():
        model.eval()(x[:1, :1])
    assert len(called) == 4


packs = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks weights only on a CPU with AVX512-BF16"
)


@packs
@pytest.mark.parametrize("kernel", ["fused", "reference"])
def test_training_after_an_evaluation_has_every_gradient(kernel: str) -> None:
    """bitsandbytes repacks weights in evaluation, and its kernel for that layout has no gradient."""
    torch.manual_seed(1)
    config = MoSLoRAConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "out"])
    model = peft.get_peft_model(Block(BASES["nf4"], FULL), config)
    x = rows()
    before = run(model.train(), x)
    with torch.no_grad():
        model.eval()(x.detach())
    state = model.base_model.model.out.get_base_layer().weight.quant_state
    assert not getattr(state, "packing_format_for_cpu", False), "an adapted layer keeps the usual layout"
    with use_kernel(model, kernel):
        after = run(model.train(), x)
    for name, value in before.items():
        assert error(after[name], value) < 0.02, name
