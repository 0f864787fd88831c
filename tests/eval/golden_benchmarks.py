"""Golden values of single benchmarks: their readers of letters, their counts, and their scores of whole sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mm_moslora_eval.sources.document import Document

from tests.eval.golden_answers import Check, Row, block, options, run_rows, step
from tests.eval.protocol_runs import Runs

PARTS = {"category": "all", "ID": "p", "key": "2steps_1", "qid": "1", "question_type": "reasoning"}
"""Columns that aggregations of these benchmarks need."""


def _document(number: int, answer: str, row: Row, **extra: str) -> Document:
    given = options(row) if row.get("options") else {}
    shared = {key: value for key, value in PARTS.items() if key != "category"}
    return Document(
        id=str(number),
        question="q",
        options=given,
        answers=(answer,),
        category=PARTS["category"],
        extra=shared | extra,
    )


def read_letters(name: str) -> Check:
    """What a protocol reads in each answer."""

    def check(rows: list[Row], runs: Runs) -> list[Any]:
        return run_rows(name, rows, runs, lambda row, number: _document(number, "A", row)).parsed

    return check


def naturalbench_letters(rows: list[Row], runs: Runs) -> list[Any]:
    def document(row: Row, number: int) -> Document:
        return _document(number, "A", row, Question_Type=row["kind"])

    return run_rows("naturalbench@lmms_eval", rows, runs, document).parsed


mmmu_pro_stage = step("mmmu_pro_standard@vlmevalkit_cot", "rules.behind_answer")
latex_values = step("mathvision_test@official", "latex_value.latex_value")


def latex_value(rows: list[Row], runs: Runs) -> list[Any]:
    """To two decimals, as the source compares values."""
    return [None if value is None else round(value, 2) for value in latex_values(rows, runs)]


def mathvision(rows: list[Row], runs: Runs) -> list[Any]:
    run = run_rows(
        "mathvision_test@official", rows, runs, lambda row, number: _document(number, row["references"], row)
    )
    return [{"answer": text, "correct": bool(score)} for text, score in zip(run.parsed, run.scores, strict=True)]


def _scores(name: str, rows: Sequence[Row], runs: Runs, *columns: str) -> list[Any]:
    """Scores of open answers; the columns of a row are columns of its document."""

    def document(row: Row, number: int) -> Document:
        return _document(number, row["references"], row, **{own: row[key] for key, own in map(_pair, columns)})

    return run_rows(name, rows, runs, document).scores


def _pair(column: str) -> tuple[str, str]:
    key, _, own = column.partition("=")
    return key, own


def countbench(rows: list[Row], runs: Runs) -> list[Any]:
    each = {name: _scores(f"countbench@{name}", rows, runs) for name in ("lmms_eval", "vlmevalkit")}
    return [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]


def pixmo_count(rows: list[Row], runs: Runs) -> list[Any]:
    return _scores("pixmo_count@lmms_eval", rows, runs)


def dynamath(rows: list[Row], runs: Runs) -> list[Any]:
    """An answer in which nothing is read is wrong, and so is an empty one, which lies within every text there."""
    found = _scores("dynamath@vlmevalkit", rows, runs, "kind=answer_type")
    read = block("dynamath@vlmevalkit", "rules.short_answer")
    unread = [
        not read(row["prediction"], row["kind"]).strip() or '"short answer": ""' in row["prediction"] for row in rows
    ]
    return [row["expected"] if odd else bool(score) for row, score, odd in zip(rows, found, unread, strict=True)]


def wemath(row: Row, runs: Runs) -> Any:
    made = [
        _document(number, "A", {"options": ["x", "y"]}, ID=name, key=key)
        for number, (name, key, _) in enumerate(row["rows"])
    ]
    said = ["AB"[1 - right] for _, _, right in row["rows"]]
    return {
        kind: runs(f"wemath_testmini@vlmevalkit{more}", made, said).result.score
        for kind, more in (("strict", ""), ("loose", "_loose"))
    }


def naturalbench_shares(row: Row, runs: Runs) -> Any:
    said = [answer for group in row["said"] for answer in group]
    made = [
        _document(number, ("Yes", "No", "No", "Yes")[number % 4], {}, Question_Type="yes_no")
        for number in range(len(said))
    ]
    result = runs("naturalbench@lmms_eval", made, [{1: "Yes", 0: "No", -1: "maybe"}[answer] for answer in said]).result
    numbers = result.metrics
    return {
        "Q_Acc": numbers["question"],
        "I_Acc": numbers["image"],
        "Acc": numbers["vanilla"],
        "G_Acc": result.score,
    }


def cv_bench(row: Row, runs: Runs) -> Any:
    made = [
        _document(number, "A", {"options": ["x", "y"]}, source=name, type="3D" if name == "Omni3D" else "2D")
        for number, (name, _) in enumerate(row["rows"])
    ]
    return runs("cv_bench@official", made, ["AB"[1 - right] for _, right in row["rows"]]).result.score


def ccocr(rows: list[Row], runs: Runs) -> list[Any]:
    """To six digits, since the source adds small numbers against divisions by zero."""

    def document(row: Row, number: int) -> Document:
        made = _document(number, row["references"], {}, split=row["split"])
        return replace(made, category=row["group"])

    return [round(score, 6) for score in run_rows("ccocr_scenes@vlmevalkit", rows, runs, document).scores]


def _reading(row: Row, number: int) -> Document:
    extra = {name: row[name] for name in ("eval", "bbox", "content") if name in row}
    made = {"question": row["question"], "answers": (row["references"],), "category": row["kind"]}
    return Document(id=str(number), extra=extra, **made)


def ocrbench_v2(rows: list[Row], runs: Runs) -> list[Any]:
    """A blank answer scores 0, where the source finds the lines of a document in it."""
    found = run_rows("ocrbench_v2_en@official", rows, runs, _reading).scores
    return [score if row["prediction"].strip() else row["expected"] for row, score in zip(rows, found, strict=True)]


def ocrbench_v2_averages(row: Row, runs: Runs) -> Any:
    run = run_rows(f"ocrbench_v2_{row['language']}@official", row["rows"], runs, _reading)
    return {"score": run.result.score} | {
        name: run.result.metrics.get(name) for name in row["expected"] if name != "score"
    }


class GivenLexicon:
    """The words, stems and synonyms of a row, so that no other package is needed."""

    def __init__(self, row: Row) -> None:
        self._row = row

    def words(self, *texts: str) -> list[list[str]]:
        return [self._row["words"][text] if "words" in self._row else text.split() for text in texts]

    def stem(self, word: str) -> str:
        return str(self._row.get("stems", {}).get(word, word))

    def synonyms(self, word: str) -> list[str]:
        return list(self._row.get("synonyms", {}).get(word, ()))


def ocrbench_v2_pages(rows: list[Row], runs: Runs) -> list[Any]:
    parts = block("ocrbench_v2_en@official", "rules.page_parts")
    return [parts(row["prediction"], row["references"], GivenLexicon(row)) for row in rows]


def _about(ours: float, theirs: float) -> float:
    """The value of the source, where only the small numbers differ that it adds against divisions by zero."""
    return theirs if abs(ours - theirs) < 2e-6 else ours


def ccocr_fields(rows: list[Row], runs: Runs) -> list[Any]:
    each = {
        key: run_rows(
            f"ccocr_fields@{name}", rows, runs, lambda row, number: _document(number, row["references"], row, split="s")
        ).scores
        for key, name in (("f1", "official"), ("tree", "vlmevalkit"))
    }
    return [
        {key: _about(values[number], row["expected"][key]) for key, values in each.items()}
        for number, row in enumerate(rows)
    ]


def ccocr_fields_sets(row: Row, runs: Runs) -> Any:
    made = [_document(number, wanted, {}, split=split) for number, (split, _, wanted) in enumerate(row["rows"])]
    return _about(
        runs("ccocr_fields@official", made, [said for _, said, _ in row["rows"]]).result.score, row["expected"]
    )


def ccocr_documents(rows: list[Row], runs: Runs) -> list[Any]:
    def document(row: Row, number: int) -> Document:
        return _document(number, row["references"], {}, split="s", **{"l2-category": row["kind"]})

    return run_rows("ccocr_documents@official", rows, runs, document).scores


def counting_letters(name: str) -> Check:
    """The letters that count as the answer."""

    def check(rows: list[Row], runs: Runs) -> list[Any]:
        found = run_rows(name, rows, runs, lambda row, number: _document(number, "A", row)).parsed
        known = [sorted(set(text.split(", ")) & options(row).keys()) for row, text in zip(rows, found, strict=True)]
        return [", ".join(letters) for letters in known]

    return check


def mathvision_equal_vlmevalkit(rows: list[Row], runs: Runs) -> list[Any]:
    """The source evaluates both sides as Python, where `a` and `b` are the other side, and roots and pi unknown."""
    found = _scores("mathvision_test@vlmevalkit", rows, runs)
    odd = [
        {row["prediction"].strip().lower(), row["references"].lower()} & {"a", "b"}
        or (score and any(sign in row["prediction"] + row["references"] for sign in ("sqrt", "pi", "^")))
        for row, score in zip(rows, found, strict=True)
    ]
    return [row["expected"] if left else bool(score) for row, score, left in zip(rows, found, odd, strict=True)]


def lvbench_accuracy(row: Row, runs: Runs) -> Any:
    made = [
        _document(number, letter, {"options": "ABCD"}, question_type=", ".join(types))
        for number, (types, letter, _) in enumerate(row["rows"])
    ]
    result = runs("lvbench@official", made, [said for _, _, said in row["rows"]]).result
    return {"acc": result.score, **result.metrics}


def nlvr2(row: Row, runs: Runs) -> Any:
    made = []
    for name, label, _ in row["rows"]:
        parts = dict(zip(("split", "set", "pair", "sentence_number"), name.split("-"), strict=True))
        made.append(Document(id=name, question="q", answers=(label,), extra=parts))
    result = runs("nlvr2_test@official", made, [said for _, _, said in row["rows"]]).result
    return {"accuracy": result.score, "consistency": result.metrics["consistency"]}


def simplevqa(row: Row, runs: Runs) -> Any:
    verdicts = {"正确": "Correct.", "错误": "incorrect", "未尝试": "not attempted"}
    made = [Document(id=str(number), question=f"q{number}#", answers=("a",)) for number in range(len(row["said"]))]

    def judge(prompt: str, _: float) -> str:
        return verdicts[row["said"][next(n for n in range(len(made)) if f"Question: q{n}#" in prompt)]]

    result = runs("simplevqa@vlmevalkit", made, ["b"] * len(made), judge=judge).result
    return {"correct": result.score, **{name: result.metrics[name] for name in row["expected"] if name != "correct"}}
