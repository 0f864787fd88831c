"""The verbs of `mm-moslora eval` that show, check and plan tasks."""

from __future__ import annotations

from pathlib import Path

from mm_moslora.cli.evaluation.eval_options import Modes
from mm_moslora.cli.shared_options import quiet_libraries


def eval_plan(
    *tasks: str,
    model: str = "",
    protocol: str | None = None,
    modes: Modes = ("own",),
    limit: int | None = None,
    max_new_tokens: int | None = None,
    change: tuple[str, ...] = (),
    measured: Path | None = None,
    price: str | None = None,
    picture_tokens: int = 576,
) -> int:
    """Count what an evaluation takes: documents, answers, tokens, hours and cost. No model is loaded or asked.

    Parameters
    ----------
    tasks
        As for `run`.
    model
        As for `run`; its name is checked. The tokens of prompts are counted by the tokenizer and the processor of a
        folder; for other models they are estimated by the length of the texts.
    protocol
        Protocol of tasks that are given without one.
    modes
        Pictures shown, as for `run`.
    limit
        Only this many documents.
    max_new_tokens
        Longest answer; default: the task's.
    change
        KEY=VALUE, as for `run`.
    measured
        Run folder of an earlier evaluation with this model, from which the hours come.
    price
        IN/OUT, as for `run`: prices of a million prompt tokens and of a million new tokens, such as 0.15/0.6.
    picture_tokens
        Prompt tokens of a picture; not with the folder of a model, which counts them.
    """
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
    settings = EvaluationSettings(limit=limit, max_new_tokens=max_new_tokens)
    counter = None
    if model and model.partition(":")[0] not in KINDS:
        quiet_libraries()
        from mm_moslora_eval.report.prompt_tokens import PromptTokens

        counter = PromptTokens(Path(model))
    opened = (with_changes(get_task(name), change) for name in with_protocol(tasks, protocol))
    plans = [plan_task(task, settings, counter=counter) for task in opened]
    before = None if measured is None else measured_in(measured)
    of_picture = picture_tokens if counter is None else None
    print(plan_text(plans, before=before, price=prices, picture_tokens=of_picture, modes=len(modes)))
    return 0


def eval_list(*words: str) -> int:
    """List all tasks and groups, or with words only the lines with all of them.

    Parameters
    ----------
    words
        Such as: mmbench lmms_eval. `extraction`, `metric`, `grader`, `aggregation` and `over_samples` list the names
        that a task file can take, with their meaning.
    """
    from mm_moslora_eval import eval_commands

    print(eval_commands.list_tasks(words))
    return 0


def eval_describe(task: str) -> int:
    """Show a task: data, prompt of its first document, decoding, extraction, metric, published numbers.

    Parameters
    ----------
    task
        NAME, NAME@PROTOCOL, a task file, llava:FILE[@IMAGE_FOLDER] or tsv:FILE.
    """
    from mm_moslora_eval import eval_commands

    print(eval_commands.describe(task))
    return 0


def eval_check(*tasks: str) -> int:
    """Read the data of tasks, every picture included; exit code 1 when something is missing or damaged.

    Parameters
    ----------
    tasks
        NAME, NAME@PROTOCOL, a task file, llava:FILE[@IMAGE_FOLDER], tsv:FILE, or a group (@NAME).
    """
    from mm_moslora_eval import eval_commands
    from mm_moslora_eval.protocol.task_groups import with_protocol

    for task in with_protocol(tasks, None):
        print(eval_commands.check(task))
    return 0
