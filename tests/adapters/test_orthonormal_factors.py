"""StelLA (arXiv 2510.01938) against the published steps, written out on small matrices."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mm_moslora.adapters import MoSLoRAConfig, MoSLoRALinear, add_moslora, keep_orthonormal, use_kernel
from mm_moslora.utils.errors import AdapterError

WIDTH, RANK, ALPHA = 5, 3, 6


class Small(nn.Module):
    """Two linear layers of other widths than the model's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 11), nn.Linear(11, 7)
        self.config = SimpleNamespace(hidden_size=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def published(model: nn.Module, name: str, rate: float, form: str) -> dict[str, list[Tensor]]:
    """U, S and V of both layers after four steps of the algorithm: its own forward pass, gradients and optimiser."""
    kinds = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
    layers = [layer for layer in model.modules() if isinstance(layer, MoSLoRALinear)]
    values = [layer.factors("default") for layer in layers]
    U = [factors.B.detach().clone().requires_grad_() for factors in values]
    V = [factors.A.detach().T.clone().requires_grad_() for factors in values]
    S = [torch.eye(RANK).double() if form == "dense" else torch.ones(RANK).double() for _ in values]
    S = [middle.requires_grad_() for middle in S]
    optimizer = kinds[name]([*U, *S, *V], lr=rate, **({"momentum": 0.9} if name == "SGD" else {}))
    for x, y in batches():
        h = x
        for index, layer in enumerate(layers):
            middle = S[index] if S[index].ndim == 2 else torch.diag(S[index])
            base = layer.get_base_layer()
            h = h @ (base.weight + ALPHA / RANK * U[index] @ middle @ V[index].T).T + base.bias
            h = torch.tanh(h) if index == 0 else h
        optimizer.zero_grad()
        (h - y).square().mean().backward()
        before = {}
        for point in (*U, *V):
            before[point] = point.detach().clone()
            point.grad = point.grad - point.detach() @ point.grad.T @ point.detach()
        optimizer.step()
        with torch.no_grad():
            for point in (*U, *V):
                x0 = before[point]
                step = (point - x0) * math.sqrt(WIDTH / x0.shape[0])
                moved = x0 + step - x0 @ (x0.T @ step + step.T @ x0) / 2
                values_, vectors = torch.linalg.eigh(moved.T @ moved)
                point.copy_(moved @ vectors @ torch.diag(values_.rsqrt()) @ vectors.T)
    return {"U": U, "S": S, "V": V}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(6, size, generator=generator, dtype=torch.float64) for size in (4, 7))  # type: ignore[misc]
        for _ in range(4)
    ]


@pytest.mark.parametrize("kernel", ["fused", "reference"])
@pytest.mark.parametrize("form", ["dense", "diagonal"])
@pytest.mark.parametrize(("name", "rate"), [("SGD", 0.3), ("Adam", 0.05)])
def test_stella_takes_the_published_steps(name: str, rate: float, form: str, kernel: str) -> None:
    config = MoSLoRAConfig(r=RANK, lora_alpha=ALPHA, factor_form="stella", mixer_form=form)
    model = add_moslora(Small().double(), config).double()
    layers = [layer for layer in model.modules() if isinstance(layer, MoSLoRALinear)]
    for layer in layers:  # the start is the identity, and is not taken out of the base
        factors = layer.factors("default")
        assert torch.equal(factors.M, torch.eye(RANK).double())
        torch.testing.assert_close(layer.wide_delta("default"), ALPHA / RANK * factors.B @ factors.A)
        for factor in (factors.A, factors.B.T):  # drawn in float32
            factor.data.copy_(torch.linalg.qr(factor.T.double()).Q.T)
    expected = published(model, name, rate, form)
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(trained, lr=rate)
    keep_orthonormal(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        with use_kernel(model, kernel):  # type: ignore[arg-type]
            (model(x) - y).square().mean().backward()
        optimizer.step()
    for index, layer in enumerate(layers):
        factors = layer.factors("default")
        middle = expected["S"][index]
        found = {"U": factors.B, "V": factors.A.T, "S": factors.M}
        written = {"U": expected["U"][index], "V": expected["V"][index]}
        written["S"] = middle if middle.ndim == 2 else torch.diag(middle)
        for key, value in written.items():
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0, msg=f"{key} of layer {index}")
        assert (factors.M - torch.eye(RANK)).abs().max() > 1e-3


def test_steps_need_the_width_of_the_model() -> None:
    model = add_moslora(nn.Sequential(nn.Linear(4, 5)), MoSLoRAConfig(r=2, factor_form="stella"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(AdapterError, match=r"no module around 0 has a config.hidden_size"):
        keep_orthonormal(model, optimizer)
    keep_orthonormal(model, optimizer, width=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixer_form": "block_diagonal:2"}, "dense or diagonal"),
        ({"mixer_init": "kaiming"}, "own start of the mixer"),
        ({"mixer_trainable": False}, "needs a mixer that trains"),
    ],
)
def test_what_stella_is_not_defined_with_is_refused(options: dict, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        MoSLoRAConfig(r=4, factor_form="stella", **options)
