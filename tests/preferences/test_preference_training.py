"""Runs with `objective: dpo` on tiny real models: what they learn, what they save, and how they go on."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pairs import break_steps, logged, make_questions, make_recipe, plain_recipe
from safetensors.torch import load_file, save_file
from tiny import make_experts
from vlms import make_vlm

from mm_moslora.adapters.folder_format import START_WEIGHTS
from mm_moslora.cli.cli_app import run as command
from mm_moslora.config import DataConfig, Recipe, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.preference_set import JudgedSet, PreferenceSet
from mm_moslora.models.batching.padded_batch import PaddedCollator
from mm_moslora.models.load_model import load
from mm_moslora.preferences import preference_training
from mm_moslora.preferences.preference_setup import PairCollator, PreferenceRun, prepare
from mm_moslora.preferences.preference_training import train_preferences
from mm_moslora.training.checkpointing.checkpoint_folder import parse_manifest
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import CheckpointError, ConfigError, DataError, DivergedError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.identity import sha256_of
from tests.data.chat_templates import tokenizer_of

pytest.importorskip("trl", reason="trl is not installed")
LOG_2 = math.log(2)


def trained(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **options: Any) -> PreferenceRun:
    """Train, and give the live run."""
    runs = []

    def remembering(*args: Any, **kwargs: Any) -> PreferenceRun:
        runs.append(prepare(*args, **kwargs))
        return runs[-1]

    monkeypatch.setattr(preference_training, "prepare", remembering)
    train_preferences(recipe, **options)
    return runs[0]


@torch.no_grad()
def logits(model: Any, run: PreferenceRun, number: int = 0) -> torch.Tensor:
    """Of the chosen and the rejected answer of a pair."""
    inputs = PaddedCollator(model=run.assembly.model)(list(run.records.item(number)))
    inputs.pop("labels")
    found: torch.Tensor = model.eval()(**inputs).logits
    return found


def adapter_of(checkpoint: Path) -> str:
    return sha256_of(checkpoint / "adapter" / "moslora.safetensors")


@pytest.fixture(params=["text", "pictures"])
def parts(request: Any, language_folder: Path, vlm: Path, picture_pairs: Path, text_pairs: Path) -> tuple[Path, Any]:
    """Pairs, and the model that learns from them."""
    if request.param == "text":
        return text_pairs, {"language": str(language_folder)}
    return picture_pairs, {"vlm": str(vlm)}


def test_the_first_loss_is_log_2_the_margin_grows_and_the_loader_gives_the_trained_logits(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path / "run", *parts, train={"steps": 24, "global_batch": 12, "micro_batch": 12})
    run = trained(recipe, monkeypatch)
    losses, margins = logged(run.folder), logged(run.folder, "rewards/margins")
    assert losses[0] == pytest.approx(LOG_2, abs=1e-6)
    assert margins[0] == 0
    assert margins[-1] > margins[12] > margins[4] > 0
    assert margins[-1] > 0.2
    assert losses[-1] < 0.62
    assert logged(run.folder, "rewards/accuracies")[-1] == 1
    live = logits(run.assembly.model, run)
    torch.testing.assert_close(logits(load(run.folder, merge=False).model, run), live, rtol=0, atol=0)
    torch.testing.assert_close(logits(load(run.folder).model, run), live, rtol=1e-4, atol=1e-4)
    state = read_json(run.folder / "state.json")
    assert state["state"] == "finished"
    summary = read_json(run.folder / "summary.json")
    assert summary["steps"] == 24
    assert summary["data"]["records"] == 12


def test_labels_are_those_of_trl_on_the_last_answer_alone(vlm: Path, picture_pairs: Path, tmp_path: Path) -> None:
    """TRL's own collator renders the processor's template: the same ids, masks and pixels."""
    from transformers import AutoProcessor
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    run = prepare(make_recipe(tmp_path / "run", picture_pairs, {"vlm": str(vlm)}))
    ours = PairCollator(run=run)([{"item": number, "held_out": 0} for number in (0, 1)])
    rows = []
    for number in (0, 1):
        record = run.records.pair(number)  # type: ignore[attr-defined]
        turns = {side: getattr(record, side).turns[-1].text for side in ("chosen", "rejected")}
        asked = record.chosen.turns[0].parts()[-1].lstrip("\n")
        content = [{"type": "image"}, {"type": "text", "text": asked}]
        rows.append(
            {"images": [record.chosen.images[0].rgb()], "prompt": [{"role": "user", "content": content}]}
            | {side: [{"role": "assistant", "content": text}] for side, text in turns.items()}
        )
    theirs = DataCollatorForVisionPreference(AutoProcessor.from_pretrained(vlm))(rows)
    # TRL's completion holds the line break after the end of turn, too, which nobody generates.
    width = ours["input_ids"].shape[1]
    kept = theirs["attention_mask"][:, :width].bool() & ours["attention_mask"].bool()
    assert torch.equal(ours["input_ids"][kept], theirs["input_ids"][:, :width][kept])
    extra = theirs["completion_mask"][:, :width] - ours["completion_mask"]
    assert int(extra.abs().sum(1).max()) <= 1
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])


def test_the_mixture_of_mpo_is_the_weighted_sum_of_its_losses(
    vlm: Path, picture_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.5}
    whole = {"steps": 1, "global_batch": 12, "micro_batch": 12}
    recipe = make_recipe(tmp_path / "run", picture_pairs, {"vlm": str(vlm)}, preference=mixture, train=whole)
    run = trained(recipe, monkeypatch)
    batch = PairCollator(run=prepare(recipe))([{"item": number, "held_out": 0} for number in range(12)])
    mask = batch.pop("completion_mask")
    with torch.no_grad(), run.peft_model.disable_adapter():
        found = run.assembly.model.eval()(**batch).logits.log_softmax(-1)
    words = found[:12, :-1].gather(-1, batch["input_ids"][:12, 1:, None])[..., 0][mask[:12, 1:].bool()]
    assert logged(run.folder)[0] == pytest.approx((0.8 + 2 * 0.2) * LOG_2 - float(words.mean()), abs=1e-5)


def test_no_loss_depends_on_the_split_into_micro_batches(
    language_folder: Path, text_pairs: Path, tmp_path: Path
) -> None:
    """Answers of other lengths, and steps at the end of an epoch that hold fewer pairs."""
    lines = [json.loads(line) for line in text_pairs.read_text().splitlines()[:7]]
    for number, line in enumerate(lines):
        line["messages"][-1]["content"] = "red green blue " * (1 + number % 3)
    file = tmp_path / "uneven.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    mixture = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    model = {"language": str(language_folder)}
    for size in (4, 2, 1):
        train = {"steps": 4, "global_batch": 4, "micro_batch": size}
        train_preferences(make_recipe(tmp_path / f"{size}", file, model, preference=mixture, train=train))
    for size in (2, 1):
        assert logged(tmp_path / f"{size}") == pytest.approx(logged(tmp_path / "4"), rel=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_frozen_routers_add_nothing_to_the_loss(objective: str, text_pairs: Path, tmp_path: Path) -> None:
    model = {"language": str(make_experts(tmp_path / "experts"))}
    adapter = {"rank": 4, "alpha": 8, "targets": ["q_proj"]}
    train = {"steps": 1, "global_batch": 24, "micro_batch": 24}
    train_preferences(
        make_recipe(tmp_path / "run", text_pairs, model, objective=objective, adapter=adapter, train=train)
    )
    assert logged(tmp_path / "run")[0] == pytest.approx(LOG_2 if objective == "dpo" else 0.5, abs=1e-6)


def test_a_resumed_run_gives_the_digits_of_a_straight_one(parts: Any, tmp_path: Path) -> None:
    straight = train_preferences(make_recipe(tmp_path / "straight", *parts))
    recipe = make_recipe(tmp_path / "resumed", *parts, train={"save_every": 2})
    first = train_preferences(recipe, stop_at=3)
    assert (first.step, first.finished) == (3, False)
    second = train_preferences(recipe, resume="required")
    assert (second.step, second.finished) == (6, True)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")
    assert adapter_of(second.checkpoint) == adapter_of(straight.checkpoint)
    kept = [load_file(end.checkpoint / "adapter" / START_WEIGHTS) for end in (second, straight)]
    torch.testing.assert_close(*kept)
    assert kept[0]
    again = train_preferences(recipe)
    assert again.checkpoint == second.checkpoint
    assert [path.name for path in sorted((tmp_path / "resumed").glob("checkpoint-*"))] == [
        "checkpoint-000004", "checkpoint-000006",
    ]  # fmt: skip


OTHER_FORMS = {
    "optimizer.safetensors": (None, b"PK", "renamed"), "optimizer.json": (None, b"{}"),
    "trainer_state.json": (None, b"{}", b"[]"),
}  # fmt: skip
"""Files of a rank, without them or with other contents: of other programs, other releases, or another objective."""


@pytest.mark.parametrize(("name", "content"), [(name, new) for name, forms in OTHER_FORMS.items() for new in forms])
def test_a_state_of_another_form_is_one_error(
    name: str, content: Any, stopped: tuple[Recipe, Path], tmp_path: Path
) -> None:
    """The manifest agrees with the files, so nothing is damaged."""
    recipe, run = stopped
    checkpoint = Path(shutil.copytree(run, tmp_path / "run")) / "checkpoint-000002"
    file = checkpoint / "trainer" / "rank-00000" / name
    if content == "renamed":
        save_file({key.replace(".0.", "."): value for key, value in load_file(file).items()}, file)
    elif content is None:
        file.rename(file.with_suffix(".pt"))
    else:
        file.write_bytes(content)
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
    }
    manifest = replace(parse_manifest(checkpoint / "manifest.json"), files=files)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest.to_json()))
    with pytest.raises(
        CheckpointError, match=r"rank-00000 holds optimizer\..*, and not the trainer state .*adapter\.weights"
    ):
        train_preferences(recipe, resume=str(checkpoint))


@pytest.fixture(scope="module")
def stopped(text_pairs: Path, language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run that was stopped after two steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    recipe = make_recipe(run, text_pairs, {"language": str(language_folder)})
    train_preferences(recipe, stop_at=2)
    return recipe, run


def test_a_run_goes_on_from_stage_to_stage_and_leaves_the_process_as_it_was(
    text_pairs: Path, language_folder: Path, tmp_path: Path
) -> None:
    """Its start has frozen mixers, which are the reference's, too."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    model = {"language": str(language_folder)}
    adapter: dict[str, Any] = {"rank": 4, "alpha": 8, "mixer_trainable": False}
    train_preferences(make_recipe(tmp_path / "before", text_pairs, model, adapter=adapter))
    adapter["weights"] = str(tmp_path / "before")

    def recipe(name: str, zero: str) -> Recipe:
        return make_recipe(tmp_path / name, text_pairs, model, adapter=adapter, train={"zero": zero})

    plain = train_preferences(recipe("plain", "none"))
    train_preferences(recipe("run", "zero3"), stop_at=2)
    shutil.rmtree(tmp_path / "before")
    train_preferences(recipe("run", "auto"), stop_at=4)
    result = train_preferences(recipe("run", "zero3"))
    assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "plain"), rel=1e-5)
    found, expected = (load_file(end.checkpoint / "adapter" / "moslora.safetensors") for end in (result, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    measured = [read_json(tmp_path / name / "mixers.json", list) for name in ("run", "plain")]
    assert [row["path"] for row in measured[0]] == [row["path"] for row in measured[1]]
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert AcceleratorState._shared_state == {}
    assert not is_deepspeed_zero3_enabled()


def test_the_reference_is_the_adapter_that_a_run_starts_from(
    language_folder: Path, text_pairs: Path, tmp_path: Path
) -> None:
    """Also of a resumed run whose start has gone, and with frozen mixers."""
    model, options = {"language": str(language_folder)}, {"rank": 4, "alpha": 8, "mixer_trainable": False}
    before = train_preferences(make_recipe(tmp_path / "before", text_pairs, model, adapter=options))
    options["weights"] = str(tmp_path / "before")
    straight = make_recipe(tmp_path / "straight", text_pairs, model, adapter=options)
    train_preferences(straight)
    assert logged(tmp_path / "straight")[0] == pytest.approx(LOG_2, abs=1e-6)
    recipe = make_recipe(tmp_path / "run", text_pairs, model, adapter=options)
    train_preferences(recipe, stop_at=2)
    shutil.rmtree(before.checkpoint.parent)
    train_preferences(recipe)
    assert logged(tmp_path / "run") == logged(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "paligemma", "qwen3_vl"])
def test_families_of_ready_made_models_learn(family: str, picture_pairs: Path, tmp_path: Path) -> None:
    """One with tiles, one whose prompts see ahead, one with features in several layers.

    Rows of pairs are made by the padding that `models/batching/` tests with every family.
    """
    model = {"vlm": str(make_vlm(tmp_path / family, family)), "vision": {"mode": "adapter"}}
    whole = {"steps": 12, "global_batch": 12, "micro_batch": 6}
    train_preferences(make_recipe(tmp_path / "run", picture_pairs, model, train=whole))
    losses = logged(tmp_path / "run")
    assert losses[0] == pytest.approx(LOG_2, abs=1e-6)
    assert losses[-1] < LOG_2 - 0.01


def test_an_assembled_model_learns_after_its_tuning(recipe: Recipe, picture_pairs: Path, tmp_path: Path) -> None:
    from mm_moslora.training.training_loop import train

    train(recipe)
    tuned, parts = recipe.train.output, recipe.model
    assert parts.vision is not None
    model = {
        "language": parts.language, "vision": {"name": parts.vision.name},
        "projector": {"weights": tuned, "mode": "frozen"},
    }  # fmt: skip
    pairs = make_recipe(tmp_path / "dpo", picture_pairs, model, adapter={"weights": tuned})
    result = train_preferences(pairs)
    assert logged(tmp_path / "dpo")[0] == pytest.approx(LOG_2, abs=1e-6)
    projector = "projector.safetensors"
    tuned_projector = next(Path(tuned).glob(f"checkpoint-*6/{projector}"))
    assert sha256_of(result.checkpoint / projector) == sha256_of(tuned_projector)
    assert load(tmp_path / "dpo").image_processing is not None


def test_held_out_pairs_are_measured(text_pairs: Path, language_folder: Path, tmp_path: Path) -> None:
    source = {"path": str(text_pairs), "hold_out": 4}
    recipe = make_recipe(
        tmp_path / "run", text_pairs, {"language": str(language_folder)}, data={"train": [source]},
        train={"validate_every": 4},
    )  # fmt: skip
    train_preferences(recipe)
    assert len(logged(tmp_path / "run", "validation_loss")) == 2
    assert len(logged(tmp_path / "run", "validation_rewards/margins")) == 2
    summary = read_json(tmp_path / "run" / "summary.json")
    assert (summary["data"]["records"], summary["data"]["validation_records"]) == (8, 4)


def test_half_precision_and_recomputed_layers_train_the_adapter_in_fp32(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"precision": "bf16", "gradient_checkpointing": True, "steps": 3}
    run = trained(make_recipe(tmp_path / "run", *parts, train=changes), monkeypatch)
    assert logged(run.folder)[0] == pytest.approx(LOG_2, abs=1e-6)
    dtypes = {p.requires_grad: p.dtype for name, p in run.assembly.model.named_parameters() if ".ref." not in name}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_an_end_that_was_not_measured_is_measured_by_the_next_start(
    text_pairs: Path, language_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path / "run", text_pairs, {"language": str(language_folder)})
    with monkeypatch.context() as patch:
        patch.setattr(preference_training._Session, "_measure_end", lambda _: None)
        patch.setattr(preference_training._Session, "_mark_end", lambda *_: None)
        train_preferences(recipe)
    mixers = tmp_path / "run" / "mixers.json"
    assert not mixers.exists()
    assert train_preferences(recipe).finished
    assert any(row["norm_update"] > 0 for row in read_json(mixers, list))
    digest = sha256_of(mixers)
    last = train_preferences(recipe).checkpoint
    assert sha256_of(mixers) == digest
    elsewhere = make_recipe(tmp_path / "elsewhere", text_pairs, {"language": str(language_folder)}, name="run")
    with pytest.raises(CheckpointError, match="is of the last step of another run folder"):
        train_preferences(elsewhere, resume=str(last))


def test_each_loop_refuses_the_other_objective(recipe: Recipe, text_pairs: Path, language_folder: Path) -> None:
    from mm_moslora.training.training_loop import train

    with pytest.raises(ConfigError, match="objective is sft"):
        train_preferences(recipe)
    with pytest.raises(ConfigError, match="takes recipes with objective: sft"):
        train(make_recipe(Path("run"), text_pairs, {"language": str(language_folder)}))


def test_data_check_counts_what_is_no_pair(
    text_pairs: Path, language_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    equal = text_pairs.read_text().splitlines()[0].replace('"rejected_response": "green"', '"rejected_response": "red"')
    file, recipe = tmp_path / "some.jsonl", tmp_path / "pairs.yaml"
    file.write_text(f"{equal}\n{text_pairs.read_text()}")
    recipe.write_text(yaml.safe_dump(plain_recipe(tmp_path / "run", file, {"language": str(language_folder)})))
    assert command(["data", "check", str(recipe), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["train"]["bad"] == {"EQUAL_ANSWERS": 1}
    recipe.write_text(yaml.safe_dump(plain_recipe(tmp_path / "run", text_pairs, {"language": str(language_folder)})))
    assert command(["data", "check", str(recipe)]) == 0
    assert command(["data", "view", str(recipe)]) == 0
    assert command(["plan", str(recipe), "--gpus", "1xA100-80G"]) == 1
    assert "`plan` takes recipes with objective: sft" in capsys.readouterr().err


def test_a_signal_saves_and_the_same_command_goes_on(text_pairs: Path, language_folder: Path, tmp_path: Path) -> None:
    recipe, stop = make_recipe(tmp_path / "run", text_pairs, {"language": str(language_folder)}), StopRequest()
    stop.received = signal.SIGTERM
    result = train_preferences(recipe, stop=stop)
    assert (result.stopped_by, result.step, result.finished) == (signal.SIGTERM, 1, False)
    assert (result.checkpoint / "manifest.json").is_file()
    assert train_preferences(recipe).finished


@pytest.mark.parametrize("kind", [PreferenceSet, JudgedSet])
@pytest.mark.parametrize("thinking", ["never", "mask", "always"])
def test_answers_that_differ_in_dropped_thinking_alone_prefer_nothing(kind: Any, thinking: Any, tmp_path: Path) -> None:
    lines = []
    for chosen, rejected in (("right", "wrong"), ("right", "right")):
        answers = [f"<think>\n{thought}\n</think>\n\n" for thought in (chosen, rejected)]
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{answers[0]}red"}]
        lines.append({"messages": turns, "rejected_response": f"{answers[1]}{'red' if chosen != rejected else 'blue'}"})
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    records = kind(
        [SourceConfig(path=str(file))], ConversationEncoder(tokenizer_of("qwen3"), thinking=thinking), None,
        config=DataConfig(max_bad_share=0.5),
    )  # fmt: skip
    assert records.quarantine.codes == ({} if thinking == "always" else {"EQUAL_ANSWERS": 1})
    assert len(records.usable) == (2 if thinking == "always" else 1) * kind.sides


def test_records_without_pairs_are_counted_and_named(language_folder: Path, text_pairs: Path, tmp_path: Path) -> None:
    lines = text_pairs.read_text().splitlines()
    equal = lines[0].replace('"rejected_response": "green"', '"rejected_response": " red "')
    plain = lines[1].replace('"rejected_response": "blue", ', "")
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join([equal, plain, *lines]) + "\n")
    recipe = make_recipe(tmp_path / "run", file, {"language": str(language_folder)}, data={"max_bad_share": 0.2})
    train_preferences(recipe)
    bad = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert ["EQUAL_ANSWERS" in bad[0], "NO_PAIR" in bad[1], len(bad)] == [True, True, 2]
    strict = make_recipe(tmp_path / "strict", file, {"language": str(language_folder)})
    with pytest.raises(DataError, match=r"2 of 14 records .* EQUAL_ANSWERS 1, NO_PAIR 1"):
        train_preferences(strict)


def test_pairs_that_do_not_fit_are_left_out_or_named(language_folder: Path, text_pairs: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    long = text_pairs.read_text().splitlines()[0].replace("say", "say " * 300)
    file.write_text(f"{long}\n{text_pairs.read_text()}")
    model = {"language": str(language_folder)}
    with pytest.raises(DataError, match="TOO_LONG 1"):
        train_preferences(make_recipe(tmp_path / "a", file, model, train={"steps": 1}))
    train_preferences(make_recipe(tmp_path / "b", file, model, train={"steps": 1}, data={"too_long": "drop"}))


def test_a_loss_that_stays_not_finite_ends_the_run(language_folder: Path, text_pairs: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path / "run", text_pairs, {"language": str(language_folder)}, optim={"lr": 1e30, "max_grad_norm": 0.0},
        train={"max_skipped_steps": 2, "save_every": 1, "log_every": 10},
    )  # fmt: skip
    with pytest.raises(DivergedError, match=r"2 steps in a row .* not finite; stopped at step 3"):
        train_preferences(recipe)
    assert "2 steps in a row" in str(read_json(tmp_path / "run" / "state.json")["reason"])
    assert logged(tmp_path / "run", "skipped_steps") == [2]
    assert "Diverged" in (tmp_path / "run" / "alerts.jsonl").read_text()
    assert load(tmp_path / "run").model is not None


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_its_records_are_named(
    fault: str,
    objective: str,
    language_folder: Path,
    text_pairs: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_steps(fault, {2}, monkeypatch.setattr)
    records = make_questions(text_pairs) if objective == "grpo" else text_pairs
    grpo = {"grpo": {"generations": 2, "max_new_tokens": 3}} if objective == "grpo" else {}
    for every in (1, 4):
        recipe = make_recipe(
            tmp_path / str(every), records, {"language": str(language_folder)}, objective=objective, **grpo,
            train={"steps": 4, "log_every": every}, optim={"schedule": "linear"},
        )  # fmt: skip
        train_preferences(recipe)
    losses, rates = logged(tmp_path / "1"), logged(tmp_path / "1", "learning_rate")
    assert [loss is None for loss in losses] == [False, True, False, False]
    assert logged(tmp_path / "4") == pytest.approx([(losses[0] + losses[2] + losses[3]) / 3])
    assert logged(tmp_path / "1", "skipped_steps") == [0, 1, 1, 1]
    (window,) = map(json.loads, (tmp_path / "4" / "metrics.jsonl").read_text().splitlines())
    assert [name for name, value in window.items() if value is None] == []
    measure = "entropy" if objective == "grpo" else "rewards/chosen"
    each = [logged(tmp_path / "1", measure)[step] for step in (0, -2, -1)]
    assert window[measure] == pytest.approx(sum(each) / 3)
    assert rates[1] == rates[2] > rates[3]
    assert re.search(r"Step 2 skipped: .*Records of rank 0: p\d", caplog.text)
    assert load(tmp_path / "1").model is not None


def test_saves_that_fail_lose_their_checkpoints_only_and_three_end_the_run(
    language_folder: Path, text_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"language": str(language_folder)}
    break_steps("save", {2, 4}, monkeypatch.setattr)
    for background in (True, False):
        train = {"save_every": 2, "keep_last": 0, "background_save": background}
        result = train_preferences(make_recipe(tmp_path / f"some {background}", text_pairs, model, train=train))
        assert result.finished
        assert [path.name for path in result.checkpoint.parent.glob("checkpoint-*")] == ["checkpoint-000006"]
    break_steps("save", {1, 2, 3}, monkeypatch.setattr)
    with pytest.raises(CheckpointError, match="The last 3 saves failed; stopped"):
        train_preferences(make_recipe(tmp_path / "all", text_pairs, model, train={"save_every": 1}))


def test_a_batch_that_the_ranks_cannot_share_is_refused(
    language_folder: Path, text_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match=r"multiple of train.micro_batch times the number of ranks \(2 x 3\)"):
        prepare(make_recipe(tmp_path / "run", text_pairs, {"language": str(language_folder)}))


def test_a_picture_that_is_damaged_inside_is_replaced(vlm: Path, picture_pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(picture_pairs.parent, tmp_path / "data")
    picture = tmp_path / "data" / "images" / "0.png"
    picture.write_bytes(picture.read_bytes()[:45])
    pairs = tmp_path / "data" / "pairs.jsonl"
    recipe = make_recipe(tmp_path / "run", pairs, {"vlm": str(vlm)}, data={"max_bad_share": 0.1})
    run = prepare(recipe)
    assert len(run.records.usable) == 12
    assert [example.id for example in run.records.item(0)] == ["p1", "p1"]
    assert run.records.quarantine.codes == {"IMAGE_DAMAGED": 1}
