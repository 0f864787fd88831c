"""Golden values of whole sets: POPE, MME, HallusionBench, MMBench, MMStar, captions, and judged sets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.sources.document import Document

from tests.eval.golden_answers import Check, Row, block, by_question, references
from tests.eval.protocol_runs import Runs


def pope_documents(samples: Sequence[Row], category: str | None = None) -> list[Document]:
    return [
        Document(id=str(number), question="q", answers=(row["answer"],), category=category or row["category"])
        for number, row in enumerate(samples)
    ]


def predictions(samples: Sequence[Row]) -> list[str]:
    return [row["prediction"] for row in samples]


def pope_llava(row: Row, runs: Runs) -> Any:
    """One of LLaVA's three files; where its script divides by zero the score is 0, as `differences` states."""
    run = runs("pope@llava", pope_documents(row["samples"], "one"), predictions(row["samples"]))
    if row["expected"] == "ZeroDivisionError":
        assert run.result.score == 0.0
        assert any("without a denominator are 0" in text for text in get_task("pope@llava").differences)
        return row["expected"]
    return {name: run.result.metrics[f"{name.lower()}_one"] for name in row["expected"]}


def pope_lmms_eval(row: Row, runs: Runs) -> Any:
    return runs("pope@lmms_eval", pope_documents(row["samples"]), predictions(row["samples"])).result.metrics


