"""The verbs of `mm-moslora eval` that ask models and score answers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from mm_moslora.cli.evaluation.eval_options import (
    Baselines,
    JudgeOptions,
    QuestionOptions,
    ResultOptions,
    ServiceOptions,
)
from mm_moslora.cli.shard_jobs import ARRAY, ShardJobs, words_of
from mm_moslora.cli.shared_options import OtherPreprocessing, Several, quiet_libraries
from mm_moslora.launch.shard import Shard
from mm_moslora.utils.errors import ConfigError

if TYPE_CHECKING:
    from mm_moslora_eval.run.task_runner import EvaluationSettings


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of `eval run`, with those of its groups."""

    model: Several = ()
    """A folder (run, checkpoint, export), hf:ID, openai:URL#MODEL or replay:FILE; also several."""
    output: Path = Path("runs/eval")
    """Run folder; it belongs to one model. With several models each has a folder of its name in it."""
    asked: QuestionOptions = field(default_factory=QuestionOptions)
    baselines: Baselines = ()
    """Answers without a model, scored alike."""
    train_answers: Several = ()
    """Training files (FILE or FILE@IMAGE_FOLDER) for the baselines' answers; default: the evaluated set itself."""
    probe: bool = False
    """Also fit a linear probe of the frozen encoder to the recipe's training records, with a learning curve: a baseline
    that sees the picture. With a recipe's YAML file as --model, before training: the probe alone."""
    batch_size: int | Literal["auto"] = 8
    """Questions decoded together; for a service, concurrent requests. auto: a local model's batches grow until memory
    or throughput says stop."""
    stratify: str | None = None
    """Column, such as category: with --limit, a sample with the shares of its values, drawn by --seed."""
    samples: Several = ()
    """Evaluate only documents with these ids, and those that count together with them."""
    seed: int = 0
    """Seed that chooses the wrong images, and the sample of --stratify."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the weights; auto: bf16 on hardware with fast bf16, else fp32."""
    one_by_one: bool = False
    """One question at a time, with no shared computation: slow, for comparisons."""
    dry_run: bool = False
    """Print the first prompts and exit."""
    untuned: bool = False
    """Also evaluate the model from which the run started, for a before-and-after comparison."""
    track: bool = True
    """Write the scores and some samples into the training run's folder, for `mm-moslora report`. Also send the scores
    to the trackers of its recipe, under the evaluated adapter's digest."""
    other_preprocessing: OtherPreprocessing = False
    results: ResultOptions = field(default_factory=ResultOptions)
    jobs: ShardJobs = field(default_factory=ShardJobs)
    judging: JudgeOptions = field(default_factory=JudgeOptions)
    service: ServiceOptions = field(default_factory=ServiceOptions)

    def settings(self, *, automatic: bool) -> EvaluationSettings:
        """The settings of the run; an automatic batch size is the one by which work is divided."""
        from mm_moslora_eval.backends.automatic_batch import MOST
        from mm_moslora_eval.run.task_runner import EvaluationSettings

        batch_size = self.batch_size
        if batch_size == "auto":
            batch_size = MOST if automatic else EvaluationSettings.batch_size
        return EvaluationSettings(
            batch_size=1 if self.one_by_one else batch_size, limit=self.asked.limit, stratify=self.stratify,
            samples=self.samples, seed=self.seed, max_new_tokens=self.asked.max_new_tokens,
            shard=None if self.jobs.shard is None else Shard.parse(self.jobs.shard),
        )  # fmt: skip


AS_USUAL, UNJUDGED, TO_THE_END = EvaluationOptions(), JudgeOptions(), ResultOptions()


