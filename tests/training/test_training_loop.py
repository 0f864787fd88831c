"""The training loop on one process: steps, losses, parts that train, named failures."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from trials import bounded, losses, with_train
from waiting import wait_until

from mm_moslora.config import OptimConfig, SourceConfig
from mm_moslora.models.load_model import load
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ConfigError, TrainingError
from mm_moslora.utils.run_paths import RUN_FILES


def test_mixers_decay_by_a_key_of_their_own():
    names = ("lora_A", "lora_mixer", "lora_B")
    module = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in names})
    groups = parameter_groups(module, OptimConfig(weight_decay=0.1, mixer_weight_decay=0.2))
    assert {name: (group.name, group.weight_decay) for group in groups for name in group.names} == {
        "lora_A.weight": ("adapter", 0.1), "lora_mixer.weight": ("mixer", 0.2), "lora_B.weight": ("adapter", 0.1)
    }  # fmt: skip


def test_mixers_have_a_multiple_of_the_rate_of_a() -> None:
    names = ("lora_A", "lora_mixer", "lora_B", "lora_embedding_B")
    module = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in names})
    rates = {
        name: group.peak_lr
        for group in parameter_groups(module, OptimConfig(lr=1e-3, mixer_factor=6, lora_plus_ratio=2))
        for name in group.names
    }
    expected = {"lora_A": 1e-3, "lora_mixer": 6e-3, "lora_B": 2e-3, "lora_embedding_B": 2e-3}
    assert rates == {f"{name}.weight": rate for name, rate in expected.items()}
    alone = torch.nn.ModuleDict({"lora_embedding_B": torch.nn.Linear(2, 2, bias=False)})
    assert parameter_groups(alone, OptimConfig(lr=1e-3, lora_plus_ratio=2))[0].peak_lr == 2e-3
    with pytest.raises(ConfigError, match="both set the rate"):
        OptimConfig(mixer_factor=6, mixer_lr=1e-3)
    for part, key in (("lora_B", "mixer_factor"), ("lora_A", "lora_plus_ratio")):
        bare = torch.nn.ModuleDict({part: torch.nn.Linear(2, 2, bias=False)})
        with pytest.raises(ConfigError, match=f"optim.{key} is 2, which is of"):
            parameter_groups(bare, OptimConfig(**{key: 2}))


def test_the_loss_goes_down(recipe):
    # A random language model has little for an adapter to build on, so this one trains whole.
    fast = replace(recipe, model=replace(recipe.model, language_mode="full"))
    train(with_train(fast, steps=40))
    values = losses(Path(recipe.train.output))
    assert sum(values[-5:]) < 0.6 * sum(values[:5])


def test_a_signal_saves_and_the_same_command_goes_on(recipe):
    recipe = with_train(recipe, steps=200)

    def interrupt() -> None:
        path = Path(recipe.train.output) / "metrics.jsonl"
        wait_until(lambda: path.is_file() and len(path.read_text().splitlines()) >= 3)
        os.kill(os.getpid(), signal.SIGTERM)

    helper = threading.Thread(target=interrupt)
    helper.start()
    result = train(recipe)
    helper.join()
    assert result.stopped_by == signal.SIGTERM
    assert 3 <= result.step < 200
    assert train(recipe, stop_at=result.step + 1).step == result.step + 1


def test_a_language_model_that_trains_whole_trains_its_head(recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "untied"
    config = AutoConfig.from_pretrained(recipe.model.language, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(recipe.model.language).save_pretrained(folder)
    whole = replace(recipe.model, language=str(folder), language_mode="full")
    train(with_train(replace(recipe, model=whole), steps=2))
    before = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    after = load(tmp_path / "run").model.lm_head.weight[: len(before)]
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, atol=0.1)


def test_a_worker_that_dies_is_told_in_a_line(recipe, monkeypatch):
    from mm_moslora.data.training_set import TrainingSet

    def die(self, number):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(TrainingSet, "load", die)
    with pytest.raises(TrainingError, match=r"A process that prepares examples died .* lower data\.workers"):
        train(with_train(replace(recipe, data=replace(recipe.data, workers=1)), rehearsal=False))


def test_a_language_model_alone_trains_too(recipe, tmp_path):
    lines = [
        {"id": i, "conversations": [{"from": "human", "value": "say red"}, {"from": "gpt", "value": "red"}]}
        for i in range(16)
    ]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    recipe = replace(
        recipe,
        model=replace(recipe.model, vision=None),
        data=replace(recipe.data, train=[SourceConfig(path=str(path))]),
    )
    train(with_train(recipe, steps=3))
    assert load(tmp_path / "run").processor is None


def test_the_loss_does_not_depend_on_micro_batches(recipe, tmp_path):
    recipe = replace(recipe, adapter=replace(recipe.adapter, dropout=0.0))
    for micro in (1, 2, 8):
        train(with_train(recipe, micro_batch=micro, output=str(tmp_path / f"m{micro}")))
    values = {micro: losses(tmp_path / f"m{micro}") for micro in (1, 2, 8)}
    assert values[1] == pytest.approx(values[8], rel=1e-5)
    assert values[2] == pytest.approx(values[8], rel=1e-5)
    tight, packed = bounded(recipe, 8, output=str(tmp_path / "tight")), replace(recipe.data, pack_tokens=256)
    train(tight, stop_at=3)
    train(with_train(tight, micro_tokens=300))  # on another machine, say
    assert losses(tmp_path / "tight") == pytest.approx(values[8], rel=1e-5)
    for name, tokens in (("rows", None), ("few rows", 512)):
        train(with_train(replace(recipe, data=packed), micro_tokens=tokens, output=str(tmp_path / name), steps=3))
    assert losses(tmp_path / "few rows") == pytest.approx(losses(tmp_path / "rows"), rel=1e-5)


def test_without_deepspeed_one_process_trains_and_a_stage_says_what_is_missing(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert train(recipe, stop_at=1).step == 1
    staged = with_train(recipe, zero="zero2", output=f"{recipe.train.output}-staged")
    with pytest.raises(ConfigError, match=r"zero2 needs deepspeed, .*pip install 'deepspeed>=.*zero none"):
        train(staged)
    assert not Path(staged.train.output).exists()


def test_files_of_the_user_in_the_run_folder_are_left_alone(recipe):
    run = Path(recipe.train.output)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("# my own recipe\n")
    with pytest.raises(ConfigError, match=r"already holds config\.yaml"):
        train(recipe, stop_at=1)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    (run / "config.yaml").rename(run / "recipe.yaml")
    train(recipe, stop_at=1)
    written = {path.name for path in run.iterdir()} - {"recipe.yaml"}
    assert set() < {name for name in written if not name.startswith(("checkpoint-", "."))} <= {*RUN_FILES}
    assert (run / "recipe.yaml").read_text() == "# my own recipe\n"


def test_two_runs_in_one_folder_are_refused(recipe):
    from mm_moslora.training.supervision.run_folder import exclusive

    pid = os.fork()
    if pid == 0:
        with exclusive(Path(recipe.train.output)):
            time.sleep(120)
        os._exit(0)
    try:
        lock = Path(recipe.train.output) / "run.lock"
        wait_until(lambda: lock.is_file() and lock.read_text())  # written by whoever holds it
        with pytest.raises(TrainingError, match=f"in use by another run \\(process {pid} on"):
            train(recipe)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
