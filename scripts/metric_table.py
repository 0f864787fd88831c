#!/usr/bin/env python
"""Write the tables of metrics, extractions and aggregations of eval/README.md from the registries.

    python scripts/metric_table.py           rewrite the tables
    python scripts/metric_table.py --check   exit with 1 when they are out of date

The meaning of a name is the beginning of its function's docstring; `MEANINGS` holds those of functions without one.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mm_moslora_eval.protocol.grading import BY_PROMPT
from mm_moslora_eval.protocol.task_registry import all_tasks
from mm_moslora_eval.run.judging.judged_scores import GRADERS, grade_by_prompt, judged_extraction
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, METRICS
from mm_moslora_eval.scoring.named_parts import name_of
from mm_moslora_eval.scoring.rule_forms import JudgeRule
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS, OVER_SAMPLES

PAGE = Path(__file__).parents[1] / "eval" / "README.md"
BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"

MEANINGS = {
    "text": "The answer without space around it.",
    "boxes": "The first box of the answer in the model's form, in pixels of the picture's file.",
    "first_line": "The first line of the answer.",
    "letter_or_text": "`letter` where a question has options, else `text`.",
    "equal": "Equal to a reference, such as a letter.",
    "equal_ignore_case": "Equal to a reference without case and a period at its end.",
    "vqa": "VQA accuracy over ten people, with this project's normalisation of both sides.",
    "vqa_textvqa": "LLaVA and lmms-eval for TextVQA: EvalAI's normalisation of both sides.",
    "vqa_vlmevalkit": "VLMEvalKit's VQA score.",
    "letter_or_vqa": "`equal` where a question has options, else `vqa`.",
    "letter_or_exact": "`equal` where a question has options, else `exact`.",
}  # fmt: skip


def meaning(name: str, function: Callable[..., Any]) -> str:
    """What a name stands for, in one sentence."""
    if name in MEANINGS:
        return MEANINGS[name]
    reached = (each for each in _reached(function) if not isinstance(each, partial))
    documented = next((each.__doc__ for each in reached if each.__doc__), None)
    if documented is None:
        raise SystemExit(f"{name} has no docstring and no entry in MEANINGS.")
    return " ".join(documented.split("\n\n")[0].split()).replace("|", "\\|")


def _reached(function: Any) -> Iterator[Callable[..., Any]]:
    """The function, then those in its closure or in its code, of which the last one called comes first."""
    if isinstance(function, partial | JudgeRule):
        yield from _reached(function.func if isinstance(function, partial) else function.read)
        return
    yield function
    for cell in function.__closure__ or ():
        if isinstance(cell.cell_contents, types.FunctionType | partial):
            yield from _reached(cell.cell_contents)
    if not function.__doc__:
        called = function.__code__.co_names
        modules = [value for name in called if isinstance(value := function.__globals__.get(name), types.ModuleType)]
        for name in reversed(called):
            for names in (*map(vars, modules), function.__globals__):
                function_of_name = names.get(name)
                if isinstance(function_of_name, types.FunctionType) and function_of_name.__module__.startswith(
                    ("mm_moslora_eval.metrics", "mm_moslora_eval.task_files")
                ):
                    yield function_of_name


def _options(function: Callable[..., Any]) -> str:
    """The options of a function, as a task file gives them."""
    found = [item for item in inspect.signature(function).parameters.values() if item.kind == item.KEYWORD_ONLY]
    if isinstance(function, partial) or not found:
        return ""
    return f" Options: {', '.join(f'`{item.name}`' for item in found)}."


def tables() -> str:
    """The tables as Markdown."""
    kinds: dict[str, dict[str, Callable[..., Any]]] = {
        table.kind: {name: table.find(name) for name in table}
        for table in (EXTRACTORS, METRICS, AGGREGATIONS, OVER_SAMPLES)
    }
    kinds["metric"] |= {name: GRADERS.find(name) for name in GRADERS} | {BY_PROMPT: grade_by_prompt}
    used: dict[tuple[str, str], list[str]] = defaultdict(list)
    for task in all_tasks().values():
        for kind in kinds:
            used[kind, name_of(getattr(task, kind))].append(task.id)
    blocks = []
    for kind, table in kinds.items():
        lines = [f"| {kind} | meaning | protocols that use it |", "|---|---|---|"]
        for name, function in table.items():
            tasks = used[kind, name]
            more = f" and {len(tasks) - 1} more" if len(tasks) > 1 else ""
            judge = " Needs a judge." if name in GRADERS and kind == "metric" else ""
            if kind == "extraction" and judged_extraction(name):
                judge = " With `--judge` the judge finds the answer."
            text = f"{meaning(name, function)}{_options(function)}{judge}"
            lines.append(f"| `{name}` | {text} | {f'`{tasks[0]}`{more}' if tasks else '-'} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main() -> None:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    written = f"{page[:start]}\n\n{tables()}\n\n{page[end:]}"
    if check and written != page:
        sys.exit(f"{PAGE.name}: the tables of metrics are out of date. Run: python scripts/metric_table.py")
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
