"""MM-Vet: a judge's grades, and their means by capability and combination."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from mm_moslora_eval.metrics.metric_text import plain_number
from mm_moslora_eval.scoring.estimates import mean_of
from mm_moslora_eval.scoring.rule_forms import Grade, JudgeRule
from mm_moslora_eval.scoring.scored_sample import Numbers, Samples, Summed
from mm_moslora_eval.scoring.submission_forms import Submission, as_json
from mm_moslora_eval.sources.document import Document

MMVET_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def mmvet_grade(reply: str) -> float | None:
    """MM-Vet's grade: a reply of nothing but a number from 0 to 1."""
    value = plain_number(reply)
    return value if value is not None and 0 <= value <= 1 else None


def mmvet_grade_vlmevalkit(reply: str) -> float | None:
    """The same: a reply that `float` reads. Unlike in VLMEvalKit, `nan` is no grade."""
    try:
        grade = float(reply)
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def mmvet_grade_lmms_eval(reply: str) -> float | None:
    """The same: the first word of the reply."""
    return mmvet_grade_vlmevalkit(reply.strip().split(" ")[0])


def mmvet_table_row(question: str, reference: str, prediction: str) -> str:
    """The last line of MM-Vet's table for the judge, which continues it with the grade."""
    spaced = reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return " | ".join([question, spaced, prediction, ""])


def mmvet_scores(grades: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """Mean grade times 100 by capability and by combination, from pairs of capabilities (with commas) and grade."""
    capabilities: dict[str, list[float]] = defaultdict(list)
    combinations: dict[str, list[float]] = defaultdict(list)
    for category, grade in grades:
        # By substring, as in the source: no capability's name is a part of another's.
        for name in (*(name for name in MMVET_CAPABILITIES if name in category), "Overall"):
            capabilities[name].append(grade)
        for name in (category.replace(",", "_"), "Overall"):
            combinations[name].append(grade)
    return {"by_capability": _percent(capabilities), "by_integration": _percent(combinations)}


def mmvet_scores_vlmevalkit(grades: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """VLMEvalKit's table: one tally serves both halves, so a question with a single capability counts twice."""
    tally: dict[str, list[float]] = defaultdict(list)
    combinations = []
    for category, grade in grades:
        names = [name for name in MMVET_CAPABILITIES if name in category]
        combinations.append(category.replace(",", "_"))
        for name in (*names, "Overall", combinations[-1]):
            tally[name].append(grade)
    means = _percent(tally)
    return {
        "by_capability": {name: means[name] for name in (*MMVET_CAPABILITIES, "Overall") if name in means},
        "by_integration": {name: means[name] for name in dict.fromkeys((*combinations, "Overall"))},
    }


def _percent(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) * 100 for name, values in groups.items()}


_MMVET = """\
You grade answers to questions about pictures. Compare the answer with the reference and give a score between 0.0 (all \
wrong) and 1.0 (all right) in steps of 0.1. <AND> in the reference joins parts that must all be there; <OR> joins \
alternatives of which one is enough. Judge what is said, not how it is worded. Complete the last row of the table with \
its score, a number and nothing else.

question | reference | answer | score
--- | --- | --- | ---
What is in the bowl and what is beside it? | an apple <AND> a spoon | There is an apple in the bowl. | 0.5
What does the sign say? | stop <OR> halt | The sign reads "STOP". | 1.0
How many birds are on the wire? | 4 | There are seven birds. | 0.0
"""


def mmvet(samples: Samples) -> Summed:
    """MM-Vet: the mean grade, with that of every capability and combination (each 0 to 1)."""
    return _mmvet(samples, mmvet_scores)


def mmvet_vlmevalkit(samples: Samples) -> Summed:
    """The same with VLMEvalKit's table, in which one tally serves capabilities and combinations."""
    return _mmvet(samples, mmvet_scores_vlmevalkit)


def _mmvet(samples: Samples, tabulate: Callable[[Iterable[tuple[str, float]]], dict[str, Numbers]]) -> Summed:
    table = tabulate((s.document.category or "", s.score) for s in samples)
    numbers = {name: value / 100 for name, value in table["by_capability"].items()}
    numbers |= {f"combination_{name}": value / 100 for name, value in table["by_integration"].items()}
    return Summed(ratios=[mean_of([sample.score for sample in samples])], metrics=numbers)


def _prompt(document: Document, answer: str) -> str:
    return _MMVET + mmvet_table_row(document.question, "<OR>".join(document.answers), answer)


def _grader(read: Callable[[str], float | None]) -> JudgeRule[float]:
    return JudgeRule(
        wording=_MMVET, prompt=_prompt, read=read, max_tokens=8,
        grade=lambda value, reply: Grade(score=value, parsed=reply),
    )  # fmt: skip


GRADERS = {
    "mmvet_judge": _grader(mmvet_grade),
    "mmvet_judge_vlmevalkit": _grader(mmvet_grade_vlmevalkit),
    "mmvet_judge_lmms_eval": _grader(mmvet_grade_lmms_eval),
}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"mmvet": mmvet, "mmvet_vlmevalkit": mmvet_vlmevalkit}
SUBMISSIONS = {
    "mmvet": Submission(
        write=lambda rows: as_json({f"v1_{row['id'].removeprefix('v1_')}": row["text"] for row in rows})
    )
}
"""The JSON of its server."""
