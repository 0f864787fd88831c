"""`mm-moslora compare`. Parsing and printing only; heavy imports happen inside the verb."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mm_moslora.cli.shard_jobs import ClusterOptions
from mm_moslora.cli.shared_options import Overrides, Several, StopAt, quiet_libraries
from mm_moslora.config import load_recipe, override_items, require_sft
from mm_moslora.utils.errors import ConfigError, ExitStatus
from mm_moslora.utils.redaction import redacted_command
from mm_moslora.utils.text_format import split_commas

if TYPE_CHECKING:
    from mm_moslora.compare.comparison_plan import ComparisonSettings
    from mm_moslora.compare.comparison_run import ArmComparison
    from mm_moslora.config import Recipe


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """What is compared, and by what."""

    arms: tuple[str, ...] = ("lora,moslora:orthogonal",)
    """lora, moslora:kaiming, moslora:orthogonal, moslora:identity, moslora:butterfly, tsm, moslora-init,
    moslora-rslora, moslora-lora+, dora, rslora, lora+, full, or peft:NAME for a method of PEFT; with @key=value for
    other keys of the adapter, of the method or of the recipe: moslora:orthogonal@rank=16."""
    tasks: Several = ()
    """Test tasks, as for `mm-moslora eval run`."""
    seeds: int = 3
    """Evaluation seeds: runs per arm that are evaluated."""
    reference: str = ""
    """Arm that all other arms are compared with; default: the first."""
    output: Path = Path("runs/compare")
    """Folder of the comparison."""
    limit: int | None = None
    """Only this many documents of a task, from the first one on."""
    batch_size: int = 16
    """Questions decoded together."""
    max_new_tokens: int | None = None
    """Longest answer of the tasks, tokens; default: the task's own."""
    controls: bool = True
    """Also evaluate these runs with a plain image and with another item's image. Two arms get a verdict only if one of
    them scores above both controls. Evaluation takes three times as long."""
    train_answers: str = ""
    """Training file (FILE or FILE@IMAGE_FOLDER) from which the most frequent answers are counted; default: the test
    questions' own answers."""
    plan: bool = False
    """Run a few steps of a run of every arm, print the cost by arm, and exit."""
    only_report: bool = False
    """Analyse the finished runs and exit."""


@Parameter(name="*", group="Learning rates")
@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """How every arm gets its learning rate."""

    lr: tuple[str, ...] = ()
    """Learning rates to try with every arm, such as 5e-5,1e-4,2e-4; default: the recipe's own, not tuned."""
    validation: Several = ()
    """Criterion for the learning rates: loss (default: the held-out loss), or tasks."""
    hold_out: float = 0.05
    """Share of the training records held out for the loss, where the recipe has no data.validation."""
    tune_seeds: int = 1
    """Runs per arm and learning rate that choose the rate."""
    grow: int = 3
    """Further learning rates, at most, for an arm that is best at an edge of a grid of three or more."""

    def rates(self) -> list[float]:
        """The rates to try."""
        text = ",".join(self.lr)
        try:
            return [float(item) for item in split_commas(text)]
        except ValueError as error:
            raise ConfigError(
                f"--lr is {text!r}, expected numbers separated by commas, such as 5e-5,1e-4,2e-4."
            ) from error


@Parameter(name="*", group="Cluster")
@dataclass(frozen=True, kw_only=True)
class RunOptions(ClusterOptions):
    """Where the runs of a comparison happen, and for how long."""

    gpus_per_run: int | None = None
    """Accelerators per run; default: one, where there are any."""
    max_minutes: float | None = None
    """Save and stop after this many minutes; the same command continues."""
    keep_all: bool = False
    """Keep the checkpoints of the runs that chose the rates."""


ASKED, TUNING, RUNS = ComparisonOptions(), TuningOptions(), RunOptions()


