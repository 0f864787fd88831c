"""Figures and picture of an adapter folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapters.adapter_models import llama, train_a_bit
from transformers import Trainer, TrainerCallback, TrainingArguments

from mm_moslora.adapters import (
    MixerCallback,
    MoSLoRAConfig,
    MoSLoRALinear,
    add_moslora,
    butterfly,
    init_mixer,
    save_adapter,
    spare_mixers_from_decay,
)
from mm_moslora.adapters.adapter_inspection import (
    describe,
    draw,
    inspect_adapter,
    inspect_model,
    inspection,
    summary,
    table,
)
from mm_moslora.utils.errors import AdapterError


def test_figures_agree_with_the_whole_update(tmp_path: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8, mixer_init="kaiming", use_rslora=True))
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    reports = {report.path: report for report in inspect_adapter(tmp_path / "a")}
    assert len(reports) == 14
    layers = {n: layer for n, layer in model.get_base_model().named_modules() if isinstance(layer, MoSLoRALinear)}
    assert layers.keys() == reports.keys()
    for path, layer in layers.items():
        values = torch.linalg.svdvals(layer.wide_delta("default").detach().double())[:4]
        report = reports[path]
        torch.testing.assert_close(torch.tensor(report.singular_values).double(), values, rtol=1e-4, atol=1e-6)
        shares = values / values.sum()
        assert report.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-3)
        assert report.norm_update == pytest.approx(float(values.norm()), rel=1e-4)


def test_known_mixers_have_known_distances() -> None:
    A, B = torch.eye(4, 6), torch.eye(5, 4)
    plain = describe("m", A, None, B, 2.0)
    assert (plain.identity_distance, plain.condition, plain.crossed_energy) == (0.0, 1.0, 0.0)
    assert plain.effective_rank == pytest.approx(4.0)
    assert plain.singular_values == pytest.approx((2.0,) * 4)
    turned = describe("m", A, init_mixer(4, "orthogonal", generator=torch.Generator().manual_seed(1)), B, 1.0)
    assert turned.orthogonal_distance < 1e-6
    assert turned.condition == pytest.approx(1.0, abs=1e-5)
    assert 0.3 < turned.crossed_energy < 1
    halves = describe("m", A, butterfly(4), B, 1.0)
    assert math.isinf(halves.condition)
    assert halves.crossed_energy == pytest.approx(0.5)
    assert halves.effective_rank == pytest.approx(2.0)
    scaled = describe("m", A, torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])), B, 1.0)
    assert scaled.condition == pytest.approx(4.0)
    assert scaled.crossed_energy == 0.0


def test_a_fresh_adapter_has_no_update(tmp_path: Path) -> None:
    save_adapter(add_moslora(llama(), MoSLoRAConfig(r=4)), tmp_path / "a")
    assert {report.effective_rank for report in inspect_adapter(tmp_path / "a")} == {0.0}


def test_table_summary_and_picture(tmp_path: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4))
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    reports = inspect_adapter(tmp_path / "a")
    lines = table(reports).splitlines()
    assert len(lines) == 15
    assert lines[1].startswith("model.layers.0.mlp.down_proj")
    figures = summary(reports)
    assert figures["mixer/condition_max"] == max(report.condition for report in reports)
    assert 0 < figures["mixer/crossed_energy"] < 1
    picture = draw(reports, tmp_path / "deep" / "mixers.png", most=5)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_live_model_gives_the_figures_of_its_folder(tmp_path: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8))
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    assert inspect_model(model) == inspect_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match="no adapter 'second'"):
        inspect_model(model, adapter_name="second")


def test_the_commands_text_names_every_module_and_the_picture(tmp_path: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4), targets=["q_proj"])
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    text = inspection(tmp_path / "a", picture=tmp_path / "m.svg")
    assert text.count("q_proj") == 2
    assert "mixer/crossed_energy" in text
    assert (tmp_path / "m.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter folder"):
        inspect_adapter(tmp_path / "nothing")


class _Tracker(TrainerCallback):
    """Stands where wandb's or tensorboard's own callback stands."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.seen.append((state.global_step, dict(logs)))


def _trainer(folder: Path, tracker: _Tracker, **changes) -> Trainer:
    ids = torch.arange(12)
    options = {"max_steps": 5, "logging_steps": 2, "report_to": "tensorboard", "use_cpu": True, "learning_rate": 1e-2}
    options |= {"logging_dir": str(folder / "board")} if "logging_dir" in TrainingArguments.__dataclass_fields__ else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        **options | changes,
    )
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8))
    rows = [{"input_ids": ids, "labels": ids}] * 4
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[tracker])


def test_a_trainer_leaves_mixers_out_of_weight_decay_once_it_is_told(tmp_path: Path) -> None:
    def decayed(trainer: Trainer) -> set[str]:
        optimizer = trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        groups = [group for group in optimizer.param_groups if group["weight_decay"] == 0.1]
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 3 * 14
        return {names[id(parameter)] for group in groups for parameter in group["params"]}

    own = _trainer(tmp_path, _Tracker(), weight_decay=0.1)
    everything = decayed(own)
    spared = _trainer(tmp_path, _Tracker(), weight_decay=0.1)
    spare_mixers_from_decay(spared)
    assert decayed(spared) == {name for name in everything if "lora_mixer" not in name} != everything
    with pytest.raises(AdapterError, match="has its optimiser already"):
        spare_mixers_from_decay(spared)


def test_hf_trainer_logs_the_mixers_to_its_trackers(tmp_path: Path) -> None:
    tracker = _Tracker()
    trainer = _trainer(tmp_path, tracker)
    trainer.add_callback(MixerCallback(trainer))
    trainer.train()
    mixers = [(step, logs) for step, logs in tracker.seen if "mixer/norm_update" in logs]
    assert [step for step, _ in mixers] == [2, 4, 5]
    expected = summary(inspect_model(trainer.model))
    assert {name: mixers[-1][1][name] for name in expected} == pytest.approx(expected)
    assert mixers[-1][1]["mixer/norm_update"] > mixers[0][1]["mixer/norm_update"] > 0
    assert any("mixer/crossed_energy" in entry for entry in trainer.state.log_history)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out*"))
    assert b"mixer/crossed_energy" in written


def test_the_callback_has_its_own_rhythm_and_leaves_out_what_is_infinite(tmp_path: Path) -> None:
    tracker = _Tracker()
    trainer = _trainer(tmp_path, tracker, max_steps=3, report_to="none")
    for layer in trainer.model.modules():
        if isinstance(layer, MoSLoRALinear):
            layer.lora_mixer["default"].weight.data.copy_(butterfly(4))
            layer.lora_mixer["default"].weight.requires_grad_(False)
    trainer.add_callback(MixerCallback(trainer, every=1))
    trainer.train()
    mixers = [logs for _, logs in tracker.seen if "mixer/norm_update" in logs]
    assert len(mixers) == 3
    assert "mixer/condition_max" not in mixers[0]


def test_the_callback_refuses_a_model_without_the_adapter_before_the_first_step(tmp_path: Path) -> None:
    tracker = _Tracker()
    trainer = _trainer(tmp_path, tracker, report_to="none")
    trainer.add_callback(MixerCallback(trainer, adapter_name="second"))
    with pytest.raises(AdapterError, match="no adapter 'second'"):
        trainer.train()
    with pytest.raises(AdapterError, match="every is 0, expected at least 1"):
        MixerCallback(trainer, every=0)
