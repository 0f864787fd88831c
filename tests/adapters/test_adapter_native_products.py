"""Thin products by our kernels for CPUs: against float64, and where they are used."""

from __future__ import annotations

import pytest
import torch
from native_kernels import needs_kernels
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, native_products, use_native_kernels
from mm_moslora.adapters.native_products import inner, summed

SIZES = pytest.mark.parametrize(
    ("tokens", "width", "rank"), [(1, 16, 16), (7, 48, 32), (70, 80, 48), (201, 112, 64), (64, 1024, 16)]
)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run."""
    names: list[str] = []
    real = native_products.call

    def call(name: str, *arguments: object) -> None:
        names.append(name)
        real(name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(native_products, "call", call)
    return names


def near(found: Tensor, exact: Tensor) -> None:
    assert (found.double() - exact).norm() <= 1e-6 * exact.norm()


@needs_kernels
@SIZES
def test_tokens_by_a_factor_in_any_layout(tokens: int, width: int, rank: int, called: list[str]) -> None:
    torch.manual_seed(0)
    x, factor = torch.randn(tokens, width + 5)[:, 2 : width + 2], torch.randn(rank, width)
    exact = x.double() @ factor.double().t()
    for rows in (x, x.contiguous(), x.t().contiguous().t()):
        for layout in (factor.t(), factor.t().contiguous(), torch.stack((factor.t(), factor.t()), -1)[..., 0]):
            near(inner(rows, layout, native=True), exact)
    assert called == ["inner"] * 9


@needs_kernels
@SIZES
def test_tokens_by_tokens_in_any_layout(tokens: int, width: int, rank: int, called: list[str]) -> None:
    torch.manual_seed(0)
    u, y = torch.randn(tokens, rank + 3)[:, 1 : rank + 1], torch.randn(tokens, width)
    exact = u.double().t() @ y.double()
    for rows in (u, u.contiguous(), u.t().contiguous().t()):
        for others in (y, torch.cat((y, y), 1)[:, width:], y.t().contiguous().t()):
            near(summed(rows, others, native=True), exact)
    assert called == ["summed"] * 9


@needs_kernels
def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    x, factor, u = torch.randn(300, 176), torch.randn(176, 32), torch.randn(300, 32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 20):
            torch.set_num_threads(threads)
            found.append((inner(x, factor, native=True), summed(u, x, native=True)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_kernels
def test_everything_else_is_left_to_pytorch(called: list[str]) -> None:
    x, factor = torch.randn(8, 32), torch.randn(32, 16)
    others = [
        (x, factor, False), (x, torch.randn(32, 8), True), (x.double(), factor.double(), True),
        (x.bfloat16(), factor.bfloat16(), True), (x[:0], factor, True), (x.to("meta"), factor.to("meta"), True),
    ]  # fmt: skip
    for rows, columns, native in others:
        inner(rows, columns, native=native)
        summed(rows @ columns, rows, native=native)
    with FlopCounterMode(display=False) as counted:
        inner(x, factor, native=True)
    assert counted.get_total_flops() == 2 * 8 * 32 * 16
    summed(x @ factor, torch.randn(8, 24), native=True)
    assert called == []


@needs_kernels
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adapted_model_has_the_gradients_that_it_has_with_pytorchs_products(
    dropout: float, called: list[str]
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(64, 96, bias=False), "down": nn.Linear(96, 64, bias=False)})
    add_moslora(model, MoSLoRAConfig(r=16, lora_dropout=dropout, target_modules=["up", "down"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x = torch.randn(2, 33, 64, requires_grad=True)

    def found() -> dict[str, Tensor]:
        torch.manual_seed(1)
        output = model["down"](model["up"](x))
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad(output.square().sum(), [x, *trained.values()])
        return {"output": output.detach(), **dict(zip(["x", *trained], gradients, strict=True))}

    plain = found()
    assert called == []
    assert use_native_kernels(model) == 2
    ours = found()
    assert set(called) == {"inner", "summed"}
    for name, exact in plain.items():
        assert (ours[name] - exact).norm() <= 1e-5 * exact.norm(), name
