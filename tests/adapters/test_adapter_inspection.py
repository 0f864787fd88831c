"""The subspace lens: measures of an adapter, of its folder, and their picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from mm_moslora.adapters import (
    MixerCallback,
    MoSLoRAConfig,
    add_moslora,
    butterfly,
    init_mixer,
    load_adapter,
    save_adapter,
    spare_mixers_from_decay,
)
from mm_moslora.adapters.adapter_inspection import (
    MEASURES,
    ModuleReport,
    describe,
    inspect_adapter,
    inspect_model,
    summary,
    why_unknown,
)
from mm_moslora.reporting.lens_maps import draw_lens, measures_table
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import llama, train_a_bit


@dataclass(frozen=True)
class Written:
    """An adapter in some coordinates, and its mixer at the start."""

    A: Tensor
    M: Tensor
    B: Tensor
    M0: Tensor

    def seen(self, scaling: float = 0.5) -> ModuleReport:
        """Through the lens."""
        return describe("m", self.A, self.M, self.B, scaling, initial=self.M0)

    def turned(self, P: Tensor, Q: Tensor, a: float, b: float) -> Written:
        """The same adapter now, in other coordinates."""
        return replace(self, A=a * Q @ self.A, M=P @ self.M @ Q.T / (a * b), B=b * self.B @ P.T)


def _drawn(rank: int = 6, seed: int = 0) -> Written:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, M0, B = noise(rank, 30), noise(rank, rank), noise(20, rank)
    return Written(A, M0 + 0.3 * noise(rank, rank), B, M0)


def _rotation(rank: int, seed: int) -> Tensor:
    return init_mixer(rank, "orthogonal", generator=torch.Generator().manual_seed(seed)).double().svd().U


def _measured(report: ModuleReport, name: str) -> list[float]:
    value = getattr(report, name)
    return [value] if isinstance(value, float) else torch.tensor(value, dtype=torch.float64).flatten().tolist()


@pytest.mark.parametrize("name", [*MEASURES, "singular_values", "pair_energy"])
def test_measures_are_the_same_in_all_coordinates(name: str) -> None:
    given = _drawn()
    P, Q = _rotation(6, 1), _rotation(6, 2)
    turned = given.turned(P, Q, 3.0, 0.25)
    if name == "moved":  # which compares numbers: the start is turned and scaled along
        turned = replace(turned, M0=P @ given.M0 @ Q.T / 0.75)
    assert _measured(turned.seen(), name) == pytest.approx(_measured(given.seen(), name), rel=1e-6, abs=1e-6)


def test_measures_agree_with_the_whole_update() -> None:
    given = _drawn()
    report = given.seen()
    values = torch.linalg.svdvals(0.5 * given.B @ given.M @ given.A)[:6]
    assert report.singular_values == pytest.approx(values.tolist(), rel=1e-9)
    shares = values / values.sum()
    assert report.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))
    assert report.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2))
    left, right = (torch.linalg.svd(factor, full_matrices=False) for factor in (given.B, given.A))
    energy = (left.U.T @ (given.B @ given.M @ given.A) @ right.Vh.T).square()
    torch.testing.assert_close(torch.tensor(report.pair_energy), energy / energy.sum(), check_dtype=False)
    assert sum(map(sum, report.pair_energy)) == pytest.approx(1.0)


def test_how_far_a_mixer_is_from_orthogonal_and_from_its_start() -> None:
    given = _drawn()
    Q = _rotation(6, 7)
    fresh = replace(given, M=given.M0, B=torch.zeros_like(given.B)).seen()
    assert (fresh.moved, fresh.norm_update, fresh.effective_rank, fresh.effective_pairs) == (0.0, 0.0, 0.0, 0.0)
    assert replace(given, M=3 * given.M0).seen().moved == pytest.approx(2.0)
    assert describe("m", given.A, 5 * Q, given.B, 1.0).orthogonal_distance == pytest.approx(0.0, abs=1e-7)
    halves = describe("m", given.A, butterfly(6), given.B, 1.0)
    assert halves.orthogonal_distance == pytest.approx(math.sqrt(1 / 2))
    assert math.isinf(halves.condition)
    assert describe("m", given.A, torch.diag(torch.arange(1.0, 7)), given.B, 1.0).condition == pytest.approx(6.0)


@pytest.mark.parametrize("broken", ["A", "M"])
def test_factors_that_are_not_finite_have_no_measures(broken: str) -> None:
    given = _drawn()
    report = replace(given, **{broken: getattr(given, broken) * math.nan}).seen()
    assert all(math.isnan(value) for value in report.measures().values())
    assert report.moved is None
    assert measures_table([report.row()]).count("nan") == len(report.measures())


def test_folders_keep_the_start_of_mixers(tmp_path: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, mixer_init="kaiming"))
    fresh = inspect_model(model)
    assert {report.effective_rank for report in fresh} == {0.0}
    before = {report.path: report.mixer for report in fresh}
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    live = inspect_model(model)
    assert live == inspect_adapter(tmp_path / "a")
    assert {report.path: report.mixer_start for report in live} == before
    assert all(report.moved is not None and report.moved > 0 for report in live)
    again = load_adapter(llama(), tmp_path / "a", trainable=True)
    assert inspect_model(again) == live
    train_a_bit(again)
    save_adapter(again, tmp_path / "a")
    assert {report.path: report.mixer_start for report in inspect_adapter(tmp_path / "a")} == before


def test_a_folder_without_its_start_loads_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4), targets=["q_proj"])
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    assert why_unknown(inspect_adapter(tmp_path / "a"), against_other=False) is None
    kept = tmp_path / "a" / "moslora_start.safetensors"
    assert kept.stat().st_size < 2048
    tensors = load_file(kept)
    for damage in (
        lambda: kept.write_bytes(kept.read_bytes()[:-8]),
        lambda: save_file({name: tensor + 1 for name, tensor in tensors.items()}, kept),
        kept.unlink,
    ):
        damage()
        assert "start not kept" in str(why_unknown(inspect_adapter(tmp_path / "a"), against_other=False))
        assert all(report.moved is None for report in inspect_model(load_adapter(llama(), tmp_path / "a")))
    assert "damaged" in caplog.text


def test_another_adapter_takes_the_place_of_the_start(tmp_path: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8))
    train_a_bit(model)
    save_adapter(model, tmp_path / "early")
    train_a_bit(model, seed=2)
    save_adapter(model, tmp_path / "late")
    reports = inspect_adapter(tmp_path / "late", against=tmp_path / "early")
    early = {report.path: report.mixer for report in inspect_adapter(tmp_path / "early")}
    assert {report.path: report.mixer_start for report in reports} == early
    assert {report.moved for report in inspect_adapter(tmp_path / "late", against=tmp_path / "late")} == {0.0}
    save_adapter(add_moslora(llama(), MoSLoRAConfig(r=2), targets=["q_proj"]), tmp_path / "small")
    reports = inspect_adapter(tmp_path / "late", against=tmp_path / "small")
    assert "14 modules have no mixer, are not in the other adapter" in str(why_unknown(reports, against_other=True))


def test_table_summary_and_picture(tmp_path: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4))
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    reports = inspect_adapter(tmp_path / "a")
    rows = [report.row() for report in reports]
    lines = measures_table(rows).splitlines()
    assert len(lines) == 15
    assert lines[1].startswith("model.layers.0.mlp.down_proj")
    figures = summary(reports)
    assert figures["mixer/condition_max"] == max(report.condition for report in reports)
    assert 1 < figures["mixer/effective_pairs"] < 16
    picture = draw_lens(rows, tmp_path / "deep" / "mixers.png", most=5)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    (mine := tmp_path / "mine").hardlink_to(picture)
    before = mine.read_bytes()
    draw_lens(rows[:1], picture, most=5)
    assert mine.read_bytes() == before != picture.read_bytes()
    assert [path.name for path in picture.parent.iterdir()] == ["mixers.png"]


def test_a_missing_folder_and_a_missing_adapter_are_errors(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter folder"):
        inspect_adapter(tmp_path / "nothing")
    with pytest.raises(AdapterError, match="no adapter 'second'"):
        inspect_model(add_moslora(llama(), MoSLoRAConfig(r=4)), adapter_name="second")


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
    assert any("mixer/effective_pairs" in entry for entry in trainer.state.log_history)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out*"))
    assert b"mixer/effective_pairs" in written


def test_the_callback_refuses_a_model_without_the_adapter_before_the_first_step(tmp_path: Path) -> None:
    tracker = _Tracker()
    trainer = _trainer(tmp_path, tracker, report_to="none")
    trainer.add_callback(MixerCallback(trainer, adapter_name="second"))
    with pytest.raises(AdapterError, match="no adapter 'second'"):
        trainer.train()
    with pytest.raises(AdapterError, match="every is 0, expected at least 1"):
        MixerCallback(trainer, every=0)