def pope_vlmevalkit(row: Row, runs: Runs) -> Any:
    metrics = runs("pope@vlmevalkit", pope_documents(row["samples"]), predictions(row["samples"])).result.metrics
    rates = {"f1": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
    return {
        split: {
            short: 100 * metrics[rate if split == "Overall" else f"{rate}_{split}"] for short, rate in rates.items()
        }
        for split in row["expected"]
    }


def mme(name: str, pair: str) -> Callable[[Row, Runs], dict[str, float]]:
    def check(row: Row, runs: Runs) -> dict[str, float]:
        made = [
            Document(
                id=str(number), question="q", answers=(item["answer"],), category=item["category"],
                extra={pair: item["question_id"]},
            )
            for number, item in enumerate(row["samples"])
        ]  # fmt: skip
        return runs(name, made, predictions(row["samples"])).result.metrics

    return check


def mme_lmms_eval(row: Row, runs: Runs) -> Any:
    metrics = mme("mme@lmms_eval", "question_id")(row, runs)
    return {f"mme_{name}_score": metrics[name] for name in ("perception", "cognition")}


def mme_vlmevalkit(row: Row, runs: Runs) -> Any:
    metrics = mme("mme@vlmevalkit", "image_path")(row, runs)
    return {"reasoning" if name == "cognition" else name: value for name, value in metrics.items()}


def hallusionbench(name: str, row: Row, runs: Runs) -> dict[str, float]:
    """The columns of VLMEvalKit's file, which both protocols read."""
    made = [
        Document(
            id=item["index"], question="q", answers=(item["answer"],), category=item["category"],
            extra={"l2-category": item["subcategory"]},
        )
        for item in row["samples"]
    ]  # fmt: skip
    return runs(name, made, predictions(row["samples"])).result.metrics


def hallusionbench_vlmevalkit(row: Row, runs: Runs) -> Any:
    metrics = hallusionbench("hallusionbench@vlmevalkit", row, runs)
    return {
        split: {share: 100 * metrics[share if split == "Overall" else f"{share}_{split}"] for share in values}
        for split, values in row["expected"].items()
    }


def circular(row: Row, runs: Runs) -> Any:
    said = row["source"]
    protocol = "moslora" if "8106439" in said.split("can_infer from")[-1] else "vlmevalkit"
    name = f"mmbench_en_dev@{'lmms_eval' if 'mmbench_evals' in said else protocol}"
    made = {
        item["index"]: Document(
            id=str(item["index"]), question="q", answers=(item["answer"],), category=item["category"],
            options={key: item[key] for key in "ABCDE" if item.get(key)}, extra={"l2-category": item["l2-category"]},
        )
        for item in row["samples"]
    }  # fmt: skip
    said_to = {item["index"]: item["prediction"] for item in row["samples"]}
    run = runs(name, list(made.values()), list(said_to.values()))
    if "hits" in row["expected"]:
        hits = {sample["id"]: int(sample["score"]) for sample in run.samples}
        return {"accuracy": run.result.metrics["vanilla"], "hits": hits}
    groups: dict[str, list[int]] = defaultdict(list)
    for item in row["samples"]:
        groups[str(item["g_index"])].append(item["index"])
    ours: dict[str, Any] = {}
    if "group_hits" in row["expected"]:
        ours["group_hits"] = {
            group: int(runs(name, [made[n] for n in rotations], [said_to[n] for n in rotations]).result.score)
            for group, rotations in groups.items()
        }
    report: dict[str, Any] = {"split": ["dev"], "Overall": [run.result.score]}
    ours["report"] = report | {column: [numbers["score"]] for column, numbers in run.result.categories.items()}
    return ours


def mmstar(row: Row, runs: Runs) -> Any:
    made = [
        Document(
            id=str(number), question="q", answers=(item["answer"],), category=item["category"],
            extra={"l2_category": item["l2_category"]},
        )
        for number, item in enumerate(row["samples"])
    ]  # fmt: skip
    return runs("mmstar@lmms_eval", made, predictions(row["samples"])).result.metrics


def captions(name: str, *, tokenised: bool) -> Callable[[Row, Runs], Any]:
    def check(row: Row, runs: Runs) -> Any:
        given, people = row["prediction"], row["references"]
        made = [Document(id=str(n), question="q", answers=tuple(texts)) for n, texts in enumerate(people)]
        metrics = runs(name, made, given).result.metrics
        if tokenised:
            split = block(name, "ptb_tokeniser.tokenize")
            given, people = [split(text) for text in given], [[split(text) for text in texts] for texts in people]
            assert given == row.get("tokenized_predictions", given)
            assert people == row.get("tokenized_references", people)
        return {
            "Bleu": [metrics[f"bleu_{order}"] for order in (1, 2, 3, 4)],
            "ROUGE_L": metrics["rouge_l"],
            "CIDEr": metrics["cider"],
            "CIDEr_per_image": block(name, "caption.cider")(given, people),
        }

    return check


def judged_documents(samples: Sequence[Row]) -> list[Document]:
    return [
        Document(
            id=str(number), question=f"golden {number};", answers=("reference",), category=item.get("category"),
            extra={"gpt4_ans": "reference"},
        )
        for number, item in enumerate(samples)
    ]  # fmt: skip


def judged_alone(name: str, rows: Sequence[Row], column: str, runs: Runs) -> list[Row | None]:
    """The sample of every row in a run of its own; None where the judge cannot be read: such a run is unscored.

    The sources give a number to these rows; `differences` states that the answers are left out here.
    """
    assert any("is left out of the score" in text or "is then left out" in text for text in get_task(name).differences)
    samples: list[Row | None] = []
    for number, document in enumerate(judged_documents(rows)):
        run = runs(name, [document], ["answer"], judge=by_question(rows, column))
        assert run.result.scored == (run.scores[0] is not None), rows[number]
        samples.append(run.samples[0] if run.result.scored else None)
    return samples


def llavabench_ratings(name: str) -> Check:
    def check(rows: list[Row], runs: Runs) -> list[Any]:
        found = judged_alone(name, rows, "judge_output", runs)
        return [[-1.0, -1.0] if sample is None else sample["numbers"] for sample in found]

    return check


def llavabench_summary(row: Row, runs: Runs) -> Any:
    rated = [item | {"said": " ".join(map(str, item["tuple"]))} for item in row["samples"]]
    run = runs("llavabench@llava", judged_documents(rated), ["answer"] * len(rated), judge=by_question(rated, "said"))
    metrics = run.result.metrics
    kinds = ("", "reference_", "answer_")
    return {name: [100 * metrics[f"{kind}{name}"] for kind in kinds] for name in row["expected"]}


def mmvet_grades(rows: list[Row], runs: Runs) -> list[Any]:
    """`nan` is a grade in VLMEvalKit and not here, as `differences` states."""
    name = "mmvet@vlmevalkit"
    found = judged_alone(name, rows, "judge_outputs", runs)
    assert any("`nan` is none" in text for text in get_task(name).differences)
    return [
        sample["score"] if sample is not None else "NaN" if row["expected"] == "NaN" else 0.0
        for row, sample in zip(rows, found, strict=True)
    ]


def mmvet_aggregate(row: Row, runs: Runs) -> Any:
    graded = [item | {"said": str(item["score"])} for item in row["samples"]]
    documents = judged_documents(graded)
    run = runs("mmvet@vlmevalkit", documents, ["answer"] * len(graded), judge=by_question(graded, "said"))
    metrics = {name: 100 * value for name, value in run.result.metrics.items()}
    kinds = {"by_capability": "", "by_integration": "combination_"}
    return {kind: {name: metrics[f"{kinds[kind]}{name}"] for name in row["expected"][kind]} for kind in kinds}


def mmvet_tail(row: Row, runs: Runs) -> Any:
    """The wording is this project's own; its last line is that of MM-Vet's table, also where none is sent."""
    (reference,) = references(row) if "references" in row else (row["answer"],)
    asked: list[str] = []
    document = Document(id="1", question=row["question"], answers=(reference,), category="rec")
    runs("mmvet@vlmevalkit", [document], [row["prediction"]], judge=lambda text, _: asked.append(text) or "1.0")
    line = block("mmvet@vlmevalkit", "rules.mmvet_table_row")
    text = asked[0] if asked else line(row["question"], reference, row["prediction"])
    return text[-len(row["expected"]) :]
