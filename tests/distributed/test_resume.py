"""Going on: exactly on the same ranks and stage, to rounding on others, and with everything that was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trials import HALF, full, hexed, losses, make_recipe, metrics, weights, write

from mm_moslora.config import AdapterConfig, Recipe, SourceConfig
from mm_moslora.training.training_loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def halves(parts, ranks, tmp_path_factory) -> Path:
    """Every stage once straight through and once stopped half-way; then, in new processes, the second halves."""
    folder = tmp_path_factory.mktemp("halves")
    straight = {
        stage: make_recipe(parts, folder / f"{stage}-straight", stage, dropout=0.1, micro_batch=2)
        for stage in ("zero0", "zero2", "zero3")
    }
    straight["bf16"] = full(make_recipe(parts, folder / "bf16-straight", "zero2", precision="bf16"))
    by_peft = make_recipe(parts, folder / "peft-straight", "zero2", precision="bf16")
    vblora = AdapterConfig(rank=4, alpha=8, dropout=0.1, peft={"type": "VBLORA", "vector_length": 16})
    straight["peft"] = replace(by_peft, adapter=vblora)  # a parameter of all layers, and others of one dimension
    straight["fp16"] = make_recipe(parts, folder / "fp16-straight", "zero1", precision="fp16", steps=8)
    # The first processes rehearse, the straight ones do not: it must not show.
    resumed = [
        write(replace(recipe, train=replace(recipe.train, output=str(folder / f"{name}-resumed"), rehearsal=True)))
        for name, recipe in straight.items()
    ]
    ranks.run(["trials:train_fp16", *map(write, straight.values()), *(f"{path}@{HALF}" for path in resumed)])
    ranks.run(["trials:train_fp16", *resumed])
    return folder


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "bf16", "peft", "fp16"])  # fp16: on zero1
def test_a_resumed_run_continues_exactly(name, halves):
    straight = hexed(halves / f"{name}-straight")
    assert len(straight) == (8 if name == "fp16" else 4)
    assert hexed(halves / f"{name}-resumed") == straight
    step = len(straight)
    assert weights(halves / f"{name}-resumed", step) == weights(halves / f"{name}-straight", step)


def test_ranks_stages_and_budgets_may_change_on_the_way(parts, ranks, tmp_path):
    """2 -> 1 -> 3 -> 4 -> 1 -> 2 ranks, another stage and token budget each time: as a quiet run.

    The lengths are estimates that are far too low, so that every rank cuts its micro-batches as it finds them.
    """
    way = [
        (2, "zero2", 100), (1, "zero3", 128), (3, "zero3", 64), (4, "zero1", 64), (1, "none", None), (2, "auto", 64),
    ]  # fmt: skip

    def recipe(name: str, zero: str, tokens: int | None) -> Recipe:
        same = make_recipe(parts, tmp_path / name, zero, order="random", steps=len(way), micro_batch=8)
        short = replace(same, data=replace(same.data, max_length=64))
        return replace(short, train=replace(short.train, micro_tokens=tokens))

    ranks.run([write(recipe("straight", "zero2", None))])
    evened = []
    for number, (world, zero, tokens) in enumerate(way):
        run = f"{write(recipe('changing', zero, tokens))}@{number + 1}"
        group = ranks.run(["trials:train_estimating", run], ranks=world)
        evened.append(any("evened" in group.output(rank) for rank in range(world)))
    assert any(evened), "in no step has a rank fewer micro-batches than another"
    for key in ("loss", "grad_norm", "tokens", "images", "samples_seen"):
        expected = [line[key] for line in metrics(tmp_path / "straight")]
        assert [line[key] for line in metrics(tmp_path / "changing")] == pytest.approx(expected, rel=1e-5), key


def test_an_align_stage_resumes_exactly_and_on_other_ranks(parts, ranks, tmp_path):
    """The projector alone trains; half-way on the same two ranks, and on one rank with another stage."""

    def align(name: str, zero: str) -> str:
        recipe = make_recipe(parts, tmp_path / name, zero)
        return write(replace(recipe, model=replace(recipe.model, language_mode="frozen")))

    halves = [f"{align(kind, 'zero3')}@{HALF}" for kind in ("resumed", "changed")]
    ranks.run([align("straight", "zero3"), *halves])
    ranks.run([align("resumed", "zero3")])
    ranks.run([align("changed", "none")], ranks=1)
    straight = tmp_path / "straight"
    assert hexed(tmp_path / "resumed") == hexed(straight)
    assert weights(tmp_path / "resumed") == weights(straight)
    assert losses(tmp_path / "changed") == pytest.approx(losses(straight), rel=1e-5)


def test_every_weight_that_trains_is_saved_on_every_stage(parts, ranks, tmp_path):
    """Align, then tune on its projector; a projector that stands still is saved whole under ZeRO-3, too."""
    from mm_moslora.models.load_model import load

    stages = ("zero2", "zero3")
    align = [make_recipe(parts, tmp_path / f"align-{stage}", stage, steps=1) for stage in stages]
    align = [replace(recipe, model=replace(recipe.model, language_mode="frozen")) for recipe in align]
    ranks.run([write(recipe) for recipe in align])
    tune = []
    for stage in stages:
        weights_file = tmp_path / f"align-{stage}" / "checkpoint-000001" / "projector.safetensors"
        recipe = make_recipe(parts, tmp_path / f"tune-{stage}", stage, steps=2)
        projector = replace(recipe.model.projector, weights=str(weights_file), mode="frozen")
        tune.append(replace(recipe, model=replace(recipe.model, projector=projector)))
    ranks.run([write(recipe) for recipe in tune])
    for stage in stages:
        before = tmp_path / f"align-{stage}" / "checkpoint-000001" / "projector.safetensors"
        after = tmp_path / f"tune-{stage}" / "checkpoint-000002" / "projector.safetensors"
        assert before.read_bytes() == after.read_bytes()
        assert load(tmp_path / f"tune-{stage}").model is not None
    assert losses(tmp_path / "tune-zero3") == pytest.approx(losses(tmp_path / "tune-zero2"), rel=1e-5)


def test_ranks_learn_the_stream_of_one(parts: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    lines = parts["records"].read_text().splitlines()
    lines[5] = "{broken"
    (tmp_path / "shards").mkdir()
    for number in range(2):
        (tmp_path / "shards" / f"{number}.jsonl").write_text("\n".join(lines[20 * number : 20 * number + 20]))
    source = SourceConfig(
        path=str(tmp_path / "shards"), streaming=True, image_folder=str(parts["records"].parent / "images")
    )

    def recipe(name: str, micro_batch: int) -> Recipe:
        made = make_recipe(parts, tmp_path / name, "zero2", steps=8, micro_batch=micro_batch)
        return replace(made, data=replace(made.data, train=[source], shuffle_buffer=16, max_bad_share=0.1))

    one = recipe("one", 8)
    train(one)
    files = [write(recipe(name, 4)) for name in ("two", "resumed")]
    ranks.run([files[0], f"{files[1]}@3", files[1]])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "two")
    alone = recipe("alone", 8)
    train(alone, stop_at=3)
    again = write(replace(alone, train=replace(alone.train, micro_batch=4)))
    ranks.run([again])
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    rows = (tmp_path / "two" / "quarantine.jsonl").read_text().splitlines()
    assert 1 <= len(rows) <= 3
    assert all('"code": "BAD_JSON"' in row for row in rows)
