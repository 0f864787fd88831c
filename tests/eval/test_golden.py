"""Every row of every golden file against what a run of the shipped task and protocol makes of its answer.

The files hold inputs and the values that the field's own implementations computed. Any file dropped into the folder
(`MM_MOSLORA_GOLDEN_DIR`, default `tests/golden`) is checked; one that no entry of `CHECKS` knows is a failure. No
metric is imported here: a value comes from a run of a task of the registry, or, where a file holds the value of a step
within a metric, from the function object that such a task calls (`block`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.scoring import error_bars
from mm_moslora_eval.sources import hf_dataset, vlmevalkit_tsv
from mm_moslora_eval.sources.document import Document

from tests.eval.protocol_runs import Run, Runs, functions_of

FOLDER = Path(os.environ.get("MM_MOSLORA_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
Row = dict[str, Any]
Check = Callable[[list[Row], Runs], list[Any]]
LETTERS = ("A", "B", "C", "D")
UNREADABLE = "\N{CURRENCY SIGN}"
"""An answer in which no rule finds anything."""


def block(name: str, function: str) -> Callable[..., Any]:
    """The function of a step that a shipped protocol calls, by `module.name`."""
    return functions_of(get_task(name))[function]


def each(check: Callable[[Row], Any]) -> Check:
    return lambda rows, _: [check(row) for row in rows]


def step(name: str, function: str) -> Check:
    """The value of one step of a protocol for every row."""
    return each(lambda row: block(name, function)(row["prediction"]))


# Answers one by one.


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
    return metric(row["prediction"], references(row), row["category"])


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
    """The file holds the first of two stages; what it leaves open is read by the second one, MMStar's extractor."""
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
    filtered, score = block(name, "multiple_choice.ai2d_filter"), block(name, "multiple_choice.ai2d_lmms_eval")
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
        read = block(name, "multiple_choice.scienceqa_llava")(row["prediction"], options(row)) if padded(row) else text
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


# MMMU and MathVista.


def mmmu_open(rows: list[Row], runs: Runs) -> list[Any]:
    name = "mmmu_val@official"
    for row in rows:
        parsed = block(name, "mmmu.parse_open")(row["prediction"])
        assert same(sorted(parsed, key=str), sorted(row["parsed"], key=str)), row
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
    run = runs(name, made, [UNREADABLE] * len(rows), judge=by_question(rows, "prediction"))
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
    judged = runs(name, made, [UNREADABLE] * len(rows), judge=by_question(rows, "prediction")).scores
    return [
        {"prefetch": _value(text, row["expected"]["prefetch"]), "correct_if_used_as_extraction": bool(score)}
        for row, text, score in zip(rows, prefetched, judged, strict=True)
    ]


def _value(text: str, like: Any) -> Any:
    """A value that a file of samples holds as text, of the type that the golden row has."""
    return type(like)(text) if text and type(like) in (int, float) else text or None


def by_question(rows: Sequence[Row], column: str) -> Callable[[str, float], str]:
    """A judge that replies with a column of the row whose number the question holds."""

    def reply(prompt: str, temperature: float) -> str:
        number = int(prompt.rsplit("golden ", 1)[1].split(";", 1)[0])
        said = rows[number][column]
        return str(said if isinstance(said, str) else (said + [""] * 5)[round(temperature * 2)])

    return reply


# Whole sets.


def pope_documents(samples: Sequence[Row], category: str | None = None) -> list[Document]:
    return [
        Document(id=str(number), question="q", answers=(row["answer"],), category=category or row["category"])
        for number, row in enumerate(samples)
    ]


def predictions(samples: Sequence[Row]) -> list[str]:
    return [row["prediction"] for row in samples]


def pope_llava(row: Row, runs: Runs) -> Any:
    """One file of LLaVA's three; where its script divides by zero ours says 0, and the protocol says so."""
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
            assert given == row["tokenized_predictions"]
            assert people == row["tokenized_references"]
        return {
            "Bleu": [metrics[f"bleu_{order}"] for order in (1, 2, 3, 4)],
            "ROUGE_L": metrics["rouge_l"],
            "CIDEr": metrics["cider"],
            "CIDEr_per_image": block(name, "caption.cider")(given, people),
        }

    return check


# Judges.


def judged_documents(samples: Sequence[Row]) -> list[Document]:
    return [
        Document(
            id=str(number), question=f"golden {number};", answers=("reference",), category=item.get("category"),
            extra={"gpt4_ans": "reference"},
        )
        for number, item in enumerate(samples)
    ]  # fmt: skip


