"""The verbs of `mm-moslora eval` that ask models and score answers."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from mm_moslora.cli.evaluation.eval_options import (
    NO_LIMITS,
    PLAIN_JUDGE,
    Attempts,
    Baselines,
    JudgeBudget,
    JudgeName,
    JudgeOptions,
    JudgeThinking,
    ModelNames,
    Modes,
    ServiceOptions,
    Timeout,
)
from mm_moslora.cli.shard_jobs import ARRAY, HERE, ShardJobs, words_of
from mm_moslora.cli.shared_options import OtherPreprocessing, quiet_libraries
from mm_moslora.launch.shard import Shard
from mm_moslora.utils.errors import ConfigError


def eval_run(
    *tasks: str,
    model: ModelNames = (),
    output: Path = Path("runs/eval"),
    protocol: str | None = None,
    modes: Modes = ("own",),
    baselines: Baselines = (),
    train_answers: tuple[str, ...] = (),
    batch_size: int | Literal["auto"] = 8,
    limit: int | None = None,
    stratify: str | None = None,
    samples: tuple[str, ...] = (),
    seed: int = 0,
    max_new_tokens: int | None = None,
    change: tuple[str, ...] = (),
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    reference: bool = False,
    dry_run: bool = False,
    shard: str | None = None,
    merge: Annotated[bool, Parameter(negative="")] = False,
    where: ShardJobs = HERE,
    judge: JudgeName = None,
    judge_budget: JudgeBudget = None,
    judge_thinking_tokens: JudgeThinking = 2048,
    timeout: Timeout = 300.0,
    attempts: Attempts = 6,
    max_failed_share: float = 0.0,
    report: bool = True,
    untuned: bool = False,
    track: bool = True,
    other_preprocessing: OtherPreprocessing = False,
    limits: ServiceOptions = NO_LIMITS,
    judging: JudgeOptions = PLAIN_JUDGE,
) -> int:
    """Evaluate a model on tasks and score the answers; the same command again asks only what is missing.

    Exit code 0: all scored; 1: an error; 3: more samples failed than --max-failed-share allows.

    Parameters
    ----------
    tasks
        NAME, NAME@PROTOCOL, a task file, llava:FILE[@IMAGE_FOLDER], tsv:FILE, or a group: @NAME, @TAG or
        @FILE.yaml:NAME; see `mm-moslora eval list`.
    output
        Run folder; it belongs to one model. With several models each has a folder of its name in it.
    protocol
        Protocol of tasks that are given without one.
    modes
        Pictures shown: own (the real ones), blind (their mean colour), wrong (another item's); several with commas.
    baselines
        Answers without a model, scored alike; several with commas.
    train_answers
        Training files (FILE or FILE@IMAGE_FOLDER) for the baselines' answers; default: the evaluated set itself.
    batch_size
        Questions decoded together; for a service, concurrent requests. auto: a local model's batches grow until memory
        or throughput says stop.
    limit
        Evaluate only this many documents, from the first one on.
    stratify
        Column, such as category: with --limit, a sample with the shares of its values, drawn by --seed.
    samples
        Evaluate only documents with these ids, and those that count together with them.
    seed
        Seed that chooses the wrong pictures, and the sample of --stratify.
    max_new_tokens
        Longest answer; default: the task's, and at least 2048 where the model is asked to think. Answers of another
        length belong into another folder.
    change
        KEY=VALUE, another value of a key below prompt, decoding, over_samples or thinking of the tasks, such as
        decoding.temperature=0.7 and decoding.samples=8. Results name it; such answers belong into another folder.
    precision
        Dtype of the weights; auto: bf16 on hardware with fast bf16, else fp32.
    reference
        One question at a time, with no shared computation: slow, for comparisons.
    dry_run
        Print the first prompts and exit.
    shard
        I/N: answer only this share of every task, into OUTPUT/shards/I-of-N; N such commands can run anywhere, at once.
    merge
        Score what all shards in OUTPUT have answered: the same command with --merge in place of --shard. The model is
        not loaded.
    max_failed_share
        Share of failed samples, 0 to 1, up to which the exit code is 0.
    report
        Write report.html into the run folder.
    untuned
        Also evaluate the model from which the run started, for a before-and-after comparison.
    track
        Write the scores and some samples into the training run's folder, for `mm-moslora report`. Also send
        the scores to the trackers of its recipe, under the evaluated adapter's digest.
    """
    arguments = {key: value for key, value in locals().items() if key != "tasks"}
    patience: dict[str, Any] = {"timeout": timeout, "attempts": attempts}
    service = limits.settings(**patience)  # wrong ones are refused before they stand in the scripts of jobs
    if len(model) > 1 and where.shards is None:
        where = replace(where, shards=1)
    if where.check(shard=shard, merge=merge, dry_run=dry_run):
        return _eval_several(tasks, arguments, where)
    name = "".join(model)
    from mm_moslora_eval import eval_commands
    from mm_moslora_eval.protocol.task_groups import with_protocol

    names = with_protocol(tasks, protocol)
    if dry_run:
        print(eval_commands.dry_run(names, changes=change))
        return 0
    from mm_moslora_eval.backends.automatic_batch import MOST, opened_for
    from mm_moslora_eval.backends.open_model import check_name, is_local, name_with_files, open_model

    if merge and shard:
        raise ConfigError("--shard answers a share, and --merge scores all shards: give one of them.")
    if name:  # without a model, errors of the tasks are reported first
        check_name(name)
    quiet_libraries()
    from mm_moslora_eval.report.run_evidence import UNTUNED, keep
    from mm_moslora_eval.run.evaluate_suite import evaluate_tasks
    from mm_moslora_eval.run.task_runner import EvaluationSettings

    automatic = batch_size == "auto" and not reference and is_local(name)
    if batch_size == "auto":  # the size by which work is divided; of a service the default
        batch_size = MOST if is_local(name) else EvaluationSettings.batch_size
    settings = EvaluationSettings(
        batch_size=1 if reference else batch_size, limit=limit, stratify=stratify, samples=samples,
        seed=seed,
        max_new_tokens=max_new_tokens, shard=None if shard is None else Shard.parse(shard),
    )  # fmt: skip
    shared: dict[str, Any] = {
        "settings": settings,
        "named": name_with_files(name) if name and (shard or merge) else name,
        "merge": merge,
        "changes": change,
        "judge": eval_commands.make_judge(
            judge, output, budget=judge_budget, thinking_tokens=judge_thinking_tokens, **judging.of_judge(**patience)
        ),
    }
    before, bars = [], eval_commands.Bars(len(names) * (len(modes) + untuned))
    opened = partial(
        open_model, name, precision=precision, reference=reference, other_preprocessing=other_preprocessing,
        service=service,
    )  # fmt: skip
    if untuned:
        start = partial(opened_for, partial(opened, untuned=True), automatic=automatic)
        before = evaluate_tasks(start, names, output / UNTUNED, progress=bars.untuned, **shared)
    results = evaluate_tasks(
        partial(opened_for, opened, automatic=automatic),
        names,
        output,
        modes=modes,
        baselines=baselines,
        training=eval_commands.training_answers(*train_answers),
        progress=bars,
        **shared,
    )
    if settings.shard is not None:
        print(f"Shard {shard} is answered. When all are: the same command with --merge in place of --shard.")
        return 0
    if track and settings.rank == 0:
        keep(Path(name), results, output, before=before)
    if before:
        print(f"Before tuning:\n{eval_commands.table(before)}\n\nAfter:")
    return _eval_results(results, output, max_failed_share=max_failed_share, report=report) if settings.rank == 0 else 0


def _eval_several(tasks: tuple[str, ...], arguments: dict[str, Any], where: ShardJobs) -> int:
    """Evaluate one or several models in shards, as jobs, and merge those of each model."""
    from mm_moslora_eval.backends.open_model import is_local
    from mm_moslora_eval.run.answer_shards import DONE
    from mm_moslora_eval.run.scored_subsets import SHARDS

    models: tuple[str, ...] = arguments["model"] or ("",)
    whole: dict[Path, dict[str, Any]] = {}
    for name in models:
        own = re.sub(r"[^\w.-]+", "-", name.strip("/")) if len(models) > 1 else ""
        output = arguments["output"] / own
        if output / SHARDS in whole or own in (".", ".."):
            raise ConfigError(
                f"--model {name} has no folder of its own: {output} is another's. Evaluate it with another --output."
            )
        whole[output / SHARDS] = arguments | {"model": (name,), "output": output, "where": HERE, "merge": True}
    # A shard leaves to the merge what needs all answers.
    changed: dict[str, Any] = {
        "merge": False, "judge": None, "judge_budget": None, "judging": PLAIN_JUDGE, "baselines": (),
        "train_answers": (),
    }  # fmt: skip
    shards = {
        folder: ["eval", "run", *words_of(eval_run, {"tasks": tasks, **command}, **changed)]
        for folder, command in whole.items()
    }
    ready, code = where.run(shards, f"/{DONE}", script=arguments["output"] / ARRAY, on_cards=any(map(is_local, models)))
    return max([code, *(eval_run(*tasks, **whole[folder]) for folder in ready)])


def eval_score(
    answers: Path,
    *,
    protocol: str | None = None,
    partial: Annotated[bool, Parameter(negative="")] = False,
    judge: JudgeName = None,
    judge_budget: JudgeBudget = None,
    judge_thinking_tokens: JudgeThinking = 2048,
    timeout: Timeout = 300.0,
    attempts: Attempts = 6,
    max_failed_share: float = 0.0,
    report: bool = True,
    judging: JudgeOptions = PLAIN_JUDGE,
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
    max_failed_share
        Share of failed samples, 0 to 1, up to which the exit code is 0.
    report
        Write report.html into the run folder.
    """
    from mm_moslora_eval import eval_commands

    run = eval_commands.run_folder(answers)
    grader = eval_commands.make_judge(
        judge, run, budget=judge_budget, thinking_tokens=judge_thinking_tokens,
        **judging.of_judge(timeout=timeout, attempts=attempts),
    )  # fmt: skip
    failures: list[Exception] = []
    results = eval_commands.score(answers, protocol=protocol, judge=grader, partial=partial, failures=failures)
    code = _eval_results(results, run, max_failed_share=max_failed_share, report=report) if results else 0
    if failures:
        raise failures[0]
    return code


def _eval_results(results: list[Any], run: Path, *, max_failed_share: float, report: bool) -> int:
    from mm_moslora_eval import eval_commands

    print(eval_commands.table(results))
    if report:
        from mm_moslora_eval.report.evaluation_page import write_report

        print(f"Report: {write_report(run)}")
    return eval_commands.exit_code(results, max_failed_share=max_failed_share)
