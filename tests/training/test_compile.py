"""`train.compile`: compiled layers give the numbers of the others, and what cannot be compiled is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_language

from mm_moslora.config import Recipe
from mm_moslora.errors import ConfigError
from mm_moslora.training.engine import deepspeed_config
from mm_moslora.training.loop import train


def compiled(recipe: Recipe, backend: str, **changes: object) -> Recipe:
    return replace(recipe, train=replace(recipe.train, compile=backend, steps=2, rehearsal=False, **changes))


def numbers(recipe: Recipe) -> list[float]:
    lines = [json.loads(line) for line in (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if "loss" in line for key in ("loss", "grad_norm")]


@pytest.mark.slow
def test_compiled_layers_give_the_numbers_of_the_others(recipe: Recipe, tmp_path: Path) -> None:
    torch.compiler.reset()
    # With dropout, lean layers draw other masks behind the last attention: for fewer rows.
    recipe = replace(recipe, adapter=replace(recipe.adapter, dropout=0.0))
    plain = replace(recipe, train=replace(recipe.train, steps=2, rehearsal=False, output=str(tmp_path / "plain")))
    train(plain)
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(graph)
        return graph.forward

    torch._dynamo.register_backend(backend, name="noting")
    recipe = compiled(recipe, "noting")
    train(recipe)
    assert numbers(recipe) == pytest.approx(numbers(plain), rel=1e-5)
    # Batches of other lengths use the same graphs: far fewer than two steps of two layers would need.
    assert 0 < len(seen) <= 30


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler is here")
def test_layers_compiled_to_machine_code_give_the_numbers_of_the_others(recipe: Recipe, tmp_path: Path) -> None:
    torch.compiler.reset()
    language = str(make_language(tmp_path / "language", layers=1))
    recipe = replace(
        recipe, model=replace(recipe.model, language=language), adapter=replace(recipe.adapter, dropout=0.0)
    )
    plain = replace(recipe, train=replace(recipe.train, steps=2, rehearsal=False, output=str(tmp_path / "plain")))
    train(plain)
    train(compiled(recipe, "inductor"))
    assert numbers(recipe) == pytest.approx(numbers(plain), rel=1e-5)


def test_an_unknown_backend_is_named_with_a_suggestion(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"train.compile is 'inducter'.*inductor"):
        train(compiled(recipe, "inducter"))


def test_the_default_backend_needs_a_compiler_on_a_cpu(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_moslora.training.compiling.shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*leave train.compile out"):
        train(compiled(recipe, "inductor"))


def test_zero3_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"train.compile is .* zero3.*Take zero2"):
        deepspeed_config(compiled(recipe, "inductor", zero="zero3").train, "fp32", 1.0)


def test_checkpointing_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"train.compile is .*gradient_checkpointing.*Leave one of the two out"):
        compiled(recipe, "inductor", gradient_checkpointing=True)
