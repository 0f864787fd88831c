"""`mm-moslora eval` and the names of its verbs."""

from __future__ import annotations

from collections.abc import Callable

from cyclopts import App

from mm_moslora.cli.evaluation.eval_result_verbs import eval_compare, eval_export, eval_table
from mm_moslora.cli.evaluation.eval_run_verbs import eval_run, eval_score
from mm_moslora.cli.evaluation.eval_task_verbs import eval_check, eval_describe, eval_list, eval_plan

VERBS: dict[str, Callable[..., int]] = {
    "run": eval_run,
    "plan": eval_plan,
    "score": eval_score,
    "list": eval_list,
    "describe": eval_describe,
    "check": eval_check,
    "compare": eval_compare,
    "table": eval_table,
    "export": eval_export,
}
_AS_OPTIONS = ("list", "describe", "check")
"""Verbs that may also be written `--list`."""

eval_app = App(name="eval", help="Measure a model on tasks; infer and score are separate steps.")
for _name, _verb in VERBS.items():
    eval_app.command(_verb, name=[_name, f"--{_name}"] if _name in _AS_OPTIONS else _name)
