"""`mm-moslora eval`: the names of its verbs, and those that need no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from mm_moslora.cli.evaluation.eval_options import QuestionOptions
from mm_moslora.cli.evaluation.eval_run_verbs import eval_run, eval_score
from mm_moslora.cli.shared_options import quiet_libraries
from mm_moslora.utils.errors import ConfigError

AS_USUAL = QuestionOptions()


def eval_plan(
    *tasks: str,
    model: str = "",
    asked: QuestionOptions = AS_USUAL,
    measured: Path | None = None,
    price: str | None = None,
    image_tokens: int = 576,
    check: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Count what an evaluation takes: documents, answers, tokens, hours and cost. No model is loaded or asked.

    Parameters
    ----------
    tasks
        As for `run`.
    model
        As for `run`; its name is checked. The tokens of prompts are counted by the tokenizer and the processor of a
        folder; for other models they are estimated by the length of the texts.
    measured
        Run folder of an earlier evaluation with this model, from which the hours come.
    price
        IN/OUT, as for `run`: prices of a million prompt tokens and of a million new tokens, such as 0.15/0.6.
    image_tokens
        Prompt tokens of an image; not with the folder of a model, which counts them.
    check
        Read (and fetch) the data instead, every image included; exit code 1 when something is missing or damaged.
    """
    if check:
        return _check(tasks, asked)
    from mm_moslora_eval.backends.endpoints.parallel_calls import Prices
    from mm_moslora_eval.backends.open_model import KINDS, check_name
    from mm_moslora_eval.protocol.task_groups import with_protocol
    from mm_moslora_eval.protocol.task_registry import get_task, with_changes
    from mm_moslora_eval.report.evaluation_plan import measured as measured_in
    from mm_moslora_eval.report.evaluation_plan import plan_task, plan_text
    from mm_moslora_eval.run.task_runner import EvaluationSettings

    if model:
        check_name(model)
    prices = None if price is None else Prices.parse(price)
    settings = EvaluationSettings(limit=asked.limit, max_new_tokens=asked.max_new_tokens)
    counter = None
    if model and model.partition(":")[0] not in KINDS:
        quiet_libraries()
        from mm_moslora_eval.report.prompt_tokens import PromptTokens

        counter = PromptTokens(Path(model))
    opened = (with_changes(get_task(name), asked.change) for name in with_protocol(tasks, asked.protocol))
    plans = [plan_task(task, settings, counter=counter) for task in opened]
    before = None if measured is None else measured_in(measured)
    of_image = image_tokens if counter is None else None
    print(plan_text(plans, before=before, price=prices, picture_tokens=of_image, modes=len(asked.modes)))
    return 0


def _check(tasks: tuple[str, ...], asked: QuestionOptions) -> int:
    from mm_moslora_eval import eval_commands
    from mm_moslora_eval.protocol.task_groups import with_protocol

    for task in with_protocol(tasks, asked.protocol):
        print(eval_commands.check(task))
    return 0


def eval_list(*words: str, details: Annotated[bool, Parameter(negative="")] = False) -> int:
    """List all tasks and groups, or with words only the lines with all of them.

    Parameters
    ----------
    words
        Such as: mmbench lmms_eval. `extraction`, `metric`, `grader`, `aggregation` and `over_samples` list the names
        that a task file can take, with their meaning.
    details
        Describe tasks instead, named as for `run`: data, prompt of the first document, decoding, extraction, metric,
        published numbers.
    """
    from mm_moslora_eval import eval_commands

    print("\n\n".join(map(eval_commands.describe, words)) if details else eval_commands.list_tasks(words))
    return 0


def eval_table(
    *runs: str, paired: Annotated[bool, Parameter(negative="")] = False,
    mode: Literal["own", "blind", "wrong"] = "own", markdown: Annotated[bool, Parameter(negative="")] = False,
    html: Path | None = None,
) -> int:  # fmt: skip
    """One table of the scores of several models, or two runs sample by sample.

    Parameters
    ----------
    runs
        Run folders, one for each model; a row has the same documents and rules for all.
    paired
        Compare two runs or task folders A B: the difference A - B, its interval and p-value, wins and losses, changed
        samples. Several seeds of one system are separated by commas.
    mode
        Images that were shown.
    markdown
        Print the table as Markdown.
    html
        Also write it as an HTML page.
    """
    if paired:
        if len(runs) != 2:
            raise ConfigError(f"--paired compares two runs, and {len(runs)} are given: eval table A B --paired.")
        return _paired(*runs, html=html)
    from mm_moslora_eval.report.shared_results import as_markdown, as_text, models_table

    if not runs:
        raise ConfigError("No run was given. Name the run folders of the models.")
    table = models_table([Path(run) for run in runs], mode=mode)
    print(as_markdown(table) if markdown else as_text(table))
    if html is not None:
        from mm_moslora_eval.report.evaluation_page import write_models

        print(f"Page: {write_models(table, html)}")
    return 0


def _paired(a: str, b: str, *, html: Path | None) -> int:
    from mm_moslora_eval import eval_commands

    comparisons = eval_commands.compare_runs(a, b)
    print("\n\n".join(text for _, text in comparisons))
    if html is not None:
        from mm_moslora_eval.report.evaluation_page import write_comparison

        print(f"Page: {write_comparison([item for item, _ in comparisons], html)}")
    return 0


def eval_export(answers: Path, output: Path, *, to: str = "vlmevalkit") -> int:
    """Write answers for an evaluation server or another harness, or the results of a run for others.

    Parameters
    ----------
    answers
        A folder TASK@PROTOCOL/MODE of a run; for model-index the run folder.
    output
        The file.
    to
        Answers: vqav2, vizwiz, docvqa, mmvet, mmbench, llava, llavabench, vlmevalkit, vlmevalkit_xlsx or omnidocbench.
        Results: model-index (YAML of a model card on the hub).
    """
    from mm_moslora_eval.report.shared_results import write_model_index
    from mm_moslora_eval.run.submissions import write_submission

    if to == "model-index":
        left = write_model_index(answers, output)
        print(f"{output}: written in the form {to}; {left} results have no score and are left out.")
        return 0
    empty = write_submission(answers, output, form=to)
    print(f"{output}: written in the form {to}; {empty} documents have no answer and are written as empty ones.")
    return 0


VERBS: dict[str, Callable[..., int]] = {
    "run": eval_run,
    "plan": eval_plan,
    "score": eval_score,
    "list": eval_list,
    "table": eval_table,
    "export": eval_export,
}

eval_app = App(name="eval", help="Measure a model on tasks; generation and scoring are separate steps.")
for _name, _verb in VERBS.items():
    eval_app.command(_verb, name=_name)
