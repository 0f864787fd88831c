"""The default token budget on a GPU: what surely fits, and an error before loading where one example does not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from trials import with_train

from mm_moslora.training import run_setup
from mm_moslora.training.deepspeed_presets import ZeroSettings
from mm_moslora.training.metrics import gpu_memory
from mm_moslora.training.metrics.gpu_memory import FREE_SHARE, GIB, MODEL_ERROR, StepMemory
from mm_moslora.training.metrics.model_cost import model_cost
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, TrainingError


@pytest.fixture
def card(monkeypatch):
    """Has the run believe in a GPU of so many GiB."""

    def put_in(gib: float) -> None:
        memory = SimpleNamespace(total_memory=gib * GIB, name="unknown")
        monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)

    return put_in


def budget_of(recipe):
    return gpu_memory.estimate_run(recipe, recipe.model, precision="bf16").tokens


def test_a_gpu_gets_the_tokens_that_surely_fit_and_a_cpu_any_number(recipe, card, monkeypatch):
    assert budget_of(recipe) is None
    assert budget_of(with_train(recipe, micro_tokens=999)) == 999
    before = torch.get_rng_state()
    card(4)
    found = budget_of(recipe)
    assert torch.equal(torch.get_rng_state(), before)
    step = StepMemory(
        size=model_cost(recipe.model, recipe.adapter), zero="none", world=1, checkpointing=False
    )  # fmt: skip
    room = FREE_SHARE * 4 * GIB / (1 + MODEL_ERROR)
    assert step.worst(found).total <= room < step.worst(found + 1).total
    assert budget_of(with_train(recipe, gradient_checkpointing=True)) > found
    assert budget_of(with_train(recipe, micro_tokens=999)) == 999
    card(2)
    small = budget_of(recipe)
    assert small < 0.6 * found
    card(4)
    monkeypatch.setattr(distributed, "table_over_ranks", lambda values: [values, [2.0 * GIB, 0.0]])
    assert budget_of(recipe) == small  # another rank has the smaller card


def test_a_gpu_too_small_for_one_example_is_told_before_loading_with_what_would_fit(recipe, card, monkeypatch):
    monkeypatch.setattr(run_setup, "load_parts", lambda *_, **__: pytest.fail("the model is loaded"))
    long = replace(recipe, data=replace(recipe.data, max_length=60_000))
    card(2.15)
    with pytest.raises(
        TrainingError, match=r"data\.max_length is 60000, .* takes about .* GiB \(.*activations"
    ) as caught:
        run_setup.prepare(long)
    text = str(caught.value)
    assert "the smallest GPU of this run has 2.1 GiB, of which 94% can be used" in text
    assert "set train.gradient_checkpointing to true" in text
    most = int(re.search(r"lower data\.max_length to (\d+)", text)[1])
    fitting = replace(recipe, data=replace(recipe.data, max_length=most))
    assert gpu_memory.estimate_run(fitting, fitting.model, precision="fp32").tokens == most
    rows = replace(recipe, data=replace(recipe.data, pack_tokens=60_000))
    with pytest.raises(TrainingError, match=r"data\.pack_tokens is 60000"):
        run_setup.prepare(rows)
    assert budget_of(with_train(rows, micro_tokens=60_000)) == 60_000


def test_a_validation_that_gathers_more_than_a_gpu_holds_is_told_before_loading(recipe, card, monkeypatch):
    size = replace(model_cost(recipe.model, recipe.adapter), weight_bytes=100 * GIB)
    monkeypatch.setattr(gpu_memory, "model_cost", lambda *_, **__: size)
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    three = with_train(recipe, zero="zero3")
    for validate in ({"samples": 2}, {"tasks": ["pope"]}):
        asked = replace(three, validate=replace(three.validate, **validate))
        card(80)
        assert budget_of(three) > 0
        for micro_tokens in (None, 999):
            told = r"For validate\.samples.* zero3 gathers the whole model .* 11\d GiB; a GPU has 80\.0 GiB"
            with pytest.raises(TrainingError, match=told):
                budget_of(with_train(asked, micro_tokens=micro_tokens))
        card(160)
        assert budget_of(asked) > 0
        assert budget_of(with_train(asked, micro_tokens=999)) == 999


def test_a_model_that_cannot_be_estimated_trains_without_a_budget(recipe, card, monkeypatch, caplog):
    def unknown(*_, **__):
        raise AttributeError("no rotary_emb")

    monkeypatch.setattr(gpu_memory, "model_cost", unknown)
    card(80)
    assert budget_of(recipe) is None
    assert "cannot be estimated (no rotary_emb)" in caplog.text


def settings_of(name: str, **more) -> ZeroSettings:
    return ZeroSettings.of(name, **({"world": 16, "ranks_of_host": 8, "largest_adapter": 0} | more))


def test_a_file_of_ones_own_is_counted_and_a_wrong_value_in_it_refused(tmp_path):
    """What the settings of shipped ones cost is tested below."""
    assert settings_of("zero3_hpz", world=4).secondary == 4
    assert settings_of("zero3", largest_adapter=7_000_000).persistent == 7_000_000
    file = tmp_path / "own.json"
    file.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}')
    own = settings_of(str(file))
    assert (own.optimizer_off, own.reduce_bucket, own.persistent) == (0.3, 500_000_000, 1_000_000)
    file.write_text("{}")
    assert settings_of(str(file)).stage == 0
    for wrong, said in (
        ('"reduce_bucket_size": "large"', "is 'large', expected a number"),
        ('"stage": 4', "is 4, expec"),
        ('"stage": true', "is True, expected 0 to 3"),
        ('"stage": 3, "offload_param": "cpu"', r"zero_optimization\.offload_param is 'cpu', expected a group of keys"),
    ):
        file.write_text(f'{{"zero_optimization": {{{wrong}}}}}')
        with pytest.raises(ConfigError, match=said):
            settings_of(str(file))
    with pytest.raises(ConfigError, match="zero4"):
        settings_of("zero4")


PUBLISHED_FILES = {
    "llava-zero2": {"stage": 2, "overlap_comm": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto"},
    "llava-zero3": {
        "stage": 3, "overlap_comm": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    },
    "transformers-zero2": {
        "stage": 2, "offload_optimizer": {"device": "none", "pin_memory": "auto"}, "allgather_bucket_size": "auto",
        "overlap_comm": "auto", "reduce_bucket_size": "auto", "contiguous_gradients": "auto",
    },
    "transformers-zero3": {
        "stage": "3", "offload_param": {"device": "cpu", "buffer_count": "auto"}, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": "auto",
    },
}  # fmt: skip
"""`zero_optimization` of the files that LLaVA's scripts and transformers' examples train with, shortened."""


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_auto_in_a_deepspeed_file_is_deepspeeds_default(name, recipe, card, tmp_path):
    zero = PUBLISHED_FILES[name]
    groups = {
        key: {k: v for k, v in value.items() if v != "auto"} for key, value in zero.items() if type(value) is dict
    }
    found = []
    for number, settings in enumerate((zero, {key: value for key, value in zero.items() if value != "auto"} | groups)):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({"bf16": {"enabled": "auto"}, "zero_optimization": settings}))
        found.append(settings_of(str(file)))
        card(80)
        assert budget_of(with_train(recipe, zero=str(file))) > 10_000
    assert found[0] == found[1]
    assert found[0].stage == int(zero["stage"])


def test_what_a_setting_of_deepspeed_costs_and_saves_is_in_the_estimate(recipe, tmp_path):
    size = model_cost(recipe.model, recipe.adapter)
    trained, frozen = 2 * size.trainable, size.weight_bytes

    def of(zero: str):
        return StepMemory(size=size, zero=zero, world=16, checkpointing=False).worst(100)

    plain, hpz, bytewise, off = (of(name) for name in ("zero3", "zero3_hpz", "zeropp", "zero3_offload"))
    assert hpz.weights - plain.weights == pytest.approx(frozen / 8)
    assert hpz.adapters - plain.adapters == pytest.approx(trained / 8)
    assert bytewise.weights == pytest.approx(hpz.weights / 2)
    assert (off.weights, off.gradients, off.optimiser) == (0, 0, 0)
    assert off.adapters == plain.adapters - trained / 16  # what stays whole
    assert off.buffers == plain.buffers
    assert (of("zero1").gradients, of("zero2_offload").gradients, of("zero2").gradients) == (trained, 0, trained / 16)
    # Two buckets of 5e8 values in bf16, whatever is in them.
    assert of("zero2_full").buffers - of("zero2").buffers == 2 * (2 * 500_000_000 - 50_000_000)
    file = tmp_path / "own.json"
    file.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000000000}}')
    whole = of(str(file))
    assert whole.adapters - trained / 16 == pytest.approx(frozen + trained)