def llavabench_ratings(name: str) -> Check:
    def check(rows: list[Row], runs: Runs) -> list[Any]:
        said = ["answer"] * len(rows)
        run = runs(name, judged_documents(rows), said, judge=by_question(rows, "judge_output"))
        return [sample["numbers"] for sample in run.samples]

    return check


def llavabench_summary(row: Row, runs: Runs) -> Any:
    rated = [item | {"said": " ".join(map(str, item["tuple"]))} for item in row["samples"]]
    run = runs("llavabench@llava", judged_documents(rated), ["answer"] * len(rated), judge=by_question(rated, "said"))
    metrics = run.result.metrics
    kinds = ("", "reference_", "answer_")
    return {name: [100 * metrics[f"{kind}{name}"] for kind in kinds] for name in row["expected"]}


def mmvet_grades(rows: list[Row], runs: Runs) -> list[Any]:
    """`nan` is a grade in VLMEvalKit and none here, as the protocol says."""
    name = "mmvet@vlmevalkit"
    judge = by_question(rows, "judge_outputs")
    run = runs(name, judged_documents(rows), ["answer"] * len(rows), judge=judge)
    assert any("`nan` is none" in text for text in get_task(name).differences)
    return [
        row["expected"] if row["expected"] == "NaN" and score == 0.0 else score
        for row, score in zip(rows, run.scores, strict=True)
    ]


def mmvet_aggregate(row: Row, runs: Runs) -> Any:
    graded = [item | {"said": str(item["score"])} for item in row["samples"]]
    documents = judged_documents(graded)
    run = runs("mmvet@vlmevalkit", documents, ["answer"] * len(graded), judge=by_question(graded, "said"))
    metrics = {name: 100 * value for name, value in run.result.metrics.items()}
    kinds = {"by_capability": "", "by_integration": "combination_"}
    return {kind: {name: metrics[f"{kinds[kind]}{name}"] for name in row["expected"][kind]} for kind in kinds}


def mmvet_tail(row: Row, runs: Runs) -> Any:
    """The wording is this project's own; its last line is that of MM-Vet's table."""
    (reference,) = references(row) if "references" in row else (row["answer"],)
    asked: list[str] = []
    document = Document(id="1", question=row["question"], answers=(reference,), category="rec")
    runs("mmvet@vlmevalkit", [document], [row["prediction"]], judge=lambda text, _: asked.append(text) or "1.0")
    return asked[0][-len(row["expected"]) :]


# Prompts and log-likelihoods.


def commonsense_prompt(row: Row, runs: Runs) -> Any:
    extra = {"input": row["input"]} if row["input"] else {}
    document = Document(id="1", question=row["instruction"], answers=("true",), extra=extra)
    return runs("commonsense_boolq@official", [document], ["true"]).samples[0]["prompt"]


LM_EVAL_NAMES = {"social_iqa": "social_i_qa", "siqa": "social_i_qa"}


def commonsense_lm_eval(row: Row, runs: Runs, folder: Path) -> Any:
    task = get_task(f"commonsense_{LM_EVAL_NAMES.get(row['task'], row['task'])}@lm_eval")
    path = folder / f"{row['task']}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps([row["doc"]]))
    (document,) = hf_dataset.load(dataclasses.replace(task.source, path=str(path))).documents
    run = runs(task.id, [document], [[0.0] * len(document.options)])
    (asked,) = run.model.asked
    contexts = asked.contexts or (asked.request.messages[0].text,) * len(asked.options)
    requests = [list(pair) for pair in zip(contexts, asked.options, strict=True)]
    return {"gold": list(document.options).index(document.answers[0]), "requests": requests}


def loglikelihood(rows: list[Row], runs: Runs) -> list[Any]:
    readings = {
        "acc": "commonsense_boolq@lm_eval",
        "acc_norm": "commonsense_hellaswag@lm_eval",
        "acc_bytes": "commonsense_arc_challenge@lm_eval_bytes",
    }
    made = [
        Document(id=str(n), question="q", options=options(row), answers=(list(options(row))[row["gold"]],))
        for n, row in enumerate(rows)
    ]
    found = {key: runs(name, made, [row["loglikelihoods"] for row in rows]).scores for key, name in readings.items()}
    return [{key: values[number] for key, values in found.items()} for number in range(len(rows))]


