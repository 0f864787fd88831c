"""`train.compile`: compiled layers give the numbers of the others, and what cannot be compiled is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_language
from transformers import AutoModelForCausalLM

from mm_moslora.config import Recipe
from mm_moslora.models.memory_efficient.kernel_selection import compile_layers, use_lean_layers
from mm_moslora.training.preflight import check_zero
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ConfigError


def compiled(recipe: Recipe, backend: str, **changes: object) -> Recipe:
    return replace(recipe, train=replace(recipe.train, compile=backend, steps=2, rehearsal=False, **changes))


def numbers(recipe: Recipe) -> list[float]:
    lines = [json.loads(line) for line in (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if "loss" in line for key in ("loss", "grad_norm")]


@pytest.mark.slow
def test_compiled_layers_give_the_numbers_of_the_others(recipe: Recipe, tmp_path: Path) -> None:
    torch.compiler.reset()
    plain = replace(recipe, train=replace(recipe.train, steps=2, rehearsal=False, output=str(tmp_path / "plain")))
    train(plain)
    seen = noting("noting")
    recipe = compiled(recipe, "noting")
    train(recipe)
    assert numbers(recipe) == pytest.approx(numbers(plain), rel=1e-5)
    # Batches of other lengths use the same graphs: far fewer than two steps of two layers would need.
    assert 0 < len(seen) <= 30
    assert not any(_has_products(graph) for graph in seen)


def noting(name: str) -> list[torch.fx.GraphModule]:
    """Registers a backend that runs graphs as they are, and notes them."""
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(graph)
        return graph.forward

    torch._dynamo.register_backend(backend, name=name)
    return seen


def _has_products(graph: torch.fx.GraphModule) -> bool:
    products = ("linear", "mm", "addmm", "matmul")
    return any(getattr(node.target, "__name__", "") in products for node in graph.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("lean", [True, False])
def test_layers_that_are_computed_again_are_compiled_and_give_the_same_numbers(
    recipe: Recipe, tmp_path: Path, lean: bool
) -> None:
    torch.compiler.reset()
    language = str(make_language(tmp_path / "language", layers=1))
    recipe = replace(recipe, model=replace(recipe.model, language=language, lean_layers=lean))
    if not lean:  # compiled whole they draw other masks
        recipe = replace(recipe, adapter=replace(recipe.adapter, dropout=0.0))
    plain = replace(recipe, train=replace(recipe.train, steps=2, rehearsal=False, output=str(tmp_path / "plain")))
    train(plain)
    calls = {"graphs": 0, "runs": 0}

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls["graphs"] += 1

        def run(*arguments: torch.Tensor) -> object:
            calls["runs"] += 1
            return graph.forward(*arguments)

        return run

    torch._dynamo.register_backend(backend, name=f"counting_{lean}")
    if lean:
        train(compiled(recipe, f"counting_{lean}", output=str(tmp_path / "once")))
    once = dict(calls)
    torch.compiler.reset()
    recipe = compiled(recipe, f"counting_{lean}", gradient_checkpointing=True)
    train(recipe)
    assert numbers(recipe) == pytest.approx(numbers(plain), rel=1e-5)
    assert 0 < calls["graphs"] - once["graphs"] <= 40
    assert calls["runs"] - once["runs"] > 1.3 * once["runs"]


@pytest.mark.slow
def test_a_lean_layer_that_falls_back_while_training_runs_its_stock_form_compiled(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = AutoModelForCausalLM.from_pretrained(make_language(tmp_path / "language")).requires_grad_(False).train()
    ids = torch.arange(12).view(2, 6)  # two rows: not what lean layers are for
    expected = model(ids).logits
    seen = noting("noting_stock")
    assert use_lean_layers(model) == compile_layers(model, "noting_stock")
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert any(_has_products(graph) for graph in seen)
    seen.clear()
    torch.compiler.reset()
    model.eval()(ids)
    assert not seen


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler is here")
def test_layers_compiled_to_machine_code_give_the_numbers_of_the_others(recipe: Recipe, tmp_path: Path) -> None:
    torch.compiler.reset()
    language = str(make_language(tmp_path / "language", layers=1))
    recipe = replace(recipe, model=replace(recipe.model, language=language))
    plain = replace(recipe, train=replace(recipe.train, steps=2, rehearsal=False, output=str(tmp_path / "plain")))
    train(plain)
    train(compiled(recipe, "inductor"))
    assert numbers(recipe) == pytest.approx(numbers(plain), rel=1e-5)


def test_the_default_backend_needs_a_compiler_on_a_cpu(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_moslora.models.memory_efficient.kernel_selection.shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*leave train.compile out"):
        train(compiled(recipe, "inductor"))


def test_zero3_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"train.compile is .* zero3.*Take zero2"):
        check_zero(compiled(recipe, "inductor", zero="zero3"))
