"""StelLA's steps in the engine are those of `keep_orthonormal`: both clip the loss's gradient, as published."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_moslora.adapters import MoSLoRAConfig, MoSLoRALayer, add_moslora, keep_orthonormal
from mm_moslora.training.engine import OptimizerSettings, TorchEngine
from mm_moslora.training.parameter_groups import ParameterGroup

RATE = 0.02


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 11), nn.Linear(11, 7)
        self.config, self.pictures = SimpleNamespace(hidden_size=5), SimpleNamespace(begin_step=lambda _: None)

    def forward(self, batch: Any, needs_vision: bool = False, right: Tensor | None = None) -> Tensor:
        return (self.down(torch.tanh(self.up(batch.x))) - batch.y).square().sum()


def micro_batch(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(6, 4, generator=generator), torch.randn(6, 7, generator=generator)
    batch = SimpleNamespace(x=x, y=y, supervised_tokens=6, loss_weight=6, tokens=6, images=0, ids=range(6))
    batch.to = lambda _: batch
    return batch


def factors(model: nn.Module) -> list[Tensor]:
    layers = (module for module in model.modules() if isinstance(module, MoSLoRALayer))
    return [factor for layer in layers for factor in layer.outer_factors("default")]


@pytest.mark.parametrize("largest", [None, 0.3])
def test_the_engine_takes_the_steps_of_keep_orthonormal(largest: float | None) -> None:
    model = add_moslora(Small(), MoSLoRAConfig(r=3, lora_alpha=6, factor_form="stella")).get_base_model()
    other = copy.deepcopy(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    group = ParameterGroup(
        name="adapter", names=tuple(name for name, _ in named), parameters=tuple(p for _, p in named), peak_lr=RATE,
        weight_decay=0.0,
    )  # fmt: skip
    settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=largest or 0.0)
    engine = TorchEngine(model, [group], settings)  # type: ignore[arg-type]
    trained = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    keep_orthonormal(other, optimizer)
    for step in range(5):
        batches = [micro_batch(2 * step), micro_batch(2 * step + 1)]
        optimizer.zero_grad()
        for batch in batches:
            (other(batch) / 12).backward()
        norm = nn.utils.clip_grad_norm_(trained, largest or math.inf)
        optimizer.step()
        assert engine.step(batches, 1.0).grad_norm == pytest.approx(float(norm), rel=1e-4)
    for found, expected in zip(factors(model), factors(other), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