def eval_run(*tasks: str, options: EvaluationOptions = AS_USUAL) -> int:
    """Evaluate a model on tasks and score the answers; the same command again asks only what is missing.

    Exit code 0: all scored; 1: an error; 3: more samples failed than --max-failed-share allows.

    Parameters
    ----------
    tasks
        NAME, NAME@PROTOCOL, a task file, llava:FILE[@IMAGE_FOLDER], tsv:FILE, or a group: @NAME, @TAG or
        @FILE.yaml:NAME; see `mm-moslora eval list`.
    """
    service = options.service.settings(options.judging)  # a wrong one is refused before it stands in scripts of jobs
    if len(options.model) > 1 and options.jobs.shards is None:
        options = replace(options, jobs=replace(options.jobs, shards=1))
    if options.jobs.check(dry_run=options.dry_run):
        return _eval_several(tasks, options)
    from mm_moslora_eval import eval_commands
    from mm_moslora_eval.protocol.task_groups import with_protocol

    if modes := [name for name in tasks if name in ("own", "blind", "wrong")]:
        raise ConfigError(f"{modes[0]!r} is no task. Write the modes in one word: --modes own,{modes[0]}.")
    names = with_protocol(tasks, options.asked.protocol)
    if options.dry_run:
        print(eval_commands.dry_run(names, changes=options.asked.change))
        return 0
    from mm_moslora_eval.backends.automatic_batch import opened_for
    from mm_moslora_eval.backends.open_model import check_name, is_local, name_with_files, open_model

    name = "".join(options.model)
    untrained = options.probe and Path(name).is_file()
    if name and not untrained:  # without a model, errors of the tasks are reported first
        check_name(name)
    quiet_libraries()
    from mm_moslora_eval.report.run_evidence import UNTUNED, keep
    from mm_moslora_eval.run.evaluate_suite import evaluate_tasks

    jobs, automatic = options.jobs, options.batch_size == "auto" and not options.one_by_one and is_local(name)
    settings = options.settings(automatic=automatic)
    shared: dict[str, Any] = {
        "settings": settings, "named": name_with_files(name) if name and (jobs.shard or jobs.merge) else name,
        "merge": jobs.merge, "changes": options.asked.change, "judge": options.judging.grader(options.output),
    }  # fmt: skip
    probes = []
    if options.probe and jobs.shard is None and settings.rank == 0:
        from mm_moslora_eval.run.probing.linear_probe import probe_tasks

        probes = probe_tasks(names, name, settings=settings, changes=options.asked.change)
        print("\n".join(f"{task}: {probed.text}" for task, probed in zip(names, probes, strict=True)))
        if untrained:
            return 0
    before, bars = [], eval_commands.Bars(len(names) * (len(options.asked.modes) + options.untuned))
    opened = partial(
        open_model, name, precision=options.precision, reference=options.one_by_one,
        other_preprocessing=options.other_preprocessing, service=service,
    )  # fmt: skip
    if options.untuned:
        start = partial(opened_for, partial(opened, untuned=True), automatic=automatic)
        before = evaluate_tasks(start, names, options.output / UNTUNED, progress=bars.untuned, **shared)
    results = evaluate_tasks(
        partial(opened_for, opened, automatic=automatic), names, options.output, modes=options.asked.modes,
        baselines=options.baselines, training=eval_commands.training_answers(*options.train_answers), progress=bars,
        probes=probes, **shared,
    )  # fmt: skip
    if jobs.shard is not None:
        print(f"Shard {jobs.shard} is answered. When all are: the same command with --merge in place of --shard.")
        return 0
    if settings.rank != 0:
        return 0
    if options.track:
        keep(Path(name), results, options.output, before=before)
    if before:
        print(f"Before tuning:\n{eval_commands.table(before)}\n\nAfter:")
    return options.results.show(results, options.output)


def _eval_several(tasks: tuple[str, ...], options: EvaluationOptions) -> int:
    """Evaluate one or several models in shards, as jobs, and merge those of each model."""
    from mm_moslora_eval.backends.open_model import is_local
    from mm_moslora_eval.run.answer_shards import DONE
    from mm_moslora_eval.run.scored_subsets import SHARDS

    models = options.model or ("",)
    whole: dict[Path, EvaluationOptions] = {}
    for name in models:
        own = re.sub(r"[^\w.-]+", "-", name.strip("/")) if len(models) > 1 else ""
        output = options.output / own
        if output / SHARDS in whole or own in (".", ".."):
            raise ConfigError(
                f"--model {name} has no folder of its own: {output} is another's. Evaluate it with another --output."
            )
        whole[output / SHARDS] = replace(options, model=(name,), output=output, jobs=ShardJobs(merge=True))
    # A shard leaves to the merge what needs all answers.
    patience = JudgeOptions(timeout=options.judging.timeout, attempts=options.judging.attempts)
    shards = {
        folder: ["eval", "run", *tasks, *words_of(
            replace(command, jobs=ShardJobs(), judging=patience, baselines=(), train_answers=())
        )]
        for folder, command in whole.items()
    }  # fmt: skip
    ready, code = options.jobs.run(
        shards, f"/{DONE}", script=options.output / ARRAY, on_cards=any(map(is_local, models))
    )
    return max([code, *(eval_run(*tasks, options=whole[folder]) for folder in ready)])


def eval_score(
    answers: Path,
    *,
    protocol: str | None = None,
    partial: Annotated[bool, Parameter(negative="")] = False,
    shown: ResultOptions = TO_THE_END,
    judging: JudgeOptions = UNJUDGED,
) -> int:
    """Score stored answers again; needs no model and no data.

    Parameters
    ----------
    answers
        A run folder, a task folder in it, or its answers.jsonl.
    protocol
        NAME@PROTOCOL that gives the extraction and the metric instead.
    partial
        Also score tasks of which only some documents have an answer; the others count as failed samples until the run
        goes on.
    """
    from mm_moslora_eval import eval_commands

    run = eval_commands.run_folder(answers)
    failures: list[Exception] = []
    results = eval_commands.score(
        answers, protocol=protocol, judge=judging.grader(run), partial=partial, failures=failures
    )
    code = shown.show(results, run) if results else 0
    if failures:
        raise failures[0]
    return code