def compare(
    recipe: str,
    *overrides: Overrides,
    asked: ComparisonOptions = ASKED,
    tuning: TuningOptions = TUNING,
    runs: RunOptions = RUNS,
    cell: Annotated[str, Parameter(show=False)] = "",
    stop_at: StopAt = None,
) -> int:
    """Compare tuning methods on your own data: equal budget, tuned learning rates, several seeds, error bars.

    Every arm trains for the same number of steps. Separate runs choose its learning rate on a validation split. Runs
    with new seeds are then evaluated on the test tasks, with blind and wrong-image controls. Every arm is compared
    with the reference document by document. A run that crashes or diverges is reported and does not affect the others.
    The same command again continues; more arms, rates or seeds can be added later. Exit code 75: stopped before the
    end.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped recipe (see `mm-moslora config`).
    """
    if cell or stop_at is not None:
        if overrides or not cell:
            raise ConfigError("--cell does one run as it was planned: compare FOLDER --cell NAME [--stop-at STEP].")
        return _one_run(Path(recipe), cell, stop_at=stop_at)
    runs.refuse_two_engines()
    shared = load_recipe(recipe, override_items(overrides))
    require_sft(shared, "compare")
    if not any(asked.tasks):
        raise ConfigError("No test task is given. Name one with --tasks, such as llava:test.jsonl@images.")
    settings = _settings(shared, asked, tuning)
    from mm_moslora.compare.arms import reset_line, size_lines
    from mm_moslora.compare.comparison_run import ARRAY, ArmComparison, RunBudget, exclusive
    from mm_moslora.compare.comparison_text import plan_lines
    from mm_moslora.launch.jobs import ProcessEngine, cards_per_job
    from mm_moslora.launch.ray_engine import open_engine

    sizes = [] if asked.only_report else size_lines(settings.arms, shared, settings.reference_arm)
    print("\n".join([*plan_lines(settings), *reset_line(shared), *sizes]), flush=True)
    with exclusive(asked.output):
        idle, wanted = runs.slurm or asked.only_report, runs.gpus_per_run
        engine = open_engine("" if idle else runs.ray, parallel=runs.parallel)
        cards = (wanted or 0) if idle else cards_per_job(wanted, engine, option="--gpus-per-run")
        room = RunBudget(cards=cards, max_minutes=runs.max_minutes, keep_all=runs.keep_all)
        comparison = ArmComparison(shared, settings, asked.output, hold_out=tuning.hold_out)
        comparison.check()
        if asked.plan:
            print("\n".join(comparison.probe(room, engine if runs.ray else ProcessEngine(parallel=1))), flush=True)
            return 0
        if runs.slurm and not asked.only_report:
            finished = comparison.write_array(room)
        else:
            finished = asked.only_report or comparison.run(room, engine)
        code = _show(comparison, asked.output, finished=finished)
        if runs.slurm and not finished:
            script = shlex.quote(str(comparison.folder / ARRAY))
            print(f"Next: sbatch {script}\nAfter its end, this command again collects the runs.")
        return code


def _one_run(folder: Path, cell: str, *, stop_at: int | None) -> int:
    quiet_libraries()
    from mm_moslora.compare.comparison_cell import run_cell

    return 0 if run_cell(folder, cell, stop_at=stop_at) else ExitStatus.STOPPED


def _settings(recipe: Recipe, asked: ComparisonOptions, tuning: TuningOptions) -> ComparisonSettings:
    """The settings of the comparison; its arms, rates and tasks are checked."""
    from mm_moslora.compare.arms import named_arms, parse_arms

    rates = tuning.rates() or [recipe.optim.lr]
    named_arms(asked.arms)  # a misspelt name is refused before slow imports
    quiet_libraries()
    from mm_moslora_eval.protocol.task_groups import expanded

    from mm_moslora.compare.comparison_plan import LOSS, ComparisonSettings

    return ComparisonSettings(
        arms=parse_arms(asked.arms, recipe), rates=rates, seeds=asked.seeds, tasks=expanded(asked.tasks),
        validation=expanded(tuning.validation) or (LOSS,), tuning_seeds=tuning.tune_seeds, grow=tuning.grow,
        reference=asked.reference, limit=asked.limit, batch_size=asked.batch_size,
        max_new_tokens=asked.max_new_tokens, controls=asked.controls, train_answers=asked.train_answers,
    )  # fmt: skip


def _show(comparison: ArmComparison, output: Path, *, finished: bool) -> int:
    from mm_moslora.compare.comparison_analysis import analyse
    from mm_moslora.compare.comparison_text import table
    from mm_moslora.reporting.comparison.comparison_page import write_page

    results = analyse(comparison, command=redacted_command(["mm-moslora", *sys.argv[1:]]))
    print(table(results))
    print(f"Page: {write_page(output / 'results.json', output / 'report.html')}")
    failed = any(run["status"] == "failed" for run in results["failures"])
    return int(failed) if finished else ExitStatus.STOPPED
