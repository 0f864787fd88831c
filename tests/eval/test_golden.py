"""Every row of every golden file against what a run of the shipped task and protocol makes of its answer.

The files hold inputs and the values that the field's own implementations computed. Any file dropped into the folder
(`MM_MOSLORA_GOLDEN_DIR`, default `tests/golden`) is checked; one that no entry of `CHECKS` knows is a failure. No
metric is imported here: a value comes from a run of a task of the registry, or, where a file holds the value of a step
within a metric, from the function object that such a task calls (`block`).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.scoring import estimates
from mm_moslora_eval.scoring.estimates import estimate, mean_of

from tests.eval import golden_answers as answers
from tests.eval import golden_benchmarks as benchmarks
from tests.eval import golden_prompts as prompts
from tests.eval import golden_sets as sets
from tests.eval.golden_answers import Check, Row, each, letters, same, scores, step, whole
from tests.eval.protocol_runs import Runs
from tests.support.paired_scores import paired

FOLDER = Path(os.environ.get("MM_MOSLORA_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))


def mean_stderr(row: Row) -> Any:
    scores = row["scores"]
    if len(scores) < 2:
        return "ZeroDivisionError"  # as in the source; ours is nan
    found = estimate([mean_of(scores)], range(len(scores)))
    return {
        "mean": found.value,
        "mean_stderr": found.stderr,
        "sample_stddev": estimates.sample_stddev(scores),
    }


def paired_t_test(row: Row) -> Any:
    """Where all differences are alike the source gives an interval of no width and p of 0 or 1; here both are exact."""
    result = paired(row["current"], row["baseline"])
    if result.stderr == 0:
        assert result.low < result.high
        return row["expected"] | {"mean_diff": result.value, "n": result.n, "se_diff": 0.0, "t_stat": result.t}
    return {
        "ci_lower": result.low,
        "ci_upper": result.high,
        "mean_diff": result.value if result.n > 1 else math.nan,
        "n": result.n,
        "p_value": result.p_value,
        "se_diff": result.stderr,
        "t_stat": result.t,
    }


CHECKS: dict[str, Check] = {
    "ai2d_lmms_eval": answers.ai2d,
    "anls_lmms_eval": scores("docvqa_val@lmms_eval", "document_vqa.anls", answers.all_at_once),
    "anls_stvqa_llava": scores("docvqa_val@llava", "document_vqa.anls_stvqa_llava", answers.all_at_once),
    "anls_vlmevalkit": scores("docvqa_val@vlmevalkit", "document_vqa.anls", answers.all_at_once),
    "caption_coco_no_tokenizer": whole(sets.captions("coco_caption@vlmevalkit", tokenised=False)),
    "caption_coco_ptb": whole(sets.captions("coco_caption@lmms_eval", tokenised=True)),
    "caption_ptb_tokenizer": step("coco_caption@lmms_eval", "ptb_tokeniser.tokenize"),
    "commonsense_extract_moslora": answers.commonsense_answers,
    "commonsense_prompt_moslora": whole(prompts.commonsense_prompt),
    "ccocr_vlmevalkit": benchmarks.ccocr,
    "ccocr_documents_vlmevalkit": benchmarks.ccocr_documents,
    "ccocr_fields_sets_vlmevalkit": whole(benchmarks.ccocr_fields_sets),
    "ccocr_fields_vlmevalkit": benchmarks.ccocr_fields,
    "countbench": benchmarks.countbench,
    "cv_bench_lmms_eval": whole(benchmarks.cv_bench),
    "dynamath_vlmevalkit": benchmarks.dynamath,
    "exact_match_gqa_llava": scores("gqa_testdev@llava", "rules.gqa_llava"),
    "exact_match_gqa_lmms_eval": scores("gqa_testdev@lmms_eval", "rules.gqa_lmms_eval"),
    "exact_match_gqa_vlmevalkit": scores("gqa_testdev@vlmevalkit", "rules.gqa_vlmevalkit"),
    "hallusionbench_lmms_eval": whole(lambda row, runs: sets.hallusionbench("hallusionbench@lmms_eval", row, runs)),
    "hallusionbench_vlmevalkit": whole(sets.hallusionbench_vlmevalkit),
    "latex_value_mathvision": benchmarks.latex_value,
    "letters_blink_lmms_eval": benchmarks.read_letters("blink_val@lmms_eval"),
    "letters_blink_official": benchmarks.read_letters("blink_val@official"),
    "letters_lvbench_official": benchmarks.read_letters("lvbench@official"),
    "letters_mlvu_vlmevalkit": benchmarks.counting_letters("mlvu_dev@vlmevalkit"),
    "letters_mme_realworld_lmms_eval": benchmarks.read_letters("mme_realworld_en@lmms_eval"),
    "letters_mme_realworld_vlmevalkit": benchmarks.read_letters("mme_realworld_en@vlmevalkit"),
    "letters_mmmu_pro_official": benchmarks.read_letters("mmmu_pro_standard@official"),
    "letters_mmmu_pro_vlmevalkit": benchmarks.mmmu_pro_stage,
    "letters_mmvp_lmms_eval": benchmarks.read_letters("mmvp@lmms_eval"),
    "letters_mvbench_lmms_eval": benchmarks.counting_letters("mvbench@lmms_eval"),
    "letters_mvbench_official": benchmarks.counting_letters("mvbench@official"),
    "letters_mvbench_vlmevalkit": benchmarks.counting_letters("mvbench@vlmevalkit"),
    "letters_naturalbench": benchmarks.naturalbench_letters,
    "letters_visulogic_lmms_eval": benchmarks.read_letters("visulogic@lmms_eval"),
    "letters_visulogic_vlmevalkit": benchmarks.read_letters("visulogic@vlmevalkit"),
    "letters_vstar_lmms_eval": benchmarks.read_letters("vstar@lmms_eval"),
    "letters_wemath_vlmevalkit": benchmarks.read_letters("wemath_testmini@vlmevalkit"),
    "llavabench_parse_score_llava": sets.llavabench_ratings("llavabench@llava"),
    "llavabench_parse_score_lmms_eval": sets.llavabench_ratings("llavabench@lmms_eval"),
    "llavabench_summary": whole(sets.llavabench_summary),
    "lvbench_accuracy": whole(benchmarks.lvbench_accuracy),
    "mathvision_equal_vlmevalkit": benchmarks.mathvision_equal_vlmevalkit,
    "mathvision_official": benchmarks.mathvision,
    "mathvista_normalize_official": answers.mathvista_official,
    "mathvista_post_check_vlmevalkit": answers.mathvista_vlmevalkit,
    "mcq_can_infer_mmbench_lmms_eval": answers.mmbench_stages,
    "mcq_can_infer_vlmevalkit": letters("mmbench_en_dev@vlmevalkit"),
    "mcq_can_infer_vlmevalkit_2024_06": letters("mmbench_en_dev@moslora"),
    "mcq_extract_lmms_eval": letters("mmstar@lmms_eval"),
    "mmbench_circular": whole(sets.circular),
    "mme_metrics_lmms_eval": whole(sets.mme_lmms_eval),
    "mme_metrics_vlmevalkit": whole(sets.mme_vlmevalkit),
    "mmmu_extract_numbers": step("mmmu_val@official", "rules.extract_numbers"),
    "mmmu_mcq_parse_lmms_eval": letters("mmmu_val@lmms_eval"),
    "mmmu_mcq_parse_official": letters("mmmu_val@official"),
    "mmmu_normalize_str": step("mmmu_val@official", "rules.normalize"),
    "mmmu_open": answers.mmmu_open,
    "mmmu_real_llava15_13b": answers.mmmu_real,
    "mmstar_lmms_eval": whole(sets.mmstar),
    "mmvet_aggregate": whole(sets.mmvet_aggregate),
    "mmvet_judge_prompt_tail": whole(sets.mmvet_tail),
    "mmvet_judge_parse": sets.mmvet_grades,
    "naturalbench_shares": whole(benchmarks.naturalbench_shares),
    "nlvr2_official": whole(benchmarks.nlvr2),
    "ocrbench_lmms_eval": scores("ocrbench@lmms_eval", "rules.ocrbench_lmms_eval", answers.with_category),
    "ocrbench_v2_averages": whole(benchmarks.ocrbench_v2_averages),
    "ocrbench_v2_official": benchmarks.ocrbench_v2,
    "ocrbench_v2_pages_official": benchmarks.ocrbench_v2_pages,
    "ocrbench_vlmevalkit": scores("ocrbench@vlmevalkit", "rules.ocrbench_vlmevalkit", answers.with_category),
    "pixmo_count_lmms_eval": benchmarks.pixmo_count,
    "prompts_lmms_eval": each(prompts.prompt_lmms_eval),
    "prompts_vlmevalkit": each(prompts.prompt_vlmevalkit),
    "pope_metrics_llava": whole(sets.pope_llava),
    "pope_metrics_lmms_eval": whole(sets.pope_lmms_eval),
    "pope_metrics_vlmevalkit": whole(sets.pope_vlmevalkit),
    "realworldqa_lmms_eval": scores("realworldqa@lmms_eval", "rules.realworldqa_lmms_eval"),
    "relaxed_accuracy_lmms_eval": scores("chartqa_test@lmms_eval", "document_vqa.relaxed_lmms_eval"),
    "relaxed_accuracy_vlmevalkit": scores("chartqa_test@vlmevalkit", "document_vqa.relaxed_accuracy"),
    "scienceqa_llava": answers.scienceqa_llava,
    "scienceqa_lmms_eval": lambda rows, runs: answers.by_letter(
        "scienceqa_img@lmms_eval", rows, runs, answers.LETTERS[:3]
    ),
    "seedbench_lmms_eval": answers.seedbench,
    "simplevqa_vlmevalkit": whole(benchmarks.simplevqa),
    "stats_mean_stderr": each(mean_stderr),
    "stats_paired_ttest": each(paired_t_test),
    "vqa_accuracy_textvqa": scores("textvqa_val@lmms_eval", "vqa_accuracy.textvqa", answers.all_at_once),
    "vqa_accuracy_vizwiz_official": scores("vizwiz_val@official", "rules.vizwiz_official", answers.all_at_once),
    "vqa_accuracy_vlmevalkit": scores("textvqa_val@vlmevalkit", "vqa_accuracy.vlmevalkit", answers.all_at_once),
    "vqa_accuracy_vqav2_lmms_eval": scores("vqav2_val@lmms_eval", "rules.vqav2_lmms_eval", answers.all_at_once),
    "vqa_accuracy_vqav2_official": scores("vqav2_val@official", "rules.vqav2_official", answers.all_at_once),
    "vqa_normalize_evalai": step("textvqa_val@lmms_eval", "vqa_accuracy.normalize_evalai"),
    "vqa_normalize_vlmevalkit": step("textvqa_val@vlmevalkit", "vqa_accuracy.normalize_vlmevalkit"),
    "vqa_normalize_vqav2_official": step("vqav2_val@official", "vqa_accuracy.normalize_official"),
    "wemath_vlmevalkit": whole(benchmarks.wemath),
    "yesno_mme_lmms_eval": answers.named(answers.yes_no("mme@lmms_eval"), lambda text: text or "other"),
    "yesno_pope_llava": answers.yes_no("pope@llava"),
    "yesno_pope_lmms_eval": answers.yes_no_pope_lmms_eval,
    "yesno_vlmevalkit": answers.named(answers.yes_no("mme@vlmevalkit"), lambda text: text.capitalize() or "Unknown"),
}
"""File -> our values for its rows."""


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


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mmmu_open", {"prediction": "So the answer is 3.14", "references": "3.14", "expected": True}),
        ("mmmu_open", {"prediction": "", "references": "3.14", "expected": False}),
        (
            "mmvet_judge_prompt_tail",
            {"question": "Q?", "references": ["a"], "prediction": "", "expected": "Q? | a |  | "},
        ),
        (
            "mmvet_judge_prompt_tail",
            {"question": "Q?", "references": ["a"], "prediction": "<think>I", "expected": "Q? | a | <think>I | "},
        ),
        ("ocrbench_vlmevalkit", {"prediction": "the stop", "references": ["stop"], "expected": 1}),
        ("ocrbench_vlmevalkit", {"prediction": "", "references": ["stop"], "expected": 0}),
        (
            "mathvista_post_check_vlmevalkit",
            {
                "prediction": "", "references": "2", "options": None, "question_type": "free_form",
                "answer_type": "integer", "expected": {"prefetch": False, "correct_if_used_as_extraction": False},
            },
        ),
        ("llavabench_parse_score_llava", {"judge_output": "", "expected": [-1, -1]}),
        ("mmvet_judge_parse", {"judge_outputs": ["", "<think>0.5", "0.4"], "expected": 0.4}),
    ],
)  # fmt: skip
def test_rows_of_another_set_are_read(name: str, row: Row, tmp_path: Path) -> None:
    """Rows without optional columns, and answers that no judge is sent."""
    (ours,) = CHECKS[name]([row], Runs(tmp_path))
    assert same(ours, row["expected"])
