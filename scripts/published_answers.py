"""Answers that benchmarks publish with their verdicts: files of their repositories as documents and answers.

Every reader takes a checkout and yields one `PublishedRun` per file. Pictures are not needed: questions, options and
references come from the files, in the columns of the data set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One file of answers."""

    task: str
    """TASK@PROTOCOL that it belongs to."""
    model: str
    published: float | None
    """The published score, in percent; None: not published for these answers."""
    documents: list[Row]
    answers: Mapping[str, str]
    verdicts: Mapping[str, bool] = field(default_factory=dict)
    """Whether the source counts each answer, where it says so."""
    source: str
    why: str
    """Why the numbers differ where they do."""
    rescore: tuple[str, ...] = ()
    """Protocols of the same task whose rules read these answers for comparison."""


DRAWN = "Where no letter is named, the source draws one."


def math_v(folder: Path) -> Iterator[PublishedRun]:
    """mathllm/MATH-V: `outputs/**/*.jsonl` with verdicts, `data/test.jsonl`."""
    unused = ("image", "solution")
    questions = _lines(folder / "data" / "test.jsonl")
    documents = [{key: value for key, value in row.items() if key not in unused} for row in questions]
    for path in sorted((folder / "outputs").rglob("*.jsonl")):
        rows = _lines(path)
        right = sum(bool(row["correct"]) for row in rows)
        yield PublishedRun(
            task=f"mathvision_test@official{'_cot' if 'CoT' in path.stem else ''}", model=path.stem,
            published=100 * (right / len(rows)), documents=documents,
            answers={str(row["id"]): row["response"] for row in rows},
            verdicts={str(row["id"]): bool(row["correct"]) for row in rows}, source="outputs",
            why="The code of the repository itself gives this verdict today.",
        )  # fmt: skip


def mmmu_pro(folder: Path) -> Iterator[PublishedRun]:
    """MMMU-Benchmark/MMMU: `mmmu-pro/output/*.jsonl` with verdicts."""
    for path in sorted((folder / "mmmu-pro" / "output").glob("*.jsonl")):
        model, setting, method = path.stem.split("_")
        rows = _lines(path)
        yield PublishedRun(
            task=_mmmu_task(setting, method), model=model, documents=[_mmmu_document(row) for row in rows],
            published=100 * sum(bool(row["if_right"]) for row in rows) / len(rows),
            answers={row["id"]: row["response"] for row in rows},
            verdicts={row["id"]: bool(row["if_right"]) for row in rows}, source="mmmu-pro/output", why=DRAWN,
            rescore=_mmmu_others(setting, method),
        )  # fmt: skip


def mmmu_pro_2024_09(folder: Path) -> Iterator[PublishedRun]:
    """The same repository at e3be6827: `mmmu-pro/temp_output/*.jsonl`, counts in `output/results_summary.xlsx`.

    Where the options are ten the file has them as `shuffled_options`.
    """
    summary = folder / "mmmu-pro" / "output" / "results_summary.xlsx"
    counts = _counts(summary)
    for path in sorted((folder / "mmmu-pro" / "temp_output").glob("*.jsonl")):
        model, method, setting = path.stem.rsplit("_", 2)
        rows = [row for row in _lines(path) if isinstance(row["response"], str)]
        if model not in counts:
            continue
        shuffled = "4opts" not in setting
        yield PublishedRun(
            task=_mmmu_task(setting, method), model=model, published=100 * counts[model][f"{method}_{setting}"] / 1730,
            documents=[_mmmu_document(row, shuffled=shuffled) for row in _lines(path)],
            answers={row["id"]: row["response"] for row in rows}, source="mmmu-pro/temp_output at e3be6827", why=DRAWN,
            rescore=_mmmu_others(setting, method),
        )  # fmt: skip


def _mmmu_task(setting: str, method: str) -> str:
    name = "vision" if setting.lower() == "vision" else "4" if "4" in setting else "standard"
    return f"mmmu_pro_{name}@official{'_cot' if method == 'cot' else ''}"


