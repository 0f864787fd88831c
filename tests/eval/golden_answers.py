"""Golden values of single answers: extraction and metric of shipped protocols, row by row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.sources.document import Document

from tests.eval.protocol_runs import Run, Runs, functions_of

Row = dict[str, Any]
Check = Callable[[list[Row], Runs], list[Any]]
LETTERS = ("A", "B", "C", "D")
UNREADABLE = "\N{CURRENCY SIGN}"
"""An answer in which no rule finds anything."""


def same(ours: Any, theirs: Any) -> bool:
    """Equal, floats at 1e-9 relative; `false`, `""` and null all mean "nothing inferred"."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list) and isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    if ours is None:
        return theirs in (None, False, "")
    if isinstance(ours, float) and theirs in ("NaN", "Infinity", "-Infinity"):
        return _same_special(ours, theirs)
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-15)
    return bool(ours == theirs)


def _same_special(value: float, name: str) -> bool:
    return math.isnan(value) if name == "NaN" else math.isinf(value) and (value > 0) == (name == "Infinity")


def block(name: str, function: str) -> Callable[..., Any]:
    """The function of a step that a shipped protocol calls, by `module.name`."""
    return functions_of(get_task(name))[function]


def each(check: Callable[[Row], Any]) -> Check:
    return lambda rows, _: [check(row) for row in rows]


def step(name: str, function: str) -> Check:
    """The value of one step of a protocol for every row."""
    return each(lambda row: block(name, function)(row["prediction"]))


def options(row: Row) -> dict[str, str]:
    given = row["options"]
    return given if isinstance(given, dict) else dict(zip("ABCDEFGH", given or (), strict=False))


def choice(row: Row, number: int) -> Document:
    named = options(row)
    return Document(id=str(number), question="q", options=named, answers=(next(iter(named), "A"),))


def references(row: Row) -> tuple[str, ...]:
    given = row["references"]
    return (given,) if isinstance(given, str) else tuple(given)


def open_question(row: Row, number: int) -> Document:
    return Document(id=str(number), question="q", answers=references(row), category=row.get("category"))


def run_rows(name: str, rows: Sequence[Row], runs: Runs, document: Callable[[Row, int], Document]) -> Run:
    made = [document(row, number) for number, row in enumerate(rows)]
    return runs(name, made, [row["prediction"] for row in rows])


def letters(name: str) -> Check:
    return lambda rows, runs: [text or None for text in run_rows(name, rows, runs, choice).parsed]


def one_by_one(metric: Callable[..., float], row: Row) -> float:
    return max(metric(row["prediction"], reference) for reference in references(row))


def all_at_once(metric: Callable[..., float], row: Row) -> float:
    return metric(row["prediction"], references(row))


def with_category(metric: Callable[..., float], row: Row) -> float:
    return metric(row["prediction"], references(row), row.get("category") or "")


def scores(name: str, function: str, call: Callable[[Callable[..., float], Row], float] = one_by_one) -> Check:
    """Scores of open questions.

    The sources strip answers before they score them: LLaVA and VLMEvalKit where they are written, lmms-eval before its
    metrics; so do the protocols, and an empty answer is wrong. A row with space around its answer or with none holds
    what the bare function makes of it.

    Args:
        name: TASK@PROTOCOL.
        function: the metric that the protocol calls, by `module.name`.
        call: how it takes the references.
    """

    def check(rows: list[Row], runs: Runs) -> list[Any]:
        metric = block(name, function)
        found = run_rows(name, rows, runs, open_question).scores
        assert not any(score for row, score in zip(rows, found, strict=True) if not row["prediction"].strip())
        bare = [padded(row) or not row["prediction"] for row in rows]
        return [call(metric, row) if odd else score for row, score, odd in zip(rows, found, bare, strict=True)]

    return check


def padded(row: Row) -> bool:
    return bool(row["prediction"] != row["prediction"].strip())


