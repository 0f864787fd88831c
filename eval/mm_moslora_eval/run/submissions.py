"""Writes answers in the formats of evaluation servers and other harnesses."""

from __future__ import annotations

from pathlib import Path

from mm_moslora.utils.errors import EvalError, suggestion
from mm_moslora.utils.files import replacing
from mm_moslora.utils.folder_marks import output_file
from mm_moslora_eval.run.answer_log import read_folder
from mm_moslora_eval.run.scored_subsets import documents_of, find_view
from mm_moslora_eval.scoring.scored_sample import without_thinking
from mm_moslora_eval.scoring.submission_forms import form_of_task, submission_forms


def write_submission(folder: Path, out: Path, *, form: str) -> int:
    """Write the answers of a view, or of TASK@PROTOCOL/MODE of a run, in one of `submission_forms`."""
    content, missing = submission(folder, form=form)
    output_file(out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        part.write_bytes(content)
    return missing


def keep_submission(view: Path, task: str) -> str:
    """Write the answers of a view into its folder, in the form that fits the task; returns a sentence about it."""
    form = form_of_task(task)
    path = view / f"submission.{submission_forms()[form].suffix}"
    with replacing(path) as part:  # a file of the run itself, which scoring again may replace
        part.write_bytes(submission(view, form=form)[0])
    return f"The answers were written to {path} in the form {form!r}."


def submission(folder: Path, *, form: str) -> tuple[bytes, int]:
    """The content of a submission file, and the number of documents without an answer."""
    forms = submission_forms()
    if form not in forms:
        raise EvalError(f"No submission form {form!r}.{suggestion(form, forms)} Known: {', '.join(forms)}.")
    view = find_view(folder)
    documents = documents_of(view)
    answers = read_folder(view.parent)
    missing = [row["id"] for row in documents if row["key"] not in answers]
    if missing:
        raise EvalError(f"{folder}: {len(missing)} documents have no answer yet (first: {missing[0]!r}); run it again.")
    rows = [row | {"text": without_thinking(answers[row["key"]]["text"] or "").text} for row in documents]
    return forms[form].write(rows), sum(answers[row["key"]]["text"] is None for row in documents)
