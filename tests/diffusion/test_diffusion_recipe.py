"""Recipes of diffusion runs: strict, and the shipped one is the paper's."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mm_moslora import diffusion
from mm_moslora.cli.cli_app import run
from mm_moslora.config import recipe_names
from mm_moslora.diffusion import pipeline_families
from mm_moslora.diffusion.diffusion_recipe import DIFFUSION_RECIPES, DiffusionRecipe, load_diffusion_recipe
from mm_moslora.diffusion.diffusion_training import train_diffusion
from mm_moslora.utils.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names(DIFFUSION_RECIPES))
def test_shipped_recipes_are_read_and_written_back_equal(name: str) -> None:
    recipe = load_diffusion_recipe(name)
    assert DiffusionRecipe.from_yaml(recipe.to_yaml()) == recipe


def test_the_sdxl_recipe_has_the_settings_of_the_paper() -> None:
    recipe = load_diffusion_recipe("sdxl_subject")
    adapter, optim, train = recipe.adapter, recipe.optim, recipe.train
    assert (adapter.rank, adapter.alpha, adapter.mixer_init, adapter.factor_init) == (4, 4, "orthogonal", "gaussian")
    assert (optim.lr, optim.weight_decay, optim.schedule, optim.warmup) == (1e-4, 1e-4, "constant", 0)
    assert optim.mixer_weight_decay == 1e-4
    assert (train.steps, train.batch, train.accumulation, train.precision) == (500, 1, 4, "fp16")
    assert (recipe.data.resolution, recipe.data.prior, recipe.validate.every_epochs) == (1024, None, 40)
    assert recipe.model.vae == "madebyollin/sdxl-vae-fp16-fix"
    assert recipe.data.prompt == "a photo of ikat cat"
    assert recipe.validate.prompts == ["A photo of ikat cat wearing a red hat"]
    assert recipe.data.cache_latents  # one crop of each picture for the whole run


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("adapter.rnk=4", "Did you mean 'rank'"),
        ("data.prompt=null", "give one of prompt"),
        ("data.resolution=30", "multiple of 8"),
        ("optim.betas=[2,3]", "expected two numbers from 0 to 1"),
        ("optim.eps=0", "optim.eps is 0"),
        ("optim.mixer_factor=0", "optim.mixer_factor is 0"),
        ("validate.pictures=0", "To draw nothing: validate.prompts: []"),
        ("validate.dino=x", "validate.prompts is empty"),
        ("data.prior.weight=1", "missing data.prior.prompt"),
        ("model.prediction=x0", "expected one of auto, epsilon, v_prediction"),
    ],
)
def test_a_wrong_key_or_value_is_one_error_that_names_it(change: str, said: str) -> None:
    empty = ["validate.prompts=[]"] if "dino" in change else []
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        load_diffusion_recipe("tiny_subject", [*empty, change])


def test_paths_in_a_recipe_start_at_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "own.yaml"
    file.write_text("model: {base: tiny-sd}\ndata: {pictures: pictures, prompt: a cat}\n")
    monkeypatch.chdir(tmp_path.parent)
    assert load_diffusion_recipe(file).data.pictures == f"{tmp_path.name}/pictures"


def test_the_command_lists_and_prints_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diffusion", "config"]) == 0
    assert capsys.readouterr().out.split() == ["sdxl_subject", "tiny_subject"]
    assert run(["diffusion", "config", "sdxl_subject", "--adapter.rank", "8"]) == 0
    assert "rank: 8" in capsys.readouterr().out


def test_without_diffusers_everything_imports_and_training_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = Path(diffusion.__file__).parent
    for file in package.glob("*.py"):
        outside = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {(getattr(node, "module", None) or node.names[0].name).partition(".")[0] for node in outside}
        assert not names & {"diffusers", "accelerate"}, file
    monkeypatch.setattr(pipeline_families, "is_installed", lambda name: False)
    with pytest.raises(ConfigError, match=r"need diffusers, which is missing. Run: pip install .*diffusers>=0.41"):
        train_diffusion(load_diffusion_recipe("tiny_subject", [f"train.output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()