def by_letter(name: str, rows: Sequence[Row], runs: Runs, letters: Sequence[str] = LETTERS) -> list[dict[str, Any]]:
    """The score of every answer for every letter that might be right."""
    asked = [(row, letter) for row in rows for letter in letters]
    named = dict.fromkeys(letters, "text")
    made = [
        Document(id=str(number), question="q", options=named, answers=(letter,))
        for number, (_, letter) in enumerate(asked)
    ]
    found = runs(name, made, [row["prediction"] for row, _ in asked]).scores
    return [
        dict(zip(letters, found[start : start + len(letters)], strict=True))
        for start in range(0, len(found), len(letters))
    ]


def mmbench_stages(rows: list[Row], runs: Runs) -> list[Any]:
    """The file holds the first of two stages; the second stage, MMStar's extractor, reads what the first cannot."""
    found = run_rows("mmbench_en_dev@lmms_eval", rows, runs, choice).parsed
    second = run_rows("mmstar@lmms_eval", rows, runs, choice).parsed
    left_open = [row["expected"] in (False, "", None) for row in rows]
    read_on = [text for text, later, left in zip(found, second, left_open, strict=True) if left and text != later]
    assert not read_on, read_on
    return [None if left else text for text, left in zip(found, left_open, strict=True)]


def ai2d(rows: list[Row], runs: Runs) -> list[Any]:
    name = "ai2d@lmms_eval"
    found = by_letter(name, rows, runs)
    parsed = run_rows(name, [row | {"options": dict.fromkeys(LETTERS, "text")} for row in rows], runs, choice).parsed
    filtered, score = block(name, "rules.ai2d_filter"), block(name, "rules.ai2d_lmms_eval")
    for number, row in enumerate(rows):
        if padded(row):
            found[number] = {letter: score(row["prediction"], letter) for letter in LETTERS}
            parsed[number] = filtered(row["prediction"])
    return [{"filtered": text, "score": values} for text, values in zip(parsed, found, strict=True)]


def scienceqa_llava(rows: list[Row], runs: Runs) -> list[Any]:
    name = "scienceqa_img@llava"
    parsed = run_rows(name, rows, runs, choice).parsed
    ours = []
    for row, text in zip(rows, parsed, strict=True):
        read = block(name, "rules.scienceqa_llava")(row["prediction"], options(row)) if padded(row) else text
        known = list(options(row))
        ours.append({"parsed": read or "FAILED", "pred_index": known.index(read) if read in known else -1})
    return ours


def seedbench(rows: list[Row], runs: Runs) -> list[Any]:
    name = "seedbench_image@lmms_eval"
    parsed = run_rows(name, [row | {"options": dict.fromkeys(LETTERS, "text")} for row in rows], runs, choice).parsed
    return [{"pred": text, "score": values} for text, values in zip(parsed, by_letter(name, rows, runs), strict=True)]


def yes_no(name: str) -> Check:
    def document(row: Row, number: int) -> Document:
        return Document(id=str(number), question="q", answers=("yes",), category="existence")

    return lambda rows, runs: run_rows(name, rows, runs, document).parsed


def yes_no_pope_lmms_eval(rows: list[Row], runs: Runs) -> list[Any]:
    ours = []
    for row, text in zip(rows, yes_no("pope@lmms_eval")(rows, runs), strict=True):
        verdicts = {f"score_if_{word}": float(text == word) for word in ("no", "yes")}
        ours.append({"normalized": text or row["prediction"].lower().strip()} | verdicts)
    return ours


def named(check: Check, names: Callable[[str], str]) -> Check:
    return lambda rows, runs: [names(text) for text in check(rows, runs)]


def commonsense_answers(rows: list[Row], runs: Runs) -> list[Any]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[f"commonsense_{row['dataset'].lower().replace('-', '_')}@official"].append(number)
    ours: dict[int, str] = {}
    for name, numbers in groups.items():
        made = [Document(id=str(number), question="q", answers=("a",)) for number in numbers]
        found = runs(name, made, [rows[number]["prediction"] for number in numbers]).parsed
        ours |= dict(zip(numbers, found, strict=True))
    return [ours[number] for number in range(len(rows))]


