"""Every shipped recipe on meta tensors: what is adapted, how much trains, at which rates, for how many steps."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planning_configs
import pytest
from planning_configs import CONVERTED, INTERNLM2, memory_of, write_configurations

from mm_moslora import cli
from mm_moslora.cli.plan_verb import as_it_stands, expected
from mm_moslora.config import AdapterConfig, ModelConfig, Recipe, load_recipe, recipe_names
from mm_moslora.models.meta_model import MetaModel, build_meta_model
from mm_moslora.models.model_sizes import config_to_count, shipped_shapes
from mm_moslora.models.pretrained_vlm import PICTURE
from mm_moslora.planning import run_plan
from mm_moslora.planning.run_plan import DataSize, RunPlan, known_data, plan
from mm_moslora.training.metrics.gpu_memory import FREE_SHARE, StepMemory
from mm_moslora.training.metrics.gpu_specs import Gpus, parse_gpus
from mm_moslora.training.metrics.model_cost import ModelCost, model_cost
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.training.training_loop import lr_factor
from mm_moslora.utils.errors import ConfigError

SHIPPED = [name for name in recipe_names() if not name.startswith("quickstart")]
# Millions of adapter and mixer parameters: language model, then encoder (arXiv 2406.11909 and arithmetic).
COUNTS = {
    "llava15_7b_lora": (319.8, 0, 0, 0), "llava15_7b_moslora": (319.8, 3.7, 0, 0),
    "llava15_13b_lora": (500.7, 0, 0, 0), "llava15_13b_moslora": (500.7, 4.6, 0, 0),
    "llama3_8b_clip_moslora": (167.8, 0.9, 28.3, 0.6), "internlm2_7b_qmoslora": (1208.0, 41.9, 28.3, 0),
    "commonsense_170k": (28.3, 0.04, 0, 0),
}  # fmt: skip
ROOT = Path(__file__).parents[2]
RECIPES, TABLE = ROOT / "mm_moslora" / "config" / "recipes", ROOT / "docs" / "recipes.md"
UPDATE = bool(os.environ.get("UPDATE_PLANS"))
BATCHES = {"pretrain": 256, "full": 128, "lora": 128, "moslora": 128}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_configurations(tmp_path_factory.mktemp("configurations"))


@pytest.fixture(scope="module")
def measured_once(folders: dict[str, str]) -> Callable[..., ModelCost]:
    found: dict[str, ModelCost] = {}

    def measured(model: ModelConfig, adapter: AdapterConfig, **options: Any) -> ModelCost:
        usual = {"picture": PICTURE, "vision_checkpointing": False}
        key = repr((model, adapter, sorted((usual | options).items())))
        return found[key] if key in found else found.setdefault(key, model_cost(model, adapter, **options))

    return measured


@pytest.fixture(autouse=True)
def _measure_once(measured_once, monkeypatch) -> None:
    """Many tests plan the same models, on other GPUs."""
    for module in (run_plan, planning_configs):
        monkeypatch.setattr(module, "model_cost", measured_once)


def shipped(name: str, folders: dict[str, str]) -> Recipe:
    model = load_recipe(name).model
    overrides = [f"model.vlm={folders[model.vlm]}"] if model.vlm else [f"model.language={folders[str(model.language)]}"]
    if model.vision is not None:
        overrides.append(f"model.vision.name={folders[model.vision.name]}")
    return load_recipe(name, overrides)


def meta_model(recipe: Recipe) -> MetaModel:
    return build_meta_model(recipe.model, recipe.adapter)


@pytest.fixture(scope="module")
def bones(folders) -> Callable[[str], MetaModel]:
    """The skeleton of a shipped recipe."""
    return functools.cache(lambda name: meta_model(shipped(name, folders)))


@pytest.fixture
def planned(folders) -> Callable[[str, str], RunPlan]:
    """The plan of a shipped recipe on GPUs, as the command line names them."""
    return lambda name, gpus: plan(shipped(name, folders), parse_gpus(gpus))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_adapts_the_right_modules_and_as_many_parameters_as_is_known(name: str, folders, bones) -> None:
    recipe = shipped(name, folders)
    found = bones(name).parameters()
    kinds = ("adapter", "mixer", "vision adapter", "vision mixer")
    trained = [found.get(kind, (0, 0))[1] / 1e6 for kind in kinds]
    if name in COUNTS:
        assert trained == pytest.approx(COUNTS[name], abs=0.06, rel=0.001)
    adapted = {path.split(".lora_A")[0] for path, _ in bones(name).model.named_parameters() if ".lora_A." in path}
    assert bool(adapted) == (recipe.model.language_mode == "adapter")
    assert not any("lm_head" in path or "multi_modal_projector" in path for path in adapted)
    assert any("vision_tower" in path for path in adapted) == bool(
        recipe.model.vision and recipe.model.vision.mode == "adapter"
    )
    leaves = {path.rpartition(".")[2] for path in adapted if "vision_tower" not in path}
    if recipe.model.language == folders[INTERNLM2]:
        assert leaves == {"wqkv", "wo", "w1", "w2", "w3"}
    elif adapted:
        whole = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert leaves == (whole if recipe.adapter.targets == "all-linear" else set(recipe.adapter.targets))
    assert found.get("projector", (0, 0))[1] > 0 or recipe.model.vision is None


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_trains_its_groups_at_its_rates_over_its_schedule(name: str, folders, bones) -> None:
    recipe = shipped(name, folders)
    rates = {group.name: group.peak_lr for group in parameter_groups(bones(name).model, recipe.optim)}
    optim = recipe.optim
    if recipe.model.language_mode == "adapter":
        assert rates["adapter"] == optim.lr
        assert rates.get("mixer", optim.lr) == optim.lr
    if "projector" in rates:
        assert rates["projector"] == (optim.lr if optim.projector_lr is None else optim.projector_lr)
    if name.startswith("llava15"):
        kind = name.rpartition("_")[2]
        assert recipe.train.global_batch == BATCHES[kind]
        assert rates["projector"] == {"pretrain": 1e-3}.get(kind, 2e-5)
    if name in ("llama3_8b_clip_moslora", "internlm2_7b_qmoslora"):
        assert recipe.train.global_batch == 64
        assert lr_factor(310, 10_395, optim) < 1.0 <= lr_factor(312, 10_395, optim)
    assert lr_factor(10_000, 10_000, optim) == 0.0


@pytest.mark.parametrize("name", recipe_names())
def test_the_head_of_a_recipe_says_how_to_launch_it_and_what_to_expect(name: str) -> None:
    head = head_of(name)
    assert f"train {name}" in head
    for word in ("Launch:", "Data:", "Expect:", "Source:"):
        assert f"# {word}" in head


@pytest.mark.parametrize("name", SHIPPED)
def test_the_head_of_a_recipe_and_the_table_say_what_is_planned(name: str, folders) -> None:
    """After a change of the planner or of a recipe: UPDATE_PLANS=1 python -m pytest tests/planning/test_recipes.py"""
    words = shlex.split(re.search(r"# Plan:    mm-moslora plan (.*)  \(not measured\)", head_of(name))[1])
    assert words[0] == name
    given = dict(zip(words[1::2], words[2::2], strict=True))
    data = None
    if "--samples" in given:
        data = DataSize(samples=int(given["--samples"]), tokens=float(given["--tokens-per-sample"]))
    gpus = parse_gpus(given["--gpus"])
    found = plan(shipped(name, folders | {INTERNLM2: folders[CONVERTED]}), gpus, data)
    assert found.best is not None
    assert found.own.fits
    line = f"#          {as_it_stands(found, found.own)}"
    row = f"| `{name}` | {gpus.count} x {gpus.name} | {found.own.label}: {expected(found, found.own)} |"
    if UPDATE:
        RECIPES.joinpath(f"{name}.yaml").write_text(re.sub("#          As it stands.*", line, text_of(name)))
        TABLE.write_text(re.sub(rf"\| `{name}` \| \d x .*", row, TABLE.read_text()))
    assert line in head_of(name).splitlines()
    assert row in TABLE.read_text().splitlines()


PUBLISHED = [  # https://github.com/haotian-liu/LLaVA: README.md, scripts/v1_5/pretrain.sh and finetune.sh
    ("llava15_7b_pretrain", "8xA100-80G", 3.5), ("llava15_13b_pretrain", "8xA100-80G", 5.5),
    ("llava15_7b_full", "8xA100-40G", 10.0), ("llava15_13b_full", "8xA100-80G", 20.0),
]  # fmt: skip
"""Recipe, GPUs, and hours that LLaVA-1.5 takes there, as its authors say."""


@pytest.mark.parametrize(("name", "gpus", "hours"), PUBLISHED)
def test_plans_with_the_settings_of_published_runs_are_within_a_fifth_of_their_times(name, gpus, hours, folders):
    """They recompute all activations, in pretraining too, in stock layers, which the recipes here need not."""
    recipe = changed(shipped(name, folders), gradient_checkpointing=True)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, lean_layers=False))
    found = plan(recipe, parse_gpus(gpus))
    assert found.own.fits
    assert found.hours(found.own) == pytest.approx(hours, rel=0.2)
    line = f"about {hours:g} h | {found.hours(found.own):.1f} h |"
    assert line in TABLE.read_text()


def named_by(name: str) -> frozenset[str]:
    """The models of a recipe."""
    model = load_recipe(name).model
    named = {model.language, model.vlm, model.vision.name if model.vision else None}
    return frozenset(str(part) for part in named if part is not None)


def test_the_sizes_of_shipped_models_are_known() -> None:
    for name in recipe_names():
        assert set() < named_by(name) <= set(shipped_shapes())


def test_shipped_models_are_planned_where_no_hub_is(folders, tmp_path: Path, monkeypatch, capsys) -> None:
    """An assembled and a ready-made one; of the others the sizes are those of the configurations of all tests here."""
    monkeypatch.setattr(run_plan, "model_cost", model_cost)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = ["--samples", "1000", "--tokens-per-sample", "400"]
    for name in ("llava15_7b_moslora", "qwen3_vl_8b_moslora"):
        assert cli.run(["plan", name, "--gpus", "8xA100-80G", *words]) == 0
        assert "GiB per GPU" in capsys.readouterr().out
    for name in shipped_shapes():
        written = CONVERTED if name == INTERNLM2 else name
        found, expected = (config_to_count(place, None).to_dict() for place in (name, folders[written]))
        assert {key: found[key] for key in shipped_shapes()[name]} == {
            key: expected[key] for key in shipped_shapes()[name]
        }


def test_a_tower_is_counted_with_the_models_own_sizes() -> None:
    """Parameters on the hub, in thousand millions: the model's, and its tower's with the projector."""
    sizes = {
        "qwen25_vl_7b_moslora": (8.292, 0.676), "qwen3_vl_8b_moslora": (8.767, 0.576),
        "qwen25_vl_32b_moslora": (33.453, 0.689), "qwen25_vl_72b_moslora": (73.411, 0.705),
    }  # fmt: skip
    for name, (whole, vision) in sizes.items():
        parts = meta_model(load_recipe(name)).parameters()
        base = {part: total for part, (total, _) in parts.items() if "adapter" not in part and "mixer" not in part}
        assert sum(base.values()) / 1e9 == pytest.approx(whole, abs=0.002)
        assert sum(total for part, total in base.items() if part != "language") / 1e9 == pytest.approx(vision, abs=0.01)


@pytest.mark.parametrize("name", ["qwen25_vl_7b_moslora", "qwen3_vl_8b_moslora"])
def test_ready_made_models_are_planned_on_packed_rows_and_lean_layers(name: str, folders) -> None:
    recipe = shipped(name, folders)
    lean = memory_of(recipe)
    stock = memory_of(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, lean_layers=False)))
    assert lean.is_lean
    assert lean.kept_per_layer < 0.6 * stock.kept_per_layer
    assert lean.counter.drops  # though Qwen3-VL's three deepstack layers reach the end of the two that are at hand
    assert not stock.counter.drops


def text_of(name: str) -> str:
    return RECIPES.joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def head_of(name: str) -> str:
    return text_of(name).partition("\nname:")[0]


def test_a_plan_says_what_the_run_costs(folders, planned, monkeypatch, capsys) -> None:
    recipe = shipped("llava15_7b_moslora", folders)
    monkeypatch.setenv("COLUMNS", "300")
    words = ["plan", "llava15_7b_moslora", "--model.language", str(recipe.model.language), "--gpus", "8xA100-80G"]
    words += ["--model.vision.name", recipe.model.vision.name]
    assert cli.run([*words, "--price", "1.8"]) == 0
    shown = capsys.readouterr().out
    found = planned("llava15_7b_moslora", "8xA100-80G")
    cost = float(re.search(r"^Cost: ([\d,.]+) at 1.8 per GPU and hour\.$", shown, re.MULTILINE)[1].replace(",", ""))
    assert cost == pytest.approx(found.hours(found.best) * 8 * 1.8, abs=0.01)
    assert as_it_stands(found, found.own) in shown
    assert cli.run(words) == 0
    assert "Cost" not in capsys.readouterr().out


def test_a_plan_names_the_fastest_setting_that_fits_and_why_others_do_not(planned) -> None:
    found = planned("llava15_7b_moslora", "8xA100-80G")
    assert found.best is not None
    assert found.best.zero == "zero2"
    assert not found.best.checkpointing
    # 14.1 GB of weights and 323.5 M trained: 2P + 2Pt + 14Pt/W.
    states = found.best.memory
    assert (states.weights + states.adapters + states.gradients + states.optimiser) / 1e9 == pytest.approx(
        15.3, rel=0.02
    )
    small = planned("llava15_7b_moslora", "8xRTX4090")
    assert small.best is not None
    assert small.best.memory.total < 0.94 * 24e9
    assert any(not option.fits for option in small.options)
    alone = planned("llava15_13b_full", "1xRTX3090")
    assert alone.best is None
    halved = planned("llava15_7b_moslora", "4xA100-80G")
    assert halved.best is not None
    assert halved.hours(halved.best) == pytest.approx(2 * found.hours(found.best), rel=0.02)


def test_small_micro_batches_take_the_time_of_their_launches(folders) -> None:
    """Records of 110 tokens on an H100: 32 lean layers of 161 kernels, whatever is in a micro-batch."""
    recipe, gpus = shipped("commonsense_170k", folders), parse_gpus("1xH100-80G")
    one, four, all_together = (plan(changed(recipe, micro_batch=number), gpus) for number in (1, 4, 16))
    assert one.data.tokens / one.own.tokens_per_second == pytest.approx(32 * 161 * 10e-6)
    assert one.hours(one.own) == pytest.approx(4 * four.hours(four.own))
    assert all_together.hours(all_together.own) < 0.7 * four.hours(four.own)


def test_a_quantised_base_takes_a_third_of_the_memory(folders) -> None:
    recipe = shipped("llama3_8b_clip_moslora", folders)
    whole = memory_of(recipe)
    packed = memory_of(load_recipe_with(recipe, "nf4"))
    assert packed.weight_bytes < 0.4 * whole.weight_bytes
    assert packed.is_lean
    assert packed.kept_per_layer == whole.kept_per_layer
    needed = [StepMemory(size=size, zero="zero2", world=4, checkpointing=True).worst(1000) for size in (whole, packed)]
    assert needed[1].workspace - needed[0].workspace == 4096 * 14_336 * 2  # one weight of Llama 3 made dense
    assert not memory_of(load_recipe_with(recipe, "int8")).is_lean
    data = known_data(recipe.data.train, whole.tokens_per_image)
    assert data is not None
    assert data.samples == 665_298


def load_recipe_with(recipe: Recipe, quantisation: str) -> Recipe:
    changed = recipe.to_dict()
    changed["model"]["quantisation"] = quantisation
    return Recipe.from_dict(changed)


def changed(recipe: Recipe, **overrides: Any) -> Recipe:
    """The same with other keys of `train` and `data`."""
    data = {key: overrides.pop(key) for key in ("max_length", "pack_tokens") if key in overrides}
    return dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, **data), train=dataclasses.replace(recipe.train, **overrides)
    )


@pytest.mark.parametrize(("optimizer", "on_gpu"), [("adamw", 8), ("adamw_8bit", 2), ("muon", 4)])
def test_a_plan_counts_the_state_of_its_optimiser(optimizer, on_gpu, folders) -> None:
    recipe = shipped("llava15_7b_moslora", folders)
    optim = dataclasses.replace(recipe.optim, optimizer=optimizer, schedule="constant")
    recipe, size = changed(dataclasses.replace(recipe, optim=optim), zero="auto"), memory_of(recipe)
    one = StepMemory(size=size, zero="zero0", world=1, checkpointing=False, optimizer=optimizer)
    assert one.worst(1000).optimiser / size.trainable == pytest.approx(4 + on_gpu, rel=0.01)  # with masters
    assert one.main_memory() == 0
    made = plan(recipe, parse_gpus("8xA100-80G"))
    stages = {option.zero for option in (*made.options, made.own)}
    assert stages == {"zero0"} if optimizer != "adamw" else "zero0" not in stages
    many = dataclasses.replace(one, world=8, checkpointing=True)
    assert ("zero3" in many.remedies(13e9, longest=256, key="data.max_length")) == (optimizer == "adamw")


def test_a_plan_knows_what_checkpointing_of_some_layers_and_offload_save(folders) -> None:
    gpus, recipe = parse_gpus("8xA100-80G"), shipped("llava15_7b_moslora", folders)
    size, settings = memory_of(recipe), ((False, False), (8, False), (8, True), (True, False), (True, True), (99, True))
    kept = {
        setting: StepMemory(size=size, zero="zero2", world=8, checkpointing=setting[0], offload=setting[1])
        .worst(10_000).activations
        for setting in settings
    }  # fmt: skip
    row, layer = 10_000 * size.width * 2, 10_000 * size.kept_per_layer
    assert kept[False, False] - kept[8, False] == pytest.approx(8 * (layer - row))
    assert kept[8, False] - kept[8, True] == pytest.approx(6 * row)
    assert kept[8, False] - kept[True, False] == pytest.approx(23 * layer - 24 * row)  # one layer is recomputed
    assert kept[True, False] - kept[True, True] == pytest.approx(30 * row)
    assert kept[99, True] == kept[True, True]
    found = [plan(changed(recipe, gradient_checkpointing=again), gpus).own for again in (False, 8, True)]
    assert [option.label.rpartition(", ")[2] for option in found[1:]] == ["checkpointing of 8 layers", "checkpointing"]
    assert found[0].tokens_per_second > found[1].tokens_per_second > found[2].tokens_per_second
    long = changed(recipe, max_length=170_000, gradient_checkpointing=True)
    assert "train.activation_offload to true" in plan(long, gpus).remedy
    assert plan(changed(long, activation_offload=True), gpus).own.label.endswith("checkpointing, offload")


def test_ranks_that_share_rows_take_longer_ones(folders) -> None:
    gpus, recipe = parse_gpus("8xA100-80G"), shipped("llava15_7b_moslora", folders)
    size = memory_of(recipe)
    alone, together = (
        StepMemory(size=size, zero="zero2", world=8, checkpointing=False, together=ranks).token_budget(80e9, longest=1)
        for ranks in (1, 4)
    )
    assert 3 * alone < together < 4 * alone  # embeddings are whole on every rank
    long = changed(recipe, max_length=2 * alone, micro_batch=1, global_batch=128)
    assert not plan(long, gpus).own.fits
    found = plan(changed(long, sequence_parallel=4), gpus)
    assert found.own.fits
    assert found.own.most is None
    assert plan(changed(recipe, sequence_parallel=4, global_batch=1, micro_batch=1), gpus).idle == 4


@pytest.mark.parametrize("validate", [{"tasks": ["pope"]}, {"samples": 4}])
def test_a_validation_that_gathers_the_model_under_zero3_must_fit(validate, folders) -> None:
    recipe, data = shipped("qwen25_vl_72b_moslora", folders), DataSize(samples=9, tokens=9)
    generating = dataclasses.replace(recipe, validate=dataclasses.replace(recipe.validate, **validate))
    gpus = parse_gpus("16xA100-80G")
    assert plan(recipe, gpus, data).own.fits
    found, size = plan(generating, gpus, data), memory_of(recipe)
    assert not found.own.fits
    assert found.best is None
    assert found.own.peak == found.own.generating > size.weight_bytes > 1.5 * gpus.memory
    assert "does not fit, validation, with the whole model, takes 150 GiB" in as_it_stands(found, found.own)
    assert re.search(r"zero3 gathers the whole model.* 150 GiB; .*Leave both keys out and measure", found.remedy)
    larger = plan(generating, parse_gpus("16xB200-180G"), data)
    assert larger.own.fits
    assert expected(larger, larger.own).startswith("150 of 168 GiB")
    smaller = shipped("llava15_7b_full", folders)  # ZeRO-3 for the optimiser's state: the weights fit whole
    smaller = dataclasses.replace(smaller, validate=dataclasses.replace(smaller.validate, **validate))
    assert plan(smaller, parse_gpus("8xA100-80G")).own.fits


@pytest.mark.parametrize(
    ("name", "gpus", "settings", "said"),
    [
        ("llava15_7b_moslora", 8, {"gradient_checkpointing": 100}, r"is 100, but LlamaModel has 32 layers"),
        ("llava15_7b_moslora", 12, {"sequence_parallel": 3}, r"is 3, but LlamaModel has 32 attention heads and 32 key"),
        ("llava15_7b_moslora", 8, {"sequence_parallel": 3}, r"is 3, which does not divide the 8 ranks"),
        ("qwen25_vl_7b_moslora", 8, {"sequence_parallel": 2}, r"but Qwen2_5_VLFor.* takes whole rows"),
        ("llava15_7b_moslora", 8, {"zero": "none"}, r"train\.zero is none on 8 ranks"),
        ("llava15_7b_moslora", 8, {"zero": "zero3", "compile": "inductor"}, r"is 'inductor' with train\.zero zero3"),
    ],
)
def test_a_plan_refuses_what_training_refuses(name, gpus, settings, said, folders) -> None:
    """By the functions that training calls: `check_model` and `refuse_ranks`."""
    with pytest.raises(ConfigError, match=said):
        plan(
            changed(shipped(name, folders), **settings),
            parse_gpus(f"{gpus}xA100-80G"),
            DataSize(samples=1000, tokens=1000),
        )


def test_trained_weights_are_gathered_and_gradients_exchanged_at_the_speed_of_the_slowest_link(folders) -> None:
    recipe = shipped("llava15_7b_full", folders)
    size = memory_of(recipe)
    trained = 2 * size.trainable

    def seconds(zero: str, gpus: Gpus, **more: Any) -> float:
        found = plan(changed(recipe, zero=zero, gradient_checkpointing=False, micro_tokens=1 << 20, **more), gpus)
        tokens = found.own.micro_batch * found.data.tokens
        return gpus.count * tokens / found.own.tokens_per_second

    eight, many = parse_gpus("8xL40S-48G"), parse_gpus("64xL40S-48G")
    assert (eight.across, many.across) == (20e9, 12.5e9)
    weights = size.weight_bytes + trained
    for gpus in (eight, many):  # two passes of gathers take longer than the computation; then gradients
        expected = (2 * weights * (1 - 1 / gpus.count) + trained) / gpus.across
        assert seconds("zero3", gpus, micro_batch=1) == pytest.approx(expected, rel=2e-3)  # small weights stay whole
        assert seconds("zero2", gpus, micro_batch=1) < expected
    assert plan(recipe, many).best.zero == "zero2"
    # A second copy on every host leaves gradients and updated weights to the network: here one micro-batch is a step.
    expected = (weights * 7 / 8 / 20e9) + (trained * 63 / 64 + trained) / 12.5e9 + size.weight_bytes * 7 / 8 / 20e9
    assert seconds("zero3_hpz", many, micro_batch=2) == pytest.approx(expected, rel=2e-3)
    slow, fast = (dataclasses.replace(many, network=1e9 * number) for number in (1, 100))
    assert seconds("zero2", slow) - seconds("zero2", fast) == pytest.approx(2 * trained * (1 / 1e9 - 1 / 20e9))


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}, None),
        ({"stage": "2", "allgather_bucket_size": "auto", "overlap_comm": "auto"}, None),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "auto"}}, None),
        ({"stage": 2, "reduce_buckte_size": 5}, "reduce_buckte_size Extra inputs are not permitted"),
        ({"stage": 3, "offload_param": "cpu"}, r"offload_param is 'cpu', expected a group of keys"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, r"offload_optimizer\.ratio 0\.5"),
    ],
)
def test_a_plan_takes_the_deepspeed_files_that_training_takes(zero, said, folders, tmp_path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": zero}))
    recipe = changed(shipped("llava15_7b_moslora", folders), zero=str(file))
    if said is None:
        assert plan(recipe, parse_gpus("8xA100-80G")).own.tokens_per_second > 0
        return
    with pytest.raises(ConfigError, match=said):
        plan(recipe, parse_gpus("8xA100-80G"))


def test_a_plan_judges_the_largest_micro_batch_and_says_what_would_fit(folders) -> None:
    """16 examples of 2,048 tokens take 100 GiB besides the weights; the mean ones take half of it."""
    gpus, recipe = parse_gpus("8xA100-80G"), shipped("llava15_7b_moslora", folders)
    own = plan(recipe, gpus).own
    assert own.fits
    assert own.micro_batch * recipe.data.max_length > own.most > recipe.data.max_length
    step = StepMemory(size=memory_of(recipe), zero="zero2", world=8, checkpointing=False)
    assert own.memory == step.worst(own.most)
    assert own.memory.total < own.memory.total * 1.1 <= FREE_SHARE * gpus.memory < step.worst(own.most + 1).total * 1.11
    found = plan(changed(recipe, micro_tokens=16 * 2048), gpus)
    assert not found.own.fits
    assert found.remedy == f"train.micro_tokens up to {own.most} fits, or leave it out."
    assert plan(changed(recipe, micro_tokens=own.most), gpus).own.fits

    small = parse_gpus("8xRTX4090")
    found = plan(changed(recipe, max_length=8192), small)
    limit, change = re.fullmatch(
        r"To make it fit, lower data\.max_length to (\d+), or set (.*), or take larger or more GPUs\.", found.remedy
    ).groups()
    assert change == "train.zero to zero3 and train.gradient_checkpointing to true"
    assert plan(changed(recipe, max_length=int(limit)), small).own.fits
    assert not plan(changed(recipe, max_length=int(limit) + 1), small).own.fits
    assert plan(changed(recipe, max_length=8192, zero="zero3", gradient_checkpointing=True), small).own.fits
    rows = plan(changed(recipe, pack_tokens=8192), small)
    assert "lower data.pack_tokens to" in rows.remedy