def _mmmu_others(setting: str, method: str) -> tuple[str, ...]:
    return () if "4" in setting else ("lmms_eval", "vlmevalkit_cot" if method == "cot" else "vlmevalkit")


def _mmmu_document(row: Row, *, shuffled: bool = False) -> Row:
    options, answer = ("shuffled_options", "shuffled_options_answer") if shuffled else ("options", "answer")
    subject = row["id"].split("_", 1)[1].rsplit("_", 1)[0]
    return {
        "id": row["id"], "question": row["question"], "options": str(row[options]), "answer": row[answer],
        "subject": subject,
    }  # fmt: skip


_MMMU_MODELS = (
    "gpt-4o-2024-08-06", "gemini-1.5-pro-exp-0801", "InternVL2-8B", "InternVL2-40B", "InternVL2-Llama3-76B",
    "llava-onevision-qwen2-7b-vo-hf", "llava-onevision-qwen2-72b-vo-hf",
)  # fmt: skip
"""The rows of the summary, whose names have no heading, in the order of `evaluate.py` there."""


def _counts(summary: Path) -> dict[str, dict[str, int]]:
    from mm_moslora_eval.backends.replay_model import _workbook

    rows = [row for row in _workbook(summary.read_bytes()) if row]
    return {
        model: {name: int(value) for name, value in row.items()} for model, row in zip(_MMMU_MODELS, rows, strict=True)
    }


def blink(folder: Path) -> Iterator[PublishedRun]:
    """zeyofu/BLINK_Benchmark: `eval/saved_val_predictions/*.json` and `eval/saved_outputs/*/*.json`.

    The predictions were read by a rule and a language model, the outputs are the answers themselves.
    """
    place = folder / "eval"
    right = json.loads((place / "val_answers.json").read_text(encoding="utf-8"))
    documents = [
        {
            "idx": name, "sub_task": name.removeprefix("val_").rsplit("_", 1)[0], "question": name, "prompt": name,
            "choices": ["", "", "", "", ""], "answer": answer,
        }
        for name, answer in right.items()
    ]  # fmt: skip
    for path in sorted((place / "saved_val_predictions").glob("*.json")):
        said = json.loads(path.read_text(encoding="utf-8"))
        verdicts = {name: said.get(name) == answer for name, answer in right.items()}
        common: Row = {"task": "blink_val@official", "model": path.stem, "documents": documents}
        yield PublishedRun(
            **common, published=_mean_of_sub_tasks(verdicts), answers=_texts(said), verdicts=verdicts,
            source="saved_val_predictions",
            why="`(C) Point C` is no `(C)` there.",
        )  # fmt: skip
        files = sorted((place / "saved_outputs" / path.stem).glob("*.json"))
        full = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["val"]]
        if full:
            yield PublishedRun(
                **common, published=_mean_of_sub_tasks(verdicts),
                answers=_texts({row["idx"]: row.get("full_prediction") for row in full}), verdicts=verdicts,
                source="saved_outputs", rescore=("lmms_eval",),
                why="There GPT-3.5 reads what the rule does not.",
            )  # fmt: skip


def _mean_of_sub_tasks(verdicts: Mapping[str, bool]) -> float:
    groups: dict[str, list[bool]] = {}
    for name, hit in verdicts.items():
        groups.setdefault(name.rsplit("_", 1)[0], []).append(hit)
    return 100 * sum(sum(group) / len(group) for group in groups.values()) / len(groups)


def _texts(said: Mapping[str, Any]) -> dict[str, str]:
    return {name: text for name, text in said.items() if isinstance(text, str)}


def _lines(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]


READERS: dict[str, tuple[str, Callable[[Path], Iterator[PublishedRun]]]] = {
    "MATH-V": ("mathllm/MATH-V", math_v),
    "MMMU": ("MMMU-Benchmark/MMMU", mmmu_pro),
    "MMMU-e3be6827": ("MMMU-Benchmark/MMMU at e3be6827", mmmu_pro_2024_09),
    "BLINK_Benchmark": ("zeyofu/BLINK_Benchmark", blink),
}
"""Name of a folder -> the repository that it holds, and its reader."""
