"""A run on answers that think: trained and asked in one form, from its checkpoint, its exports and after a resume."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.protocol.task import THINKING_TOKENS
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.task_runner import EvaluationSettings
from tiny import make_tokenizer
from tokenizers import AddedToken

from mm_moslora.cli.evaluation.eval_app import eval_plan
from mm_moslora.cli.evaluation.eval_options import QuestionOptions
from mm_moslora.config import DataConfig, Recipe, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.models.export.export_huggingface import export_model
from mm_moslora.models.load_model import load
from mm_moslora.serve.terminal_chat import Chat
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import EvalError

COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown"]
QWEN3 = importlib.resources.files("trl").joinpath("chat_templates", "qwen3.jinja")


def thought(word: str) -> str:
    return f"<think>\nThe user asks about {word}.\n</think>\n\n{word} it is"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    """A random Qwen3 with its own template and markers."""
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer.chat_template = QWEN3.read_text()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(recipe: Recipe, qwen3: Path, tmp_path: Path, *, thinking: int = 8, steps: int = 2) -> Recipe:
    file = tmp_path / "records.jsonl"
    rows = [
        {"conversations": [
            {"from": "human", "value": f"which colour is {word}?"},
            {"from": "gpt", "value": thought(word) if number < thinking else f"{word} it is"},
        ]}
        for number, word in enumerate(COLOURS)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = replace(recipe.model, language=str(qwen3), vision=None, language_mode="full")
    trained = replace(recipe.train, steps=steps, micro_batch=8, global_batch=8, save_every=steps, rehearsal=False)
    optim = replace(recipe.optim, lr=5e-3, warmup=0.0, schedule="constant")
    return replace(
        recipe, model=model, data=DataConfig(train=[SourceConfig(path=str(file))]), train=trained, optim=optim
    )  # fmt: skip


def asked(folder: Path) -> bool:
    return ConversationEncoder.of(load(folder)).asks_to_think


def test_auto_answers_what_it_was_trained_on(recipe, qwen3, tmp_path, caplog) -> None:
    """The same questions are asked: in the trained form all answers are right, and their references likely."""
    caplog.set_level("INFO", logger="mm_moslora")
    recipe = recipe_of(recipe, qwen3, tmp_path, steps=120)
    train(recipe)
    assert (
        "8 of 8 records end with an answer that thinks; the model is asked to think before it answers." in caplog.text
    )
    run = Path(recipe.train.output)
    model, task = open_model(str(run)), get_task(f"llava:{recipe.data.train[0].path}")
    [result] = evaluate(model, task, tmp_path / "eval", modes=("own",), baselines=(), settings=EvaluationSettings())
    assert result.score == 1.0
    assert result.about["decoding"]["max_new_tokens"] == 256  # half the context of this model
    assert result.likelihood["nats"] > -1.0
    assert any("asked to think before it answers, in at most 256 new tokens" in line for line in result.remarks)
    assert Chat.from_folder(run).ask("which colour is red?") == thought("red")


def test_the_form_is_stored_with_the_run_and_its_exports(recipe, qwen3, tmp_path, caplog, capsys) -> None:
    recipe = recipe_of(recipe, qwen3, tmp_path)
    train(recipe, stop_at=1)
    run = Path(recipe.train.output)
    checkpoint = run / "checkpoint-000001"
    assert yaml.safe_load((checkpoint / "config.yaml").read_text())["model"]["thinking"] == "always"
    assert asked(run)
    export_model(load(run), tmp_path / "export")
    assert asked(tmp_path / "export")
    capsys.readouterr()
    for place in (run, checkpoint, tmp_path / "export"):  # a plan has the new tokens that an evaluation may write
        assert open_model(str(place)).thinking_tokens == 256  # half the context of this model
        for given, most in ((None, 256), (7, 7)):
            eval_plan(
                f"llava:{recipe.data.train[0].path}", model=str(place), asked=QuestionOptions(max_new_tokens=given)
            )
            said = capsys.readouterr().out
            assert said.partition("\n\n")[0].split()[-1] == f"{8 * most:,}"
            assert "asked to think" not in said
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    messages = [{"role": "user", "content": "a"}]
    given = transformers.AutoTokenizer.from_pretrained(qwen3)
    assert stock.apply_chat_template(messages, tokenize=False) == given.apply_chat_template(messages, tokenize=False)
    assert train(recipe).finished  # `auto` in the recipe goes on with what it became


@pytest.mark.parametrize(("thinking", "form"), [(3, "auto"), (6, "always"), (0, "auto")])
def test_mixed_data_are_named_before_the_run(recipe, qwen3, tmp_path, caplog, thinking, form) -> None:
    caplog.set_level("INFO", logger="mm_moslora")
    recipe = recipe_of(recipe, qwen3, tmp_path, thinking=thinking, steps=1)
    train(recipe)
    warned = [row.message for row in caplog.records if row.levelname == "WARNING" and "thinks" in row.message]
    assert bool(warned) == (thinking == 3)
    assert (
        not warned or "3 of 8 records end with an answer that thinks; the model is asked to answer at once" in warned[0]
    )
    written = (Path(recipe.train.output) / "checkpoint-000001" / "config.yaml").read_text()
    assert yaml.safe_load(written)["model"]["thinking"] == form


def test_answers_before_other_questions_are_named_before_the_run(recipe, qwen3, tmp_path, caplog) -> None:
    recipe = recipe_of(recipe, qwen3, tmp_path, thinking=0, steps=1)
    file = Path(recipe.data.train[0].path)
    rows = [json.loads(line)["conversations"] for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({"conversations": row * 3}) + "\n" for row in rows))
    train(recipe)
    (warned,) = [row.message for row in caplog.records if row.levelname == "WARNING" and "another form" in row.message]
    assert r"by '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n'" in warned
    assert "but 16 of 24 answers are learned in another form: the chat template writes only the last answer" in warned


def test_the_length_of_answers_decides_their_identity(recipe, qwen3, tmp_path) -> None:
    recipe = recipe_of(recipe, qwen3, tmp_path, steps=1)
    train(recipe)
    model, task = open_model(recipe.train.output), get_task(f"llava:{recipe.data.train[0].path}")
    for limit in (3, 5):
        settings = EvaluationSettings(max_new_tokens=limit)
        [result] = evaluate(model, task, tmp_path / f"eval{limit}", modes=("own",), baselines=(), settings=settings)
        assert result.about["decoding"]["max_new_tokens"] == limit
    with pytest.raises(EvalError, match="Choose another output folder"):
        evaluate(
            model, task, tmp_path / "eval3", modes=("own",), baselines=(), settings=EvaluationSettings(max_new_tokens=5)
        )


def test_the_budget_is_that_of_the_default_length_of_training() -> None:
    assert DataConfig(train=[]).max_length == THINKING_TOKENS
