"""Names in recipes: every misspelt one is refused with a suggestion by every verb, before anything is queued."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from mm_moslora_eval.protocol import task_registry
from mm_moslora_eval.protocol.task_registry import all_tasks

from mm_moslora.adapters import MIXER_INITS, peft_methods
from mm_moslora.adapters.mixer import NO_MIXER
from mm_moslora.cli import run
from mm_moslora.config import Recipe, load_recipe, recipe_names, usual_names
from mm_moslora.config.llava_chat_templates import CHAT_TEMPLATES
from mm_moslora.config.model_config import ModuleMixerInit
from mm_moslora.config.run_config import TRACKERS
from mm_moslora.data.chat.record_keys import READ
from mm_moslora.diffusion.diffusion_recipe import DIFFUSION_RECIPES, DiffusionRecipe
from mm_moslora.kernels.attention.attention_choice import require_attention
from mm_moslora.models.projectors.projector import PROJECTORS, projector_class
from mm_moslora.models.projectors.projector_layers import LinearProjector
from mm_moslora.preferences.rewards import REWARDS
from mm_moslora.training.deepspeed_presets import read_preset
from mm_moslora.training.preflight import LOSS, check_settings
from mm_moslora.utils.errors import MoSLoRAError
from mm_moslora.utils.run_paths import shipped_folder

PRESET = "llava15_7b_moslora"
FREE_TEXT = {
    "name", "model.system_prompt", "data.prompt", "data.prior.prompt", "track.project",
    "track.entity", "track.name", "track.group", "track.job_type", "track.notes", "track.tags",
}  # fmt: skip
PATHS = {
    "data.train.path", "data.train.image_folder", "data.validation.path", "data.validation.image_folder", "data.cache",
    "model.vision.feature_cache", "model.projector.weights", "adapter.weights", "train.output", "data.pictures",
    "data.prior.pictures", "validate.general_text",
}  # fmt: skip
IDS = {  # of hubs and hosts, and names inside of data
    "model.language", "model.vlm", "model.language_revision", "model.vlm_revision", "model.vision.revision",
    "model.vision.pretrained", "model.base", "model.revision", "model.variant", "model.vae",
    "data.train.image_hosts", "data.train.subset", "data.train.split", "data.train.revision",
    "data.train.columns", "data.validation.image_hosts", "data.validation.subset", "data.validation.split",
    "data.validation.revision", "data.validation.columns",
}  # fmt: skip
LAYERS = {  # names and patterns of layers, which `plan` and `train` look for in the model
    "adapter.mixer_pattern.KEY", "adapter.rank_pattern.KEY", "adapter.alpha_pattern.KEY",
}  # fmt: skip
FITTING = ("objective=grpo", "train.zero=none", "model.projector.mode=frozen", "model.projector.weights=PROJECTOR")
MISSPELT = {  # overrides, the last of them misspelt
    "model.vision.name": ("model.vision.name=open_clp:ViT-B-32",),
    "model.vision.fuse_with": ("model.vision.fuse_with=timmm:vit_small_patch16_224",),
    "model.projector.kind": ("model.projector.kind=mlp2x_geluu",),
    "model.chat_template": ("model.chat_template=llama3",),
    "model.attention": ("model.attention=sdpaa",),
    "adapter.targets": ("adapter.targets=all-linaer",),
    "adapter.peft": ("adapter.peft={type: HIRRA}",),
    "adapter.peft.KEY": ("adapter.peft={type: HIRA, rr: 3}",),
    "train.zero": ("train.zero=zerro2",),
    "train.compile": ("train.compile=inductr",),
    "preference.loss_type": ("preference.loss_type=[sigmoidd]",),
    "grpo.rewards": (*FITTING, "grpo.rewards=[exactt]"),
    "validate.tasks": ("validate.tasks=[popee]",),
    "validate.best": (
        "train.validate_every=1", "data.validation=[{path: held.json}]", f"validate.best={LOSS}s",
    ),
    "track.trackers": ("track.trackers=[wandbb]",),
    "data.train.columns.KEY": ("data.train=[{path: x.json, columns: {questionn: column}}]",),
    "data.validation.columns.KEY": ("data.validation=[{path: x.json, columns: {imagee: column}}]",),
}  # fmt: skip


def leaves(kind: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a recipe with the types of their values; `.KEY` stands for the keys of a mapping."""
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            yield from leaves(hints[item.name], f"{key}.{item.name}" if key else item.name)
    elif typing.get_origin(kind) is Literal or not arguments:
        yield key, kind
    else:
        for number, argument in enumerate(arguments):
            yield from leaves(argument, f"{key}.KEY" if typing.get_origin(kind) is dict and number == 0 else key)


