"""The paper's recipes against the authors' released configuration."""

from __future__ import annotations

import pytest
import yaml

from mm_moslora.cli.cli_app import run
from mm_moslora.config import RECIPES_FOLDER, load_recipe
from mm_moslora.config.paper_comparison import AUTHORS_SETTINGS, compare_settings, other_changes
from mm_moslora.diffusion.diffusion_recipe import DIFFUSION_RECIPES, load_diffusion_recipe

RELEASED = yaml.safe_load(AUTHORS_SETTINGS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RELEASED)
def test_every_difference_of_a_paper_recipe_has_a_reason_and_every_reason_a_difference(name: str) -> None:
    is_diffusion = name == "sdxl_subject"
    recipe = load_diffusion_recipe(name) if is_diffusion else load_recipe(name)
    presets = DIFFUSION_RECIPES if is_diffusion else RECIPES_FOLDER
    found = {setting.key for setting in compare_settings(name, recipe, presets=presets) if not setting.same}
    assert not other_changes(name, recipe, presets=presets)
    assert found == set(RELEASED[name]["differs"])


def test_the_command_line_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--optim.lr", "1e-4", "--adapter.factor_form", "stella", "--train.precision", "fp32"]
    assert run(["config", "commonsense_170k", *changes, "--against-paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split(maxsplit=3) for line in lines if line.startswith(("optim", "adapter", "train"))}
    assert rows["adapter.rank"][1:] == ["16", "16", "same"]
    assert rows["optim.lr"][1:] == ["0.0003", "0.0001", "differs: changed in this recipe"]
    assert rows["train.precision"][1:] == ["fp16", "fp32", "differs: changed in this recipe"]
    assert "  adapter.factor_form: free -> stella" in lines
    assert any("4 beams" in line for line in lines)
    assert run(["diffusion", "config", "sdxl_subject", "--against-paper"]) == 0
    assert "orthogonal" in capsys.readouterr().out


def test_a_recipe_that_the_paper_does_not_have_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "llava15_7b_lora", "--against-paper"]) != 0
    assert "released no configuration for 'llava15_7b_lora'" in capsys.readouterr().err
