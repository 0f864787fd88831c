"""Checkpoints of mm_moslora get the same scores in other harnesses; skipped where a harness is missing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tomllib
from pathlib import Path

import pytest
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.scored_subsets import read_samples
from mm_moslora_eval.run.task_runner import EvaluationSettings

from tests.builders.miniature_benchmarks import SCENES
from tests.eval.eval_models import export_tiny

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)
ROOT = Path(__file__).parents[2]
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra lm-eval)"
)
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (see eval/README.md)"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, language_folder: Path, vision_folder: Path) -> Path:
    return export_tiny(tmp_path_factory.mktemp("tiny"), language_folder, vision_folder)


WORDS = ("red square", "a blue circle", "no colour", "yes", "the green one", "is it")


def piqa_file(folder: Path) -> Path:
    rows = [
        {"goal": f"what is {WORDS[n % 6]}?", "sol1": WORDS[(n + 1) % 6], "sol2": WORDS[(3 * n + 2) % 6] + " shape",
         "label": n % 2}
        for n in range(24)
    ]  # fmt: skip
    path = folder / "piqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@needs_lm_eval
def test_lm_eval_reads_a_checkpoint_as_a_full_forward_pass_does(tiny: Path, tmp_path: Path) -> None:
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager
    from mm_moslora_eval.backends.lm_eval_adapter import lm_eval_model
    from mm_moslora_eval.backends.open_model import open_model

    data = piqa_file(tmp_path)
    config = {
        "task": "local_piqa", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label", "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    results = lm_eval.simple_evaluate(
        model=lm_eval_model(tiny, dtype="fp32"), tasks=[config], task_manager=TaskManager(include_defaults=False),
        log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    model = open_model(str(tiny), precision="fp32")
    tokenizer = model.assembly.tokenizer
    rows = [json.loads(text) for text in data.read_text().splitlines()]
    for sample in results["samples"]["local_piqa"]:
        row = rows[sample["doc_id"]]
        for name, response in zip(("sol1", "sol2"), sample["resps"], strict=True):
            context = f"Question: {row['goal']}\nAnswer:"
            ids, start = tokenizer.encode(f"{context} {row[name]}"), len(tokenizer.encode(context))
            with torch.no_grad():
                steps = model.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            expected = sum(float(steps[place - 1, ids[place]]) for place in range(start, len(ids)))
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-3)


@needs_lmms_eval
def test_lmms_eval_scores_equal_those_of_eval_run(tiny: Path, tmp_path: Path) -> None:
    import datasets
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager
    from mm_moslora_eval.backends.lmms_eval_adapter import MoSLoRALmms

    images, questions = [scene.png() for scene in SCENES], ["what color?", "is it red?"]
    rows = [(image, question) for image in images for question in questions]
    model = MoSLoRALmms(pretrained=str(tiny), precision="fp32", batch_size=4)
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": image, "path": None} for image, _ in rows], "question": [question for _, question in rows],
         "answer": ["red"] * len(rows)}
    ).cast_column("image", datasets.Image())  # fmt: skip
    answers = [answer for _, answer in sorted(model.answering.generate(_requests(rows), batch_size=4))]
    # References that are right for every other document, so that the score is neither 0 nor 1.
    right = [answers[n].text.strip() if n % 2 else "red" for n in range(len(rows))]
    table = table.remove_columns("answer").add_column("answer", right)
    table.to_parquet(str(tmp_path / "test.parquet"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local_vqa.yaml").write_text(
        "task: local_vqa\ndataset_path: parquet\ndataset_kwargs:\n"
        f"  data_files:\n    test: {tmp_path / 'test.parquet'}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function local_vqa.visual\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {max_new_tokens: 6, until: ['STOP']}\n"
        "metric_list:\n- {metric: exact_match, aggregation: mean, higher_is_better: true}\nmetadata: {version: 0}\n"
    )
    (tasks / "local_vqa.py").write_text("def visual(doc):\n    return [doc['image'].convert('RGB')]\n")
    results = evaluator.simple_evaluate(
        model=model, tasks=["local_vqa"], task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=4, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    task = tmp_path / "ours.yaml"
    task.write_text(
        f"name: ours\nsource: {{kind: hf, path: {tmp_path / 'test.parquet'}}}\nprompt: {{template: '{{question}}'}}\n"
        "decoding: {max_new_tokens: 6, stop: [STOP]}\n"
    )
    (ours,) = evaluate(
        model.answering, get_task(str(task)), tmp_path / "run", modes=("own",), baselines=(), settings=ONE
    )  # fmt: skip
    theirs = results["results"]["local_vqa"]["exact_match,none"]
    assert ours.score == pytest.approx(theirs, abs=1e-9)
    assert 0 < theirs < 1
    said = [sample["resps"][0][0] for sample in sorted(results["samples"]["local_vqa"], key=lambda s: s["doc_id"])]
    assert said == [row["text"].strip() for row in read_samples(tmp_path / "run" / "ours@own" / "own")]


def _requests(rows: list[tuple[bytes, str]]):
    from mm_moslora_eval.protocol.model_interface import IMAGE, Message, Request

    return [
        Request(
            id=str(n), messages=(Message(role="user", content=(IMAGE, "\n" + question)),), images=(image,),
            max_new_tokens=6,
        )
        for n, (image, question) in enumerate(rows)
    ]  # fmt: skip


@needs_lmms_eval
def test_the_entry_point_names_a_class_that_lmms_eval_can_build() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, _, name = points["mm_moslora"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    module, _, name = manifest.simple_class_path.rpartition(".")
    model = getattr(importlib.import_module(module), name)
    assert not model.__abstractmethods__
    assert manifest.model_id == "mm_moslora"