WORDS = {  # keys that take one of a few words, with their type
    (recipe, key): kind
    for recipe in (Recipe, DiffusionRecipe)
    for key, kind in leaves(recipe)
    if typing.get_origin(kind) is Literal
}


def longer(name: str) -> str:
    """A misspelt name."""
    return name + name[-1]


def override(key: str, value: str) -> str:
    """An override that gives a key of any recipe this value, in the form that its type asks for."""
    for source in ("data.train", "data.validation"):
        if key.startswith(f"{source}."):
            return f"{source}=[{{path: x.json, {key.split('.')[2]}: {value}}}]"
    return f"{key}={{q_proj: {value}}}" if key == "adapter.mixer_pattern" else f"{key}={value}"


def refused(arguments: list[str], capsys: Any) -> str:
    """What a verb says that refuses a recipe, on one line."""
    capsys.readouterr()
    assert run(arguments) == 1, arguments
    said = capsys.readouterr()
    return " ".join((said.out + said.err).split())


def test_every_text_of_a_recipe_is_of_a_known_kind() -> None:
    texts = {key for recipe in (Recipe, DiffusionRecipe) for key, kind in leaves(recipe) if kind in (str, Any)}
    kinds = (FREE_TEXT, PATHS, IDS, LAYERS, set(MISSPELT))
    assert sum(map(len, kinds)) == len(set().union(*kinds)), "a key stands in two tables"
    assert texts == set().union(*kinds), "put a new key into the table of its kind; a name of a set into MISSPELT"


