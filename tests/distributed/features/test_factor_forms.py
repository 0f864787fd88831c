"""Other forms of factors and mixers in our trainer: orthonormal ones stay so on masters, frozen ones frozen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_records
from trials import HALF, STEPS, hexed, losses, make_recipe, weights, write

from mm_moslora.config import Recipe

pytestmark = pytest.mark.slow


def formed(recipe: Recipe, **form: str) -> Recipe:
    return replace(recipe, adapter=replace(recipe.adapter, mixer_init="orthogonal", **form))


def factors(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step:06d}" / "adapter" / "moslora.safetensors")


def measures(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line if key.startswith("mixer/")} for line in lines if "mixer/moved" in line]


@pytest.fixture(scope="module")
def runs(parts, ranks, tmp_path_factory) -> Path:
    """Orthonormal factors on two ranks, straight and in two halves; and in one process of plain torch."""
    folder = tmp_path_factory.mktemp("forms")
    kinds = {"zero0": "fp32", "zero1": "fp32", "zero2_offload": "fp32", "bf16": "bf16"}  # the last on ZeRO-2

    def recipe(name: str, kind: str) -> str:
        zero = "zero2" if kind == "bf16" else kind
        made = make_recipe(parts, folder / f"{kind}-{name}", zero, precision=kinds.get(kind, "fp32"))
        # Clipped by the norm of the loss's gradient; A and B in groups of their own, which ZeRO steps one by one.
        made = replace(made, optim=replace(made.optim, max_grad_norm=0.1, lora_plus_ratio=2.0))
        return write(formed(made, factor_form="stella"))

    ranks.run([*(recipe("straight", kind) for kind in kinds), *(f"{recipe('halves', k)}@{HALF}" for k in kinds)])
    ranks.run([recipe("halves", kind) for kind in kinds])
    ranks.run([recipe("straight", "none")], ranks=1)
    return folder


@pytest.mark.parametrize("kind", ["none", "zero0", "zero1", "zero2_offload", "bf16"])
def test_orthonormal_factors_stay_so_on_the_masters(kind, runs):
    before, after = factors(runs / "bf16-halves", HALF), factors(runs / f"{kind}-straight")
    assert any("lora_B" in name for name in after)
    for name, factor in after.items():
        tall = factor if "lora_B" in name else factor.T
        if "lora_mixer" not in name:
            assert torch.allclose(tall.T @ tall, torch.eye(tall.shape[1]), atol=1e-5), name
        assert not torch.equal(factor, before[name]), name


@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2_offload"])
def test_orthonormal_factors_give_the_numbers_of_plain_torch(kind, runs):
    assert losses(runs / f"{kind}-straight") == pytest.approx(losses(runs / "none-straight"), rel=1e-5)
    expected = factors(runs / "none-straight")
    for name, factor in factors(runs / f"{kind}-straight").items():
        assert torch.allclose(factor, expected[name], atol=1e-4), name


@pytest.mark.parametrize("kind", ["zero0", "zero1", "bf16"])
def test_orthonormal_factors_go_on_exactly(kind, runs):
    assert hexed(runs / f"{kind}-halves") == hexed(runs / f"{kind}-straight")
    assert weights(runs / f"{kind}-halves", STEPS) == weights(runs / f"{kind}-straight", STEPS)


def test_orthonormal_factors_are_refused_where_ranks_have_shards_of_them(parts, ranks, tmp_path):
    recipe = write(formed(make_recipe(parts, tmp_path / "run", "zero3"), factor_form="orthonormal"))
    group = ranks.finish(ranks.start([recipe]))
    assert all(group.codes)
    assert "zero3 is a ZeRO-3, which gathers a matrix only while its layer computes" in group.outputs
    assert "Choose zero0 to zero2" in group.outputs


def test_a_mixer_of_two_tensors_gives_the_numbers_of_plain_torch_where_ranks_have_shards(parts, ranks, tmp_path):
    for kind, count in (("zero3", 2), ("none", 1)):
        made = make_recipe(parts, tmp_path / kind, kind, precision="fp32")
        made = replace(made, track=replace(made.track, mixers_every=2))
        ranks.run([write(formed(made, mixer_form="low_rank:2"))], ranks=count)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "none"), rel=1e-5)
    expected = factors(tmp_path / "none")
    assert any(name.endswith("lora_mixer.left") and factor.any() for name, factor in expected.items())
    for name, factor in factors(tmp_path / "zero3").items():
        assert torch.allclose(factor, expected[name], atol=1e-4), name
    measured, whole = (measures(tmp_path / kind) for kind in ("zero3", "none"))
    assert len(measured) == STEPS // 2
    assert measured == [pytest.approx(step, rel=1e-2, abs=1e-5) for step in whole]
    assert all(step["mixer/moved"] > 0 and step["mixer/row_angle"] > 0 for step in measured)


def test_frozen_factors_come_back_from_the_checkpoint(parts, ranks, tmp_path):
    """Singular vectors made anew have other signs on another machine: here, where the second half makes them."""
    recipe = {
        name: write(formed(make_recipe(parts, tmp_path / name, "zero2"), factor_form="svd"))
        for name in ("straight", "halves")
    }
    ranks.run([recipe["straight"], f"{recipe['halves']}@{HALF}"])
    ranks.run(["trials:train_with_other_signs", recipe["halves"]])
    assert hexed(tmp_path / "halves") == hexed(tmp_path / "straight")
    assert weights(tmp_path / "halves", STEPS) == weights(tmp_path / "straight", STEPS)
    first, last = factors(tmp_path / "halves", HALF), factors(tmp_path / "halves")
    assert all(torch.equal(first[name], last[name]) == ("lora_mixer" not in name) for name in first)


def test_a_text_alone_gives_frozen_parts_no_gradient_and_no_error(parts, ranks, tmp_path):
    """Micro-batches in which neither mixers (their products are shared) nor the projector would have a gradient."""
    mixed = parts | {"records": make_records(tmp_path / "records", 8, text_only_every=2)}

    def recipe(name: str, zero: str, **train: str) -> Recipe:
        return make_recipe(mixed, tmp_path / name, zero, order="sequential", micro_batch=1, global_batch=4, **train)

    small = formed(recipe("svd-zero2", "zero2", precision="bf16"), factor_form="svd")
    align = [recipe(f"align-{zero}", zero) for zero in ("zero2", "none")]
    align = [replace(item, model=replace(item.model, language_mode="frozen")) for item in align]
    ranks.run([write(small), *map(write, align)], ranks=1)
    assert len(losses(tmp_path / "svd-zero2")) == STEPS
    assert losses(tmp_path / "align-zero2") == pytest.approx(losses(tmp_path / "align-none"), rel=1e-5)