def mmmu_open(rows: list[Row], runs: Runs) -> list[Any]:
    name = "mmmu_val@official"
    for row in rows:
        parsed = block(name, "rules.parse_open")(row["prediction"])
        assert "parsed" not in row or same(sorted(parsed, key=str), sorted(row["parsed"], key=str)), row
    return run_rows(name, rows, runs, open_question).scores


def mmmu_real(rows: list[Row], runs: Runs) -> list[Any]:
    closed = [row for row in rows if row.get("options")]
    ours = dict(zip(map(id, closed), letters("mmmu_val@official")(closed, runs), strict=True))
    others = [row for row in rows if not row.get("options")]
    ours |= dict(zip(map(id, others), mmmu_open(others, runs), strict=True))
    return [ours[id(row)] for row in rows]


def mathvista_extra(row: Row) -> dict[str, str]:
    extra = {"question_type": row["question_type"], "answer_type": row["answer_type"]}
    return extra | ({"precision": str(row["precision"])} if row.get("precision") is not None else {})


def mathvista_official(rows: list[Row], runs: Runs) -> list[Any]:
    """The rows hold extracted answers, so a judge extracts them; nothing extracted stays wrong here."""

    def document(number: int, row: Row) -> Document:
        choices = options(row)
        (gold,) = references(row)
        answer = next((letter for letter, text in choices.items() if text == gold), gold)
        question, extra = f"golden {number};", mathvista_extra(row)
        return Document(id=str(number), question=question, options=choices, answers=(answer,), extra=extra)

    made = [document(number, row) for number, row in enumerate(rows)]
    name = "mathvista_testmini@lmms_eval_solution"
    assert any("empty answer is wrong" in text for text in get_task(name).differences)
    run = runs(name, made, [UNREADABLE] * len(rows), judge=by_question(rows, "prediction", nothing="none"))
    return [
        {
            "normalized": row["expected"]["normalized"] if not row["prediction"].strip() else text or None,
            "correct": bool(score),
        }
        for row, text, score in zip(rows, run.parsed, run.scores, strict=True)
    ]


def mathvista_vlmevalkit(rows: list[Row], runs: Runs) -> list[Any]:
    def document(number: int, row: Row) -> Document:
        extra = mathvista_extra(row) | ({"choices": repr(list(row["options"]))} if row["options"] else {})
        return Document(id=str(number), question=f"golden {number};", answers=references(row), extra=extra)

    name = "mathvista_testmini@vlmevalkit"
    made = [document(number, row) for number, row in enumerate(rows)]
    prefetched = runs(name, made, [row["prediction"] for row in rows]).parsed
    judge = by_question(rows, "prediction", nothing="none")
    judged = runs(name, made, [UNREADABLE] * len(rows), judge=judge).scores
    return [
        {"prefetch": _value(text, row["expected"]["prefetch"]), "correct_if_used_as_extraction": bool(score)}
        for row, text, score in zip(rows, prefetched, judged, strict=True)
    ]


def _value(text: str, like: Any) -> Any:
    """A value that a file of samples holds as text, of the type that the golden row has."""
    return type(like)(text) if text and type(like) in (int, float) else text or None


def by_question(rows: Sequence[Row], column: str, *, nothing: str = "") -> Callable[[str, float], str]:
    """A judge that replies with a column of the row that the question names, or with `nothing` where it is empty."""

    def reply(prompt: str, temperature: float) -> str:
        number = int(prompt.rsplit("golden ", 1)[1].split(";", 1)[0])
        said = rows[number][column]
        text = str(said if isinstance(said, str) else (said + [""] * 5)[round(temperature * 2)])
        return text if text.strip() else nothing

    return reply


def whole(check: Callable[[Row, Runs], Any]) -> Check:
    return lambda rows, runs: [check(row, runs) for row in rows]
