"""What `eval plan` says of an evaluation before it is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from mm_moslora_eval.backends.local_model import LocalModel, turn_of
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.protocol.task_registry import get_task, with_changes
from mm_moslora_eval.report.evaluation_plan import measured
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.sources.image_controls import Hasher

from mm_moslora.cli.evaluation.eval_task_verbs import eval_plan
from tests.eval.eval_fake import FakeModel
from tests.eval.eval_models import export_tiny


def test_a_plan_counts_answers_tokens_hours_and_cost(
    question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"llava:{question_file}"
    settings = EvaluationSettings(rank=0, world_size=1, limit=6)
    evaluate(FakeModel(delay=0.01), get_task(name), tmp_path / "run", modes=("own",), baselines=(), settings=settings)
    changes = ("decoding.temperature=1", "decoding.samples=4", "decoding.max_new_tokens=100")
    eval_plan(name, change=changes, measured=tmp_path / "run", price="1/10", picture_tokens=100, limit=5)
    table, text = capsys.readouterr().out.split("\n\n")
    task = with_changes(get_task(name), changes)
    assert table.splitlines()[-1].split()[:4] == [task.id, "5", "20", "20"]
    assert table.split()[-1] == "2,000"
    prompt = int(table.split()[-2].replace(",", "")) + 20 * 100
    assert f"about {prompt:,} tokens" in text
    assert f"Cost: about {(prompt + 10 * 2000) / 1e6:,.2f} with the longest answers, " in text
    seconds = measured(tmp_path / "run").seconds
    assert seconds >= 0.01
    assert f"Hours: {20 * seconds / 3600:.2f}" in text


def test_a_folder_of_a_model_counts_its_own_tokens_without_its_weights(
    question_file: Path, tmp_path: Path, language_folder: Path, vision_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, name = export_tiny(tmp_path / "tiny", language_folder, vision_folder), f"llava:{question_file}"
    model = open_model(str(folder))
    assert isinstance(model, LocalModel)
    work = Preparation(
        task := get_task(name), task.load().documents, mode="own", seed=0, fingerprint="", hasher=Hasher()
    )
    requests = [work.request(item) for item in work.items]
    asked = sum(len(model.encoder.encode_prompt([turn_of(one) for one in item.messages])) for item in requests)
    (folder / "model.safetensors").unlink()
    eval_plan(name, model=str(folder), price="1/0", picture_tokens=100_000)
    said = capsys.readouterr().out
    assert f"Prompts: {asked:,} tokens, counted by the model's tokenizer and processor, pictures included." in said
    assert f"Cost: at most {asked / 1e6:,.2f}" in said
    eval_plan(name, model="openai:http://127.0.0.1:1/v1#m")
    assert "bytes of text for one. --model with a folder counts them." in capsys.readouterr().out


def test_data_that_are_not_at_hand_are_named_once_with_their_address(capsys: pytest.CaptureFixture[str]) -> None:
    eval_plan("mmstar", "mme@llava", "pixmo_count", limit=100)
    (tsv, hub) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The prompts of ")]
    assert tsv.startswith("The prompts of mmstar@llava and of 1 more are unknown: Data file 'MMStar.tsv' was not found")
    assert "VLMEvalKit's files are at https://opencompass.openxlab.space/utils/VLMEval/MMStar.tsv." in tsv
    assert hub.startswith("The prompts of pixmo_count@lmms_eval are unknown: ")