LMMS_TASKS = {
    "MMBench EN": "mmbench_en_dev",
    "MMBench CN": "mmbench_cn_dev",
    "SEED-Bench": "seedbench_image",
    "ScienceQA": "scienceqa_img",
    "TextVQA": "textvqa_val",
    "VQAv2": "vqav2_val",
    "VizWiz": "vizwiz_val",
    "GQA": "gqa_testdev",
    "DocVQA": "docvqa_val",
    "InfoVQA": "infovqa_val",
    "ChartQA": "chartqa_test",
    "AI2D": "ai2d",
    "MME": "mme",
    "POPE": "pope",
    "MMMU": "mmmu_val",
    "MMStar": "mmstar",
    "RealWorldQA": "realworldqa",
    "OCRBench": "ocrbench",
    "HallusionBench": "hallusionbench",
    "COCO": "coco_caption",
    "NoCaps": "nocaps",
    "MathVista": "mathvista_testmini",
}
MATHVISTA = {"format-prompt": "lmms_eval"} | {
    style: f"lmms_eval_{style.replace('-', '_')}" for style in ("step-by-step", "solution", "reason-first", "direct")
}


def lmms_document(row: Row) -> Document:
    given = row["doc"]
    if "A" in given:
        return vlmevalkit_tsv.document({key: None if value is None else str(value) for key, value in given.items()})
    columns = {"SEED-Bench": {"options": "choice_a, choice_b, choice_c, choice_d"}, "AI2D": {"options": "options"}}.get(
        row["benchmark"], {"options": "choices"} if "choices" in given else {}
    )
    return hf_dataset.document(given, columns)


def prompt_lmms_eval(row: Row) -> Any:
    kwargs = row.get("kwargs", {})
    said, path = row["benchmark"].lower(), row["source"].lower()
    names = [task for benchmark, task in LMMS_TASKS.items() if said.startswith(benchmark.lower())]
    names += [task for benchmark, task in LMMS_TASKS.items() if f"tasks/{benchmark.lower()}" in path]
    name = names[0]
    if kwargs.get("ocr"):
        return get_task("textvqa_val_ocr").prompt.text(lmms_document(row))
    task = get_task(f"{name}@{MATHVISTA[kwargs['shot_type']] if name == 'mathvista_testmini' else 'lmms_eval'}")
    prompt = task.prompt
    if name == "realworldqa" and kwargs.get("post_prompt"):  # the wording that lmms-eval has for chosen models
        prompt = dataclasses.replace(
            prompt, template="{question}{instruction}", instruction=kwargs["post_prompt"], remove=(REALWORLDQA_ASKS,),
            open_instruction=None,
        )  # fmt: skip
    written = prompt.text(lmms_document(row))
    # Where there is no hint lmms-eval puts an empty one before the question, and in Chinese the word `nan`.
    nothing = ("", "nan") if row["benchmark"].startswith("MMBench CN") else ("",)
    if row["benchmark"].startswith("MMBench") and row["doc"].get("hint") in nothing:
        assert any("hint" in text for text in task.differences)
        return f"{row['doc']['hint']} {written}"
    return written


REALWORLDQA_ASKS = "Please answer directly with only the letter of the correct option and nothing else."


VLMEVALKIT_TASKS = {
    "MMMU": "mmmu_val",
    "ChartQA_TEST": "chartqa_test",
    "GQA_TestDev_Balanced": "gqa_testdev",
    "TextVQA_VAL": "textvqa_val",
    "DocVQA_VAL": "docvqa_val",
    "InfoVQA_VAL": "infovqa_val",
    "VizWiz": "vizwiz_val",
    "OCRBench": "ocrbench",
    "MathVista_MINI": "mathvista_testmini",
    "LLaVABench": "llavabench",
    "MMVet": "mmvet",
    "COCO_VAL": "coco_caption",
    "POPE": "pope",
    "MME": "mme",
    "HallusionBench": "hallusionbench",
}


def prompt_vlmevalkit(row: Row) -> Any:
    """VLMEvalKit's XTuner adapter names the picture after the text and then puts it first, where it stands here."""
    given = {
        key: value if value is None or isinstance(value, list) else str(value) for key, value in row["doc"].items()
    }
    names = given.pop("image_path")
    pictures = tuple(Path(name) for name in (names if isinstance(names, list) else [names]))
    xtuner = "XTuner" in row["source"]
    protocol = "moslora" if xtuner else "llava" if "LLaVA.build" in row["source"] else "vlmevalkit"
    task = get_task(f"{VLMEVALKIT_TASKS.get(row['benchmark'], 'mmbench_en_dev')}@{protocol}")
    prompt = dataclasses.replace(task.prompt, image_separator="")  # VLMEvalKit leaves the separator to the model
    document = vlmevalkit_tsv.document(given, images=pictures)
    (message,) = prompt.messages(document)
    shown = iter([pictures[place] for place in prompt.image_order(document)])
    parts = [
        {"type": "text", "value": part} if isinstance(part, str) else {"type": "image", "value": str(next(shown))}
        for part in message.content
    ]
    return [*parts[len(pictures) :], *parts[: len(pictures)]] if xtuner else parts


