"""Figures and picture of an adapter folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from adapters.adapter_models import llama, train_a_bit

from mm_moslora.adapters import MoSLoRAConfig, MoSLoRALinear, add_moslora, butterfly, init_mixer, save_adapter
from mm_moslora.adapters.inspect import (
    describe,
    draw,
    inspect_adapter,
    inspect_model,
    inspection,
    summary,
    table,
)
from mm_moslora.errors import AdapterError


def test_figures_agree_with_the_whole_update(tmp_path: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8, mixer_init="kaiming", use_rslora=True))
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    reports = {report.path: report for report in inspect_adapter(tmp_path / "a")}
    assert len(reports) == 14
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, MoSLoRALinear):
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
    scaled = describe("m", A, torch.tensor([1.0, 2.0, 3.0, 4.0]), B, 1.0)
    assert scaled.condition == pytest.approx(4.0)
    assert scaled.crossed_energy == 0.0
    assert sum(sum(row) for row in scaled.pair_energy) == pytest.approx(1.0)


def test_a_fresh_adapter_has_no_update(tmp_path: Path) -> None:
    save_adapter(add_moslora(llama(), MoSLoRAConfig(r=4)), tmp_path / "a")
    assert all(report.effective_rank == 0.0 for report in inspect_adapter(tmp_path / "a"))


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
