"""The verbs of `mm-moslora eval` that show and hand on the results of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mm_moslora.utils.errors import ConfigError


def eval_compare(a: str, b: str, *, html: Path | None = None) -> int:
    """Compare two runs sample by sample: difference, interval, p-value, wins and losses, changed samples.

    Parameters
    ----------
    a
        A run or task folder; several seeds of one system separated by commas.
    b
        The other run or task folder; A - B is reported.
    html
        Also write the comparison as an HTML page.
    """
    from mm_moslora_eval import eval_commands

    comparisons = eval_commands.compare_runs(a, b)
    print("\n\n".join(text for _, text in comparisons))
    if html is not None:
        from mm_moslora_eval.report.evaluation_page import write_comparison

        print(f"Page: {write_comparison([item for item, _ in comparisons], html)}")
    return 0


def eval_table(
    *runs: Path, mode: Literal["own", "blind", "wrong"] = "own",
    markdown: Annotated[bool, Parameter(negative="")] = False, html: Path | None = None,
) -> int:  # fmt: skip
    """One table of the scores of several models; a row has the same documents and rules for all.

    Parameters
    ----------
    runs
        Run folders, one for each model.
    mode
        Pictures that were shown.
    markdown
        Print it as Markdown.
    html
        Also write it as an HTML page.
    """
    from mm_moslora_eval.report.shared_results import as_markdown, as_text, models_table

    if not runs:
        raise ConfigError("No run was given. Name the run folders of the models.")
    table = models_table(runs, mode=mode)
    print(as_markdown(table) if markdown else as_text(table))
    if html is not None:
        from mm_moslora_eval.report.evaluation_page import write_models

        print(f"Page: {write_models(table, html)}")
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
