"""Golden values of prompts and of log-likelihoods."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.sources import hf_dataset, vlmevalkit_tsv
from mm_moslora_eval.sources.document import Document

from tests.eval.golden_answers import Row
from tests.eval.protocol_runs import Runs


def commonsense_prompt(row: Row, runs: Runs) -> Any:
    extra = {"input": row["input"]} if row.get("input") else {}
    document = Document(id="1", question=row["instruction"], answers=("true",), extra=extra)
    return runs("commonsense_boolq@official", [document], ["true"]).samples[0]["prompt"]


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
    """VLMEvalKit's XTuner adapter lists the picture after the text and then moves it first; here it is first."""
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
