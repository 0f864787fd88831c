"""Runs of a comparison: what they share changes no number; the cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from trials import write_questions

from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_cell import LOG, CellRun, metrics, read_outcome
from mm_moslora.compare.comparison_plan import Cell, ComparisonSettings, Outcome, recipe_hash
from mm_moslora.compare.comparison_run import _job
from mm_moslora.compare.run_cost import ArmCost, cost_table
from mm_moslora.config import Recipe
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.launch.jobs import ProcessEngine, run_jobs
from mm_moslora.training import run_setup
from mm_moslora.utils import distributed
from mm_moslora.utils.distributed import seed_everything


def taken(runs: list[CellRun]) -> list[Outcome]:
    """The outcomes of runs, one after the other."""
    for run in runs:
        run.order()
    assert run_jobs(lambda: [_job(run) for run in runs], ProcessEngine(parallel=1), over=lambda *_: None) == {}
    found = [read_outcome(run.run_folder) for run in runs]
    assert all(outcome is not None and outcome.status == "ok" for outcome in found), [
        (run.run_folder / LOG).read_text()[-2000:] for run in runs
    ]
    return [outcome for outcome in found if outcome is not None]


@pytest.mark.slow
def test_a_run_with_the_features_of_others_has_the_numbers_of_a_run_alone(
    tmp_path: Path, language_folder: Path, vision_folder: Path, records: Path
) -> None:
    pictures = records.parent / "images"
    recipe = Recipe.from_dict(
        {
            "model": {"language": str(language_folder), "vision": {"name": str(vision_folder)}},
            "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": [{"path": str(records), "image_folder": str(pictures)}], "max_length": 256},
            "train": {"steps": 3, "global_batch": 8, "micro_batch": 4, "zero": "none", "precision": "bf16"}
            | {"log_every": 1},
            "track": {"trackers": []},
        }
    )  # fmt: skip
    write_questions(records, tmp_path / "test.jsonl")
    settings = ComparisonSettings(
        arms=parse_arms("moslora:orthogonal,full", recipe), rates=[1e-2], seeds=1,
        tasks=[f"llava:{tmp_path / 'test.jsonl'}@{pictures}"], limit=6, max_new_tokens=3,
    )  # fmt: skip
    jobs = []
    for seed, arm in ((0, 0), (0, 1), (1, 0)):
        cell = Cell(arm=settings.arms[arm], rate=1e-2, seed=seed, tuning=False)
        own = cell.recipe(recipe, tmp_path)
        own = dataclasses.replace(own, train=dataclasses.replace(own.train, seed=recipe.train.seed))
        jobs.append(CellRun(cell=cell, recipe=own, settings=settings, folder=tmp_path))
    first, full, again = taken(jobs)
    assert (again.test, again.last_loss) == (first.test, first.last_loss)
    assert full.last_loss != first.last_loss
    losses = [[(row["loss"], row["grad_norm"]) for row in metrics(job.run_folder) if "loss" in row] for job in jobs]
    assert losses[2] == losses[0]
    assert len(losses[0]) == 3
    for pattern in ("checkpoint-*/adapter/*.safetensors", "eval/*/*/*/samples.jsonl"):
        one, other = (
            [path.read_bytes() for path in sorted(jobs[number].run_folder.glob(pattern))] for number in (0, 2)
        )
        assert one
        assert one == other, pattern
    log = (jobs[2].run_folder / LOG).read_text()
    assert "Features of 14 of 14 pictures" in log, log
    shares = [
        [row["feature_cache_hits"] for row in metrics(job.run_folder) if "feature_cache_hits" in row] for job in jobs
    ]
    assert set(shares[2]) == {1}
    assert shares[0][0] == 0
    assert "Rehearsal" in (jobs[0].run_folder / LOG).read_text()
    assert "Rehearsal" not in log


def test_arms_with_one_seed_see_the_same_batches(tmp_path: Path, language_folder: Path, records: Path) -> None:
    """Mixers draw from the stream of the factors, so MoSLoRA shares A with LoRA in the first module alone."""
    texts = [line for line in records.read_text().splitlines(keepends=True) if '"image"' not in line]
    (tmp_path / "texts.jsonl").write_text("".join(texts * 4))
    shared = Recipe.from_dict(
        {
            "model": {"language": str(language_folder)}, "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": [{"path": str(tmp_path / "texts.jsonl")}], "max_length": 256},
            "train": {"steps": 2, "global_batch": 4, "micro_batch": 2, "zero": "none", "precision": "fp32"},
        }
    )  # fmt: skip
    distributed.join()
    seen, factors = [], []
    for arm in parse_arms("lora,tsm,moslora:orthogonal,dora", shared):
        recipe = arm.apply(shared, train__output=str(tmp_path / arm.slug), train__seed=5)
        Path(recipe.train.output).mkdir()
        seed_everything(5)
        run = run_setup.prepare(recipe)
        start = torch.get_rng_state().tolist()
        loader = BatchLoader(
            run.training_set, rank=0, world_size=1, config=recipe.data, global_batch=4, limit=run.limit, seed=5,
            start_step=0, pin=False,
        )  # fmt: skip
        with loader:
            steps = [batches for batches, _ in zip(loader, range(2), strict=False)]
        factors.append([value for name, value in run.assembly.model.named_parameters() if "lora_A" in name])
        factors[-1] = [value.detach().clone() for value in factors[-1]]
        run.engine.step(steps[0], 1.0)
        after = torch.get_rng_state().tolist() if arm.name != "dora" else None
        seen.append(([batch.input_ids.tolist() for batches in steps for batch in batches], start, after))
    lora, tsm, moslora, dora = seen
    assert lora == tsm == moslora
    assert dora[:2] == lora[:2]
    for other in factors[1:]:
        assert all(torch.equal(a, b) for a, b in zip(factors[0], other, strict=True)), (
            "with one seed all start at one A"
        )


def test_a_run_is_read_as_it_was_ordered(tmp_path: Path) -> None:
    shared = Recipe.from_dict({"model": {"language": "none"}, "optim": {"lr": 1 / 3}, "train": {"zero": "zero2"}})
    arms = parse_arms("lora,moslora:kaiming@optim.warmup=0.2@targets=[a,b]", shared)
    settings = ComparisonSettings(arms=arms, rates=[1 / 3], seeds=2, tasks=["t"], validation=["v"], limit=3)
    for arm in arms:
        cell = Cell(arm=arm, rate=1 / 3, seed=1, tuning=True)
        run = CellRun(
            cell=cell, recipe=cell.recipe(shared, tmp_path), settings=settings, folder=tmp_path, cards=2, keep_all=True
        )  # fmt: skip
        run.order()
        assert CellRun.read(tmp_path, cell.name) == run
        assert recipe_hash(CellRun.read(tmp_path, cell.name).recipe) == recipe_hash(run.recipe)


def test_the_cost_by_arm_adds_up() -> None:
    costs = [
        ArmCost(arm="lora", runs=6, trainable=12_345, step_seconds=0.5, steps=100, run_seconds=60, memory_gib=1.25),
        ArmCost(arm="dora", runs=3, trainable=9, steps=100, run_seconds=120, memory_gib=2, finished=True),
        ArmCost(arm="odd", runs=2, problem="failed: no module"),
        ArmCost(arm="done", runs=0),
    ]  # fmt: skip
    table = cost_table(costs)
    assert " ".join(table[0].split()) == "arm trainable s a step steps min a run GiB runs hours"
    assert table[1].split() == ["lora", "12,345", "0.5", "100", "1.00", "1.2", "6", "0.10"]
    assert table[5].split() == ["all", "11", "0.20"]
    assert table[6] == "Not in the sum: odd: failed: no module"
    assert "training alone" in table[7]