@pytest.mark.parametrize("verb", ["config", "doctor", "plan", "launch"])
def test_every_verb_refuses_every_misspelt_name_before_a_queue(verb: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("mm_moslora.planning.doctor.diagnose", lambda *_: [])
    options = {"plan": ["--gpus", "8xA100-80G"], "launch": ["--dry-run"]}.get(verb, [])
    words = [(override(key, longer(typing.get_args(kind)[0])),) for (of, key), kind in WORDS.items() if of is Recipe]
    for overrides in (*MISSPELT.values(), *words):
        said = refused([verb, PRESET, *overrides, *options], capsys)
        assert {"Did", "mean"} <= set(said.split()), said  # `doctor` has a table, in which lines break


@pytest.mark.parametrize("verb", [["config"], ["launch", "--dry-run"], ["train"]])
def test_misspelt_names_of_diffusion_recipes_are_refused(verb: list[str], capsys: Any) -> None:
    preset = recipe_names(DIFFUSION_RECIPES)[0]
    words = [
        override(key, longer(typing.get_args(kind)[0])) for (of, key), kind in WORDS.items() if of is DiffusionRecipe
    ]
    for item in (
        *words,
        "adapter.targets=atention",
        "track.trackers=[wandbb]",
    ):
        assert "Did you mean" in refused([*verb, preset, item], capsys), item


REGISTRIES = {
    "model.projector.kind": [name for name in PROJECTORS if name != "mlpNx_gelu"],
    "model.chat_template": list(CHAT_TEMPLATES),
    "model.attention": list(usual_names.ATTENTION),
    "train.zero": ["auto", "none", *(path.stem for path in shipped_folder("deepspeed_configs").glob("*.json"))],
    "train.compile": torch.compiler.list_backends(exclude_tags=()),
    "track.trackers": list(TRACKERS),
    "data.train.columns.KEY": sorted(set().union(*READ.values())),
    "validate.tasks": sorted({task.name for task in all_tasks().values()}),
    "adapter.peft": peft_methods.method_names(),
    **{key: list(typing.get_args(kind)) for (of, key), kind in WORDS.items() if of is Recipe},
}


@pytest.mark.parametrize("key", REGISTRIES)
def test_every_name_of_every_set_is_refused_where_it_is_misspelt(
    key: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_registry, "load_file", functools.cache(task_registry.load_file))
    for name in REGISTRIES[key]:
        wrong = longer(name)
        if wrong in REGISTRIES[key]:
            continue
        value = {"adapter.peft": f"{{type: {wrong}}}"}.get(key, wrong)
        value = f"[{wrong}]" if key in ("track.trackers", "validate.tasks") else value
        changed = override(key, value) if not key.endswith("KEY") else f"{key.removesuffix('.KEY')}={{{wrong}: column}}"
        changed = changed.replace("data.train.columns", "data.train.0.columns")
        assert "Did you mean" in refused(["config", PRESET, changed], capsys), wrong


def test_every_option_of_every_method_of_peft_is_refused_where_it_is_misspelt() -> None:
    for name in peft_methods.method_names():
        for option in peft_methods.method_named(name).options:
            with pytest.raises(MoSLoRAError, match=r"no such option\. Did you mean"):
                check_settings(load_recipe(PRESET, [f"adapter.peft={{type: {name}, {longer(option)}: 1}}"]))


def test_names_that_need_no_import_are_in_their_registries() -> None:
    own = [name for name, kind in PROJECTORS.items() if kind.__module__.startswith("mm_moslora.")]
    assert set(own) - {"mlpNx_gelu"} <= set(usual_names.PROJECTOR_KINDS)
    for kind in usual_names.PROJECTOR_KINDS:
        projector_class(kind)
    own = [name for name, reward in REWARDS.items() if reward.__module__.startswith("mm_moslora.")]
    assert tuple(own) == usual_names.REWARDS
    for name in usual_names.ATTENTION:
        if not name.startswith("flash"):  # needs its package
            require_attention(name)
    with pytest.raises(MoSLoRAError) as error:
        require_attention("no such attention")
    assert all(name in str(error.value) for name in usual_names.ATTENTION)
    assert set(usual_names.COMPILE_BACKENDS) <= set(torch.compiler.list_backends(exclude_tags=()))
    assert typing.get_args(ModuleMixerInit) == (*MIXER_INITS, NO_MIXER)
    for name in REGISTRIES["train.zero"]:
        if name not in ("auto", "none"):
            read_preset(name)


def test_names_of_a_users_own_are_known_once_they_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(PRESET, ["model.projector.kind=own_kind"])
    with pytest.raises(MoSLoRAError, match="own_kind"):
        check_settings(recipe)
    monkeypatch.setitem(PROJECTORS, "own_kind", type("OwnKind", (LinearProjector,), {}))
    check_settings(recipe)


def test_a_factor_of_mixers_is_refused_where_none_trains(capsys: Any) -> None:
    alone = ["config", PRESET, "optim.mixer_factor=6", "adapter.mixer_trainable=false", "adapter.mixer_init=identity"]
    assert "optim.mixer_factor is 6, which is of the mixers" in refused(alone, capsys)


def test_a_file_of_deepspeed_may_be_on_another_machine(tmp_path: Path, capsys: Any) -> None:
    assert run(["config", PRESET, f"train.zero={tmp_path}/far.json"]) == 0
    (tmp_path / "near.json").write_text("{")
    assert "near.json" in refused(["config", PRESET, f"train.zero={tmp_path}/near.json"], capsys)


def test_presets_pass_and_import_nothing_heavy() -> None:
    program = """
import sys
from mm_moslora.cli import run
from mm_moslora.config import recipe_names
from mm_moslora.diffusion.diffusion_recipe import DIFFUSION_RECIPES
for name in recipe_names():
    assert run(["config", name]) == 0, name
for name in recipe_names(DIFFUSION_RECIPES):
    assert run(["config", name]) == 0, name
assert not {"torch", "transformers", "peft", "deepspeed"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
