"""`mm-moslora compare`. Parsing and printing only; heavy imports happen inside the verb."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mm_moslora.cli.shard_jobs import refuse_two_engines
from mm_moslora.cli.shared_options import Overrides, quiet_libraries
from mm_moslora.config import load_recipe, override_items, require_sft
from mm_moslora.utils.errors import ConfigError, ExitStatus
from mm_moslora.utils.redaction import redacted_command

if TYPE_CHECKING:
    from mm_moslora.compare.comparison_run import ArmComparison


def compare(
    recipe: str,
    *overrides: Overrides,
    arms: str = "lora,moslora:orthogonal",
    lr: str = "",
    seeds: int = 3,
    tasks: str = "",
    validation: str = "",
    hold_out: float = 0.05,
    tune_seeds: int = 1,
    grow: int = 3,
    reference: str = "",
    output: Path = Path("runs/compare"),
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    controls: bool = True,
    train_answers: str = "",
    parallel: int | None = None,
    gpus_per_run: int | None = None,
    ray: str = "",
    slurm: bool = False,
    max_minutes: float | None = None,
    keep_all: bool = False,
    plan: bool = False,
    only_report: bool = False,
    cell: str = "",
    stop_at: int | None = None,
) -> int:
    """Compare tuning methods on your own data: equal budget, tuned learning rates, several seeds, error bars.

    Every arm trains for the same number of steps. Separate runs choose its learning rate on a validation split. Runs
    with new seeds are then evaluated on the test tasks, with blind and wrong-picture controls. Every arm is compared
    with the reference document by document. A run that crashes or diverges is reported and does not affect the others.
    The same command again continues; more arms, rates or seeds can be added later. Exit code 75: stopped before the
    end.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped preset (see `mm-moslora config`); with --cell the folder of a comparison.
    arms
        lora, moslora:kaiming, moslora:orthogonal, moslora:identity, moslora:butterfly, tsm, moslora-init,
        moslora-rslora, moslora-lora+, dora, rslora, lora+, full, or peft:NAME for a method of PEFT;
        with @key=value for other keys of the adapter, of the method or of the recipe: moslora:orthogonal@rank=16.
    lr
        Learning rates to try with every arm, such as 5e-5,1e-4,2e-4; default: the recipe's own, not tuned.
    seeds
        Reported runs per arm.
    tasks
        Test tasks separated by commas, as for `mm-moslora eval run`.
    validation
        Criterion for the learning rates: loss (default: the held-out loss), or tasks separated by commas.
    hold_out
        Share of the training records held out for the loss, where the recipe has no data.validation.
    tune_seeds
        Runs per arm and learning rate that choose the rate.
    grow
        Further learning rates, at most, for an arm that is best at an edge of a grid of three or more.
    reference
        Arm that all other arms are compared with; default: the first.
    output
        Folder of the comparison.
    limit
        Evaluate only this many documents of every task, from the first one on.
    batch_size
        Questions decoded together.
    max_new_tokens
        Longest answer of the tasks, tokens; default: the task's own.
    controls
        Also evaluate the reported runs with a plain picture and with another item's picture. Two arms get a verdict
        only if one of them scores above both controls. Evaluation takes three times as long.
    train_answers
        Training file (FILE or FILE@IMAGE_FOLDER) from which the most frequent answers are counted; default: the test
        questions' own answers.
    parallel
        Runs at the same time; default: one per accelerator (or per --gpus-per-run of them), one on a CPU.
    gpus_per_run
        Accelerators per run; default: one, where there are any.
    ray
        Run on a Ray cluster: HOST:PORT of its head, or auto. The output is on a file system that its nodes share.
    slurm
        Write a SLURM array of the runs that can start, and exit. The same command again collects them, and writes the
        array of the runs that follow.
    max_minutes
        Save and stop after this many minutes; the same command continues.
    keep_all
        Keep the checkpoints of the runs that chose the rates.
    plan
        Run a few steps of a run of every arm, print the cost by arm, and exit.
    only_report
        Analyse the finished runs and exit.
    cell
        Do this one run of a comparison's folder, as the comparison itself does: compare FOLDER --cell NAME.
    stop_at
        With --cell: save and stop after this optimiser step.
    """
    if cell or stop_at is not None:
        if overrides or not cell:
            raise ConfigError("--cell does one run as it was planned: compare FOLDER --cell NAME [--stop-at STEP].")
        quiet_libraries()
        from mm_moslora.compare.comparison_cell import run_cell

        return 0 if run_cell(Path(recipe), cell, stop_at=stop_at) else ExitStatus.STOPPED
    refuse_two_engines(slurm=slurm, ray=ray, parallel=parallel)
    shared = load_recipe(recipe, override_items(overrides))
    require_sft(shared, "compare")
    if not tasks:
        raise ConfigError("No test task is given. Name one with --tasks, such as llava:test.jsonl@images.")
    quiet_libraries()
    from mm_moslora_eval.protocol.task_groups import expanded

    from mm_moslora.compare.arms import parse_arms, reset_line, size_lines, split
    from mm_moslora.compare.comparison_plan import LOSS, ComparisonSettings
    from mm_moslora.compare.comparison_run import ARRAY, ArmComparison, RunBudget, exclusive
    from mm_moslora.compare.comparison_text import plan_lines
    from mm_moslora.launch.jobs import ProcessEngine, cards_per_job
    from mm_moslora.launch.ray_engine import open_engine

    settings = ComparisonSettings(
        arms=parse_arms(arms, shared), rates=_rates(lr) or [shared.optim.lr], seeds=seeds,
        tasks=expanded(split(tasks)), validation=expanded(split(validation)) or (LOSS,), tuning_seeds=tune_seeds,
        grow=grow, reference=reference, limit=limit,
        batch_size=batch_size, max_new_tokens=max_new_tokens, controls=controls, train_answers=train_answers,
    )  # fmt: skip
    sizes = [] if only_report else size_lines(settings.arms, shared, settings.reference_arm)
    print("\n".join([*plan_lines(settings), *reset_line(shared), *sizes]), flush=True)
    with exclusive(output):
        nothing_runs = slurm or only_report
        engine = open_engine("" if nothing_runs else ray, parallel=parallel)
        cards = (gpus_per_run or 0) if nothing_runs else cards_per_job(gpus_per_run, engine, option="--gpus-per-run")
        room = RunBudget(cards=cards, max_minutes=max_minutes, keep_all=keep_all)
        comparison = ArmComparison(shared, settings, output, hold_out=hold_out)
        comparison.check()
        if plan:
            print("\n".join(comparison.probe(room, engine if ray else ProcessEngine(parallel=1))), flush=True)
            return 0
        if slurm and not only_report:
            finished = comparison.write_array(room)
        else:
            finished = only_report or comparison.run(room, engine)
        code = _show(comparison, output, finished=finished)
        if slurm and not finished:
            script = shlex.quote(str(comparison.folder / ARRAY))
            print(f"Next: sbatch {script}\nAfter its end, this command again collects the runs.")
        return code


def _rates(text: str) -> list[float]:
    from mm_moslora.compare.arms import split

    try:
        return [float(item) for item in split(text)]
    except ValueError as error:
        raise ConfigError(f"--lr is {text!r}, expected numbers separated by commas, such as 5e-5,1e-4,2e-4.") from error


def _show(comparison: ArmComparison, output: Path, *, finished: bool) -> int:
    from mm_moslora.compare.comparison_analysis import analyse
    from mm_moslora.compare.comparison_text import table
    from mm_moslora.reporting.comparison.comparison_page import write_page

    results = analyse(comparison, command=redacted_command(["mm-moslora", *sys.argv[1:]]))
    print(table(results))
    print(f"Page: {write_page(output / 'results.json', output / 'report.html')}")
    failed = any(run["status"] == "failed" for run in results["failures"])
    return int(failed) if finished else ExitStatus.STOPPED