# Statistics.


def mean_stderr(row: Row) -> Any:
    scores = row["scores"]
    if len(scores) < 2:
        return "ZeroDivisionError"  # as in the source; ours is nan
    return {
        "mean": error_bars.mean(scores),
        "mean_stderr": error_bars.mean_stderr(scores),
        "sample_stddev": error_bars.sample_stddev(scores),
    }


def paired(row: Row) -> Any:
    """Where all differences are alike the source gives an interval of no width and p of 0 or 1; here both are exact."""
    result = error_bars.paired(row["current"], row["baseline"])
    if result.stderr == 0:
        assert result.low < result.high
        return row["expected"] | {"mean_diff": result.difference, "n": result.n, "se_diff": 0.0, "t_stat": result.t}
    return {
        "ci_lower": result.low,
        "ci_upper": result.high,
        "mean_diff": result.difference if result.n > 1 else math.nan,
        "n": result.n,
        "p_value": result.p_value,
        "se_diff": result.stderr,
        "t_stat": result.t,
    }


def whole(check: Callable[[Row, Runs], Any]) -> Check:
    return lambda rows, runs: [check(row, runs) for row in rows]


CHECKS: dict[str, Check] = {
    "ai2d_lmms_eval": ai2d,
    "anls_lmms_eval": scores("docvqa_val@lmms_eval", "document_vqa.anls", all_at_once),
    "anls_stvqa_llava": scores("docvqa_val@llava", "document_vqa.anls_stvqa_llava", all_at_once),
    "anls_vlmevalkit": scores("docvqa_val@vlmevalkit", "document_vqa.anls", all_at_once),
    "caption_coco_no_tokenizer": whole(captions("coco_caption@vlmevalkit", tokenised=False)),
    "caption_coco_ptb": whole(captions("coco_caption@lmms_eval", tokenised=True)),
    "caption_ptb_tokenizer": step("coco_caption@lmms_eval", "ptb_tokeniser.tokenize"),
    "commonsense_extract_moslora": commonsense_answers,
    "commonsense_prompt_moslora": whole(commonsense_prompt),
    "commonsense_prompts_lm_eval": whole(lambda row, runs: commonsense_lm_eval(row, runs, runs.folder())),
    "exact_match_gqa_llava": scores("gqa_testdev@llava", "exact_match.gqa_llava"),
    "exact_match_gqa_lmms_eval": scores("gqa_testdev@lmms_eval", "exact_match.gqa_lmms_eval"),
    "exact_match_gqa_vlmevalkit": scores("gqa_testdev@vlmevalkit", "exact_match.gqa_vlmevalkit"),
    "hallusionbench_lmms_eval": whole(lambda row, runs: hallusionbench("hallusionbench@lmms_eval", row, runs)),
    "hallusionbench_vlmevalkit": whole(hallusionbench_vlmevalkit),
    "llavabench_parse_score_llava": llavabench_ratings("llavabench@llava"),
    "llavabench_parse_score_lmms_eval": llavabench_ratings("llavabench@lmms_eval"),
    "llavabench_summary": whole(llavabench_summary),
    "loglikelihood_choice_lm_eval": loglikelihood,
    "mathvista_normalize_official": mathvista_official,
    "mathvista_post_check_vlmevalkit": mathvista_vlmevalkit,
    "mcq_can_infer_mmbench_lmms_eval": mmbench_stages,
    "mcq_can_infer_vlmevalkit": letters("mmbench_en_dev@vlmevalkit"),
    "mcq_can_infer_vlmevalkit_2024_06": letters("mmbench_en_dev@moslora"),
    "mcq_extract_lmms_eval": letters("mmstar@lmms_eval"),
    "mmbench_circular": whole(circular),
    "mme_metrics_lmms_eval": whole(mme_lmms_eval),
    "mme_metrics_vlmevalkit": whole(mme_vlmevalkit),
    "mmmu_extract_numbers": step("mmmu_val@official", "mmmu.extract_numbers"),
    "mmmu_mcq_parse_lmms_eval": letters("mmmu_val@lmms_eval"),
    "mmmu_mcq_parse_official": letters("mmmu_val@official"),
    "mmmu_normalize_str": step("mmmu_val@official", "mmmu.normalize"),
    "mmmu_open": mmmu_open,
    "mmmu_real_llava15_13b": mmmu_real,
    "mmstar_lmms_eval": whole(mmstar),
    "mmvet_aggregate": whole(mmvet_aggregate),
    "mmvet_judge_prompt_tail": whole(mmvet_tail),
    "mmvet_judge_parse": mmvet_grades,
    "ocrbench_lmms_eval": scores("ocrbench@lmms_eval", "document_vqa.ocrbench_lmms_eval", with_category),
    "ocrbench_vlmevalkit": scores("ocrbench@vlmevalkit", "document_vqa.ocrbench_vlmevalkit", with_category),
    "prompts_lmms_eval": each(prompt_lmms_eval),
    "prompts_vlmevalkit": each(prompt_vlmevalkit),
    "pope_metrics_llava": whole(pope_llava),
    "pope_metrics_lmms_eval": whole(pope_lmms_eval),
    "pope_metrics_vlmevalkit": whole(pope_vlmevalkit),
    "realworldqa_lmms_eval": scores("realworldqa@lmms_eval", "exact_match.realworldqa_lmms_eval"),
    "relaxed_accuracy_lmms_eval": scores("chartqa_test@lmms_eval", "document_vqa.relaxed_lmms_eval"),
    "relaxed_accuracy_vlmevalkit": scores("chartqa_test@vlmevalkit", "document_vqa.relaxed_accuracy"),
    "scienceqa_llava": scienceqa_llava,
    "scienceqa_lmms_eval": lambda rows, runs: by_letter("scienceqa_img@lmms_eval", rows, runs, LETTERS[:3]),
    "seedbench_lmms_eval": seedbench,
    "stats_clustered_stderr": each(lambda row: error_bars.clustered_stderr(row["scores"], row["clusters"])),
    "stats_mean_stderr": each(mean_stderr),
    "stats_paired_ttest": each(paired),
    "vqa_accuracy_textvqa": scores("textvqa_val@lmms_eval", "vqa_accuracy.textvqa", all_at_once),
    "vqa_accuracy_vizwiz_official": scores("vizwiz_val@official", "vqa_accuracy.vizwiz_official", all_at_once),
    "vqa_accuracy_vlmevalkit": scores("textvqa_val@vlmevalkit", "vqa_accuracy.vlmevalkit", all_at_once),
    "vqa_accuracy_vqav2_lmms_eval": scores("vqav2_val@lmms_eval", "vqa_accuracy.vqav2_lmms_eval", all_at_once),
    "vqa_accuracy_vqav2_official": scores("vqav2_val@official", "vqa_accuracy.vqav2_official", all_at_once),
    "vqa_normalize_evalai": step("textvqa_val@lmms_eval", "vqa_accuracy.normalize_evalai"),
    "vqa_normalize_vlmevalkit": step("textvqa_val@vlmevalkit", "vqa_accuracy.normalize_vlmevalkit"),
    "vqa_normalize_vqav2_official": step("vqav2_val@official", "vqa_accuracy.normalize_official"),
    "yesno_mme_lmms_eval": named(yes_no("mme@lmms_eval"), lambda text: text or "other"),
    "yesno_pope_llava": yes_no("pope@llava"),
    "yesno_pope_lmms_eval": yes_no_pope_lmms_eval,
    "yesno_vlmevalkit": named(yes_no("mme@vlmevalkit"), lambda text: text.capitalize() or "Unknown"),
}
"""File -> our values for its rows."""


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


def _files() -> list[Path]:
    files = sorted(FOLDER.glob("*.json"))
    assert files, f"no golden files in {FOLDER}"
    return files


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.stem)
def test_golden(path: Path, tmp_path: Path) -> None:
    check = CHECKS.get(path.stem)
    assert check is not None, f"{path.name} is not in CHECKS: add the protocol that it tests"
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert rows, f"{path.name} is empty"
    wrong = [
        f"row {number}: {row}\n  ours: {ours!r}"
        for number, (row, ours) in enumerate(zip(rows, check(rows, Runs(tmp_path)), strict=True))
        if not same(ours, row["expected"])
    ]
    assert not wrong, f"{len(wrong)} of {len(rows)} rows differ:\n" + "\n".join(wrong[:5])
