"""Every row of every golden file against our metrics.

The files hold inputs and the values that the field's own implementations computed. Any file dropped into the folder
(`MM_MOSLORA_GOLDEN_DIR`, default `tests/golden`) is checked; one that no entry of `CHECKS` knows is a failure.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval import statistics
from mm_moslora_eval.documents import Document
from mm_moslora_eval.metrics import (
    caption,
    commonsense,
    documents,
    exact,
    groups,
    judged,
    mathvista,
    mcq,
    mmmu,
    ptb,
    vqa,
    yesno,
)
from mm_moslora_eval.registry import get_task
from mm_moslora_eval.sources import hf, tsv

FOLDER = Path(os.environ.get("MM_MOSLORA_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
Row = dict[str, Any]
LETTERS = ("A", "B", "C", "D")


def options(row: Row) -> dict[str, str]:
    given = row["options"]
    return given if isinstance(given, dict) else dict(zip("ABCDEFGH", given, strict=False))


def letter(extract: Callable[[str, Any], str]) -> Callable[[Row], Any]:
    return lambda row: extract(row["prediction"], options(row)) or None


def per_reference(metric: Callable[[str, str], float]) -> Callable[[Row], Any]:
    return lambda row: exact.best(metric, row["prediction"], row["references"])


def over_references(metric: Callable[[str, list[str]], float]) -> Callable[[Row], Any]:
    return lambda row: metric(row["prediction"], row["references"])


def text(function: Callable[[str], Any]) -> Callable[[Row], Any]:
    return lambda row: function(row["prediction"])


def by_letter(metric: Callable[[str, str], float], letters: tuple[str, ...] = LETTERS) -> Callable[[str], Any]:
    return lambda prediction: {gold: metric(prediction, gold) for gold in letters}


def scienceqa_llava(row: Row) -> Any:
    parsed = mcq.scienceqa_llava(row["prediction"], options(row))
    known = list(options(row))
    return {"parsed": parsed or "FAILED", "pred_index": known.index(parsed) if parsed in known else -1}


def ai2d(row: Row) -> Any:
    scores = by_letter(mcq.ai2d_lmms_eval)(row["prediction"])
    return {"filtered": mcq.ai2d_filter(row["prediction"]), "score": scores}


def seedbench(row: Row) -> Any:
    answer = mcq.seedbench_lmms_eval(row["prediction"])
    return {"pred": answer, "score": {gold: float(answer.lower().strip() == gold.lower()) for gold in LETTERS}}


def yes_no_pope_lmms_eval(row: Row) -> Any:
    answer = yesno.pope_lmms_eval(row["prediction"])
    return {
        "normalized": answer or row["prediction"].lower().strip(),
        "score_if_no": float(answer == "no"),
        "score_if_yes": float(answer == "yes"),
    }


def circular(row: Row) -> Any:
    extract = mcq.vlmevalkit_2024_06 if "8106439" in row["source"].split("can_infer from")[1] else mcq.vlmevalkit
    rows = row["samples"]
    options = [{key: value for key, value in sorted(item.items()) if key in LETTERS and value} for item in rows]
    right = [extract(item["prediction"], o) == item["answer"] for item, o in zip(rows, options, strict=True)]
    if "hits" in row["expected"]:
        hits = {str(item["index"]): int(verdict) for item, verdict in zip(rows, right, strict=True)}
        return {"accuracy": sum(hits.values()) / len(hits), "hits": hits}
    hits_of = groups.circular_hits((item["index"], verdict) for item, verdict in zip(rows, right, strict=True))
    report: dict[str, Any] = {"split": ["dev"], "Overall": [sum(hits_of.values()) / len(hits_of)]}
    for column in ("category", "l2-category"):
        for name in {item[column] for item in rows}:
            members = {item["g_index"] for item in rows if item[column] == name}
            report[name] = [sum(hits_of[member] for member in members) / len(members)]
    return {"group_hits": {str(key): value for key, value in hits_of.items()}, "report": report}


def mmstar(row: Row) -> Any:
    return groups.macro_average(
        (
            item["category"],
            item["l2_category"],
            float(mcq.lmms_eval(item["prediction"], dict.fromkeys("ABCD", "")) == item["answer"]),
        )
        for item in row["samples"]
    )


def mathvista_question(row: Row) -> mathvista.Question:
    return mathvista.Question(
        question_type=row["question_type"],
        answer_type=row["answer_type"],
        choices=tuple(row["options"] or ()),
        precision=row.get("precision"),
    )


def mathvista_official(row: Row) -> Any:
    normalized = mathvista.normalize_official(row["prediction"], mathvista_question(row))
    return {"normalized": normalized, "correct": normalized == row["references"][0]}


def mathvista_vlmevalkit(row: Row) -> Any:
    question, gold = mathvista_question(row), row["references"][0]
    return {
        "prefetch": mathvista.prefetch_vlmevalkit(row["prediction"], question, gold),
        "correct_if_used_as_extraction": mathvista.correct_vlmevalkit(row["prediction"], question, gold),
    }


def llavabench(row: Row) -> Any:
    summary = judged.llavabench_summary((item["category"], *item["tuple"]) for item in row["samples"])
    return {name: list(values) for name, values in summary.items()}


def captions(row: Row, *, tokenised: bool) -> Any:
    split = ptb.tokenize if tokenised else str
    predictions = [split(item) for item in row["prediction"]]
    references = [[split(item) for item in people] for people in row["references"]]
    if tokenised:
        assert predictions == row["tokenized_predictions"]
        assert references == row["tokenized_references"]
    report = caption.caption_report(predictions, references)
    return {
        "Bleu": report.bleu,
        "ROUGE_L": report.rouge_l,
        "CIDEr": report.cider,
        "CIDEr_per_image": report.cider_per_image,
    }


def commonsense_lm_eval(row: Row) -> Any:
    result = commonsense.lm_eval_requests(row["task"], row["doc"])
    return {"gold": result.gold, "requests": [list(request) for request in result.requests]}


def loglikelihood(row: Row) -> Any:
    choice = groups.loglikelihood_choice(row["options"], [float(value) for value in row["loglikelihoods"]])
    return {
        "acc": float(choice.raw == row["gold"]),
        "acc_norm": float(choice.per_character == row["gold"]),
        "acc_bytes": float(choice.per_byte == row["gold"]),
    }


def mean_stderr(row: Row) -> Any:
    scores = row["scores"]
    if len(scores) < 2:
        raise ZeroDivisionError  # as in the source; ours is nan
    return {
        "mean": statistics.mean(scores),
        "mean_stderr": statistics.mean_stderr(scores),
        "sample_stddev": statistics.sample_stddev(scores),
    }


def paired(row: Row) -> Any:
    result = statistics.paired(row["current"], row["baseline"])
    return {
        "ci_lower": result.low,
        "ci_upper": result.high,
        "mean_diff": result.difference if result.n > 1 else math.nan,
        "n": result.n,
        "p_value": result.p_value,
        "se_diff": result.stderr,
        "t_stat": result.t,
    }


def mmmu_open(row: Row) -> Any:
    parsed = mmmu.parse_open(row["prediction"])
    assert same(sorted(parsed, key=str), sorted(row["parsed"], key=str)), row
    return mmmu.open_correct(parsed, row["references"])


def mmmu_real(row: Row) -> Any:
    return letter(mcq.mmmu_official)(row) if row.get("options") else mmmu_open(row)


def mmvet_tail(row: Row) -> Any:
    (reference,) = row["references"] if "references" in row else (row["answer"],)
    return judged.mmvet_table_row(row["question"], reference, row["prediction"])


def gqa_llava(row: Row) -> Any:
    assert exact.normalize_gqa_llava(row["prediction"]) == row["normalized"], row
    return exact.best(exact.gqa_llava, row["prediction"], row["references"])


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
        return tsv.document({key: None if value is None else str(value) for key, value in given.items()})
    columns = {"SEED-Bench": {"options": "choice_a, choice_b, choice_c, choice_d"}, "AI2D": {"options": "options"}}.get(
        row["benchmark"], {"options": "choices"} if "choices" in given else {}
    )
    return hf.document(given, columns)


def prompt_lmms_eval(row: Row) -> Any:
    kwargs = row.get("kwargs", {})
    said, path = row["benchmark"].lower(), row["source"].lower()
    named = [task for benchmark, task in LMMS_TASKS.items() if said.startswith(benchmark.lower())]
    named += [task for benchmark, task in LMMS_TASKS.items() if f"tasks/{benchmark.lower()}" in path]
    name = named[0]
    if kwargs.get("ocr"):
        return get_task("textvqa_val_ocr").prompt.text(lmms_document(row))
    protocol = MATHVISTA[kwargs["shot_type"]] if name == "mathvista_testmini" else "lmms_eval"
    prompt = get_task(f"{name}@{protocol}").prompt
    if name == "realworldqa" and kwargs.get("post_prompt"):  # lmms-eval's other wording, for chosen models
        question = row["doc"]["question"].strip().replace(REALWORLDQA_ASKS, "")
        return f"{question}{kwargs['post_prompt']}"
    written = prompt.text(lmms_document(row))
    # lmms-eval puts hints before the question that are none: an empty one, and in Chinese the word `nan`. We do not.
    nothing = ("", "nan") if row["benchmark"].startswith("MMBench CN") else ("",)
    if row["benchmark"].startswith("MMBench") and row["doc"].get("hint") in nothing:
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
    given = {
        key: value if value is None or isinstance(value, list) else str(value) for key, value in row["doc"].items()
    }
    names = given.pop("image_path")
    pictures = tuple(Path(name) for name in (names if isinstance(names, list) else [names]))
    protocol = "moslora" if "XTuner" in row["source"] else "llava" if "LLaVA.build" in row["source"] else "vlmevalkit"
    task = get_task(f"{VLMEVALKIT_TASKS.get(row['benchmark'], 'mmbench_en_dev')}@{protocol}")
    prompt = dataclasses.replace(task.prompt, image_separator="")  # VLMEvalKit leaves the separator to the model
    document = tsv.document(given, images=pictures)
    (message,) = prompt.messages(document)
    shown = iter([pictures[place] for place in prompt.image_order(document)])
    return [
        {"type": "text", "value": part} if isinstance(part, str) else {"type": "image", "value": str(next(shown))}
        for part in message.content
    ]


CHECKS: dict[str, Callable[[Row], Any]] = {
    "ai2d_lmms_eval": ai2d,
    "anls_lmms_eval": over_references(documents.anls),
    "anls_stvqa_llava": over_references(documents.anls_stvqa_llava),
    "anls_vlmevalkit": over_references(documents.anls),
    "caption_coco_no_tokenizer": lambda row: captions(row, tokenised=False),
    "caption_coco_ptb": lambda row: captions(row, tokenised=True),
    "caption_ptb_tokenizer": text(ptb.tokenize),
    "commonsense_extract_moslora": lambda row: commonsense.extract_answer(row["prediction"], row["dataset"]),
    "commonsense_prompt_moslora": lambda row: commonsense.prompt(row["instruction"], row["input"]),
    "commonsense_prompts_lm_eval": commonsense_lm_eval,
    "exact_match_gqa_llava": gqa_llava,
    "exact_match_gqa_lmms_eval": per_reference(exact.gqa_lmms_eval),
    "exact_match_gqa_vlmevalkit": per_reference(exact.gqa_vlmevalkit),
    "hallusionbench_lmms_eval": lambda row: yesno.hallusionbench_lmms_eval(row["samples"]),
    "hallusionbench_vlmevalkit": lambda row: yesno.hallusionbench_vlmevalkit(row["samples"]),
    "llavabench_parse_score_llava": lambda row: list(judged.llavabench_scores(row["judge_output"])),
    "llavabench_parse_score_lmms_eval": lambda row: list(judged.llavabench_scores_lmms_eval(row["judge_output"])),
    "llavabench_summary": llavabench,
    "loglikelihood_choice_lm_eval": loglikelihood,
    "mathvista_normalize_official": mathvista_official,
    "mathvista_post_check_vlmevalkit": mathvista_vlmevalkit,
    "mcq_can_infer_mmbench_lmms_eval": letter(mcq.lmms_eval_mmbench),
    "mcq_can_infer_vlmevalkit": letter(mcq.vlmevalkit),
    "mcq_can_infer_vlmevalkit_2024_06": letter(mcq.vlmevalkit_2024_06),
    "mcq_extract_lmms_eval": letter(mcq.lmms_eval),
    "mmbench_circular": circular,
    "mme_metrics_lmms_eval": lambda row: yesno.mme_report_lmms_eval(row["samples"]),
    "mme_metrics_vlmevalkit": lambda row: yesno.mme_report_vlmevalkit(row["samples"]),
    "mmmu_extract_numbers": text(mmmu.extract_numbers),
    "mmmu_mcq_parse_lmms_eval": letter(mcq.mmmu_lmms_eval),
    "mmmu_mcq_parse_official": letter(mcq.mmmu_official),
    "mmmu_normalize_str": text(mmmu.normalize),
    "mmmu_open": mmmu_open,
    "mmmu_real_llava15_13b": mmmu_real,
    "mmstar_lmms_eval": mmstar,
    "mmvet_aggregate": lambda row: judged.mmvet_scores_vlmevalkit(
        (item["category"], item["score"]) for item in row["samples"]
    ),
    "mmvet_judge_prompt_tail": mmvet_tail,
    "mmvet_judge_parse": lambda row: judged.mmvet_grade_of_tries(row["judge_outputs"]),
    "ocrbench_lmms_eval": lambda row: documents.ocrbench_lmms_eval(
        row["prediction"], row["references"], row["category"]
    ),
    "ocrbench_vlmevalkit": lambda row: documents.ocrbench_vlmevalkit(
        row["prediction"], row["references"], row["category"]
    ),
    "prompts_lmms_eval": prompt_lmms_eval,
    "prompts_vlmevalkit": prompt_vlmevalkit,
    "pope_metrics_llava": lambda row: yesno.pope_report_llava(row["samples"]),
    "pope_metrics_lmms_eval": lambda row: yesno.pope_report_lmms_eval(row["samples"]),
    "pope_metrics_vlmevalkit": lambda row: yesno.pope_report_vlmevalkit(row["samples"]),
    "realworldqa_lmms_eval": per_reference(exact.realworldqa_lmms_eval),
    "relaxed_accuracy_lmms_eval": per_reference(documents.relaxed_lmms_eval),
    "relaxed_accuracy_vlmevalkit": per_reference(documents.relaxed_accuracy),
    "scienceqa_llava": scienceqa_llava,
    "scienceqa_lmms_eval": text(by_letter(mcq.scienceqa_lmms_eval, LETTERS[:3])),
    "seedbench_lmms_eval": seedbench,
    "stats_clustered_stderr": lambda row: statistics.clustered_stderr(row["scores"], row["clusters"]),
    "stats_mean_stderr": mean_stderr,
    "stats_paired_ttest": paired,
    "vqa_accuracy_textvqa": over_references(vqa.textvqa),
    "vqa_accuracy_vizwiz_official": over_references(vqa.vizwiz_official),
    "vqa_accuracy_vlmevalkit": over_references(vqa.vlmevalkit),
    "vqa_accuracy_vqav2_lmms_eval": over_references(vqa.vqav2_lmms_eval),
    "vqa_accuracy_vqav2_official": over_references(vqa.vqav2_official),
    "vqa_normalize_evalai": text(vqa.normalize_evalai),
    "vqa_normalize_vlmevalkit": text(vqa.normalize_vlmevalkit),
    "vqa_normalize_vqav2_official": text(vqa.normalize_official),
    "yesno_mme_lmms_eval": lambda row: yesno.mme_lmms_eval(row["prediction"]) or "other",
    "yesno_pope_llava": text(yesno.pope_llava),
    "yesno_pope_lmms_eval": yes_no_pope_lmms_eval,
    "yesno_vlmevalkit": lambda row: yesno.vlmevalkit(row["prediction"]).capitalize() or "Unknown",
}


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
def test_golden(path: Path) -> None:
    check = CHECKS.get(path.stem)
    assert check is not None, f"{path.name} is not in CHECKS: add the function that it tests"
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert rows, f"{path.name} is empty"
    wrong = []
    for number, row in enumerate(rows):
        try:
            ours = check(row)
        except ZeroDivisionError:
            ours = "ZeroDivisionError"  # what the source does too, and the files say so
        if not same(ours, row["expected"]):
            wrong.append(f"row {number}: {row}\n  ours: {ours!r}")
    assert not wrong, f"{len(wrong)} of {len(rows)} rows differ:\n" + "\n".join(wrong[:5])
