"""Every optimiser of `optim.optimizer` on a tiny model: it learns, resumes bit for bit, and is refused where it must be
refused."""

from __future__ import annotations

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from trials import full, hexed, losses, make_recipe, with_optimizer, with_train

from mm_moslora.adapters import MoSLoRAConfig, add_moslora
from mm_moslora.cli import run as command
from mm_moslora.config import OptimConfig, Recipe, SourceConfig
from mm_moslora.config.needed_packages import refuse_lacking
from mm_moslora.config.run_config import OPTIMIZERS, OptimizerName
from mm_moslora.models.projectors.projector_layers import ProjectorShape
from mm_moslora.models.projectors.resamplers import PerceiverProjector
from mm_moslora.training.checkpointing.checkpoint_folder import rank_folder
from mm_moslora.training.engine.optimizers import KINDS, require_optimizer
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.training.preflight import check_settings
from mm_moslora.training.snapshot import OPTIMIZER
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.package_requirements import is_installed

NAMES = typing.get_args(OptimizerName)
PRESET = "llava15_7b_moslora"


def chosen(recipe: Recipe, name: str, **train_keys: Any) -> Recipe:
    """The recipe with an optimiser, and a language model that trains whole: states in 8 bits begin at 4,096 values."""
    return with_train(with_optimizer(full(recipe), name), **train_keys)


def with_held_out(recipe: Recipe) -> Recipe:
    source = recipe.data.train[0]
    held_out = SourceConfig(path=source.path, image_folder=source.image_folder)
    return replace(recipe, data=replace(recipe.data, validation=[held_out]))


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(rank_folder(checkpoint, 0) / OPTIMIZER)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_a_stopped_run_continues_bit_for_bit(name, recipe, tmp_path):
    """With a rehearsal, held-out records measured at every step, and checkpoints between.

    The state of the straight run has the bytes that plans count.
    """
    straight = chosen(recipe, name, output=str(tmp_path / "straight"), steps=6, rehearsal=False)
    train(straight)
    values = losses(tmp_path / "straight")
    assert values[-1] < values[0]
    check_bytes(state_of(tmp_path / "straight" / "checkpoint-000006"), name)
    measured = with_train(
        with_held_out(straight), output=str(tmp_path / "run"), validate_every=1, save_every=1, rehearsal=True
    )
    assert not train(measured, stop_at=3).finished
    assert train(measured).finished
    assert hexed(tmp_path / "run") == hexed(tmp_path / "straight")
    for file in ("language.safetensors", "projector.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "checkpoint-000006" / file) for run in ("run", "straight"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (state_of(tmp_path / run / "checkpoint-000006") for run in ("run", "straight"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def check_bytes(state: dict[str, torch.Tensor], name: str) -> None:
    """Moments take as many bytes per value as `OPTIMIZERS` says."""
    masters = {key.partition(".")[2]: value for key, value in state.items() if key.startswith("master.")}
    large = {key for key, value in masters.items() if value.numel() >= 4096 and value.numel() % 256 == 0}
    large -= {key for key in large if name == "muon" and f"momentum_buffer.{key}" not in state}  # the vocabulary's
    values = sum(masters[key].numel() for key in large)
    held = sum(value.nbytes for key, value in state.items() if key.partition(".")[2] in large) - 4 * values
    assert values
    assert held == pytest.approx(OPTIMIZERS[name].state_bytes * values, rel=1e-6)


def test_muon_leaves_adapters_of_tables_and_heads_to_adamw(language_folder):
    model = AutoModelForCausalLM.from_pretrained(language_folder)
    targets = ["embed_tokens", "q_proj", "lm_head"]
    adapted = add_moslora(model, MoSLoRAConfig(r=4, lora_alpha=8, target_modules=targets)).get_base_model()
    groups = parameter_groups(adapted, OptimConfig(optimizer="muon"))
    names = {matrices: [n for g in groups if g.matrices == matrices for n in g.names] for matrices in (True, False)}
    assert names[True]
    assert all("q_proj" in name for name in names[True])
    assert {part for part in targets if any(part in name for name in names[False])} == {"embed_tokens", "lm_head"}


def test_muon_takes_the_weights_of_linear_layers_alone_and_no_bias_decays():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 16}
    language = GptOssForCausalLM(GptOssConfig(vocab_size=64, **sizes, **experts))
    shape = ProjectorShape(vision_width=32, language_width=32, grid=4, depth=1, queries=4)
    model = torch.nn.ModuleDict({"language": language, "resampler": PerceiverProjector(shape)})
    for optimizer in ("adamw", "muon"):
        groups = parameter_groups(model, OptimConfig(optimizer=optimizer, weight_decay=0.1))
        undecayed = {name for group in groups if not group.weight_decay for name in group.names}
        assert {name for name, _ in model.named_parameters() if "bias" in name} <= undecayed
    matrices = {name.split(".", 1)[1] for group in groups if group.matrices for name in group.names}
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert matrices == {name.split(".", 1)[1] for name in linear} - {"lm_head.weight"}
    adapted = add_moslora(language, MoSLoRAConfig(r=2), targets=["q_proj"]).get_base_model()
    groups = parameter_groups(adapted, OptimConfig(optimizer="muon"))
    assert all("q_proj" in name for group in groups if group.matrices for name in group.names)
    assert {name.split(".")[-3] for group in groups if group.matrices for name in group.names} == {
        "lora_A", "lora_B", "lora_mixer",
    }  # fmt: skip


def test_muon_steps_as_torchs_two_optimisers_do():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    other = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    other.load_state_dict(model.state_dict())
    from mm_moslora.training.parameter_groups import OptimizerSettings

    groups = parameter_groups(model, OptimConfig(optimizer="muon", lr=1e-2, weight_decay=0.1))
    settings = OptimizerSettings(name="muon", betas=(0.9, 0.999), eps=1e-8, max_grad_norm=0.0)
    ours = KINDS["muon"].make(settings, groups, [group.parameters for group in groups], fused=False)
    muon = torch.optim.Muon(
        [other[1].weight, other[2].weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [other[0].weight], "weight_decay": 0.1},
            {"params": [other[1].bias, other[2].bias], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    for step in range(3):
        tokens = torch.arange(8).roll(step)
        for net, optimizers in ((model, (ours,)), (other, (muon, adamw))):
            net.zero_grad()
            net(tokens).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *((f"optim.optimizer={name} train.zero={zero}", f"optim.optimizer is {name}, and "
           f"train.zero {zero} is a ZeRO-") for name in NAMES[1:] for zero in ("zero1", "zero2_offload", "zero3")),
        ("optim.optimizer=adamw_8bitt", "Did you mean 'adamw_8bit'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["config", "doctor"])
def test_it_is_refused_by_name_before_anything_is_loaded(verb, overrides, message, capsys, monkeypatch):
    monkeypatch.setattr("mm_moslora.planning.doctor.diagnose", lambda *_: [])
    assert command([verb, PRESET, *overrides.split()]) == 1
    said = capsys.readouterr()
    assert message.split()[0] in " ".join((said.out + said.err).split())
    if verb == "config":
        assert message in " ".join((said.out + said.err).split())


@pytest.mark.parametrize("name", NAMES)
def test_auto_chooses_a_stage_that_it_has(name, recipe):
    auto = with_train(replace(recipe, optim=OptimConfig(optimizer=name)), zero="auto")
    for world in (1, 4):
        on_ranks = auto.for_ranks(world)
        assert (on_ranks.train.zero == "zero0") == (name != "adamw")
        check_settings(on_ranks)


def test_a_missing_package_is_named_with_its_command(recipe, monkeypatch):
    monkeypatch.setattr(
        "mm_moslora.config.needed_packages.is_installed",
        lambda module: module != "bitsandbytes" and is_installed(module),
    )
    with pytest.raises(ConfigError, match=r"optim\.optimizer adamw_8bit needs bitsandbytes.*pip install"):
        refuse_lacking(replace(recipe, optim=OptimConfig(optimizer="adamw_8bit")))


def test_an_optimiser_that_cannot_step_here_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(torch.optim.Muon, "step", lambda self: 1 / 0)
    with pytest.raises(ConfigError, match=r"optim\.optimizer is muon, which does not step .*division by zero"):
        require_optimizer("muon", torch.device("cpu"))
    monkeypatch.setattr(torch.optim.Muon, "step", lambda self: None)
    with pytest.raises(ConfigError, match="a step left the weights as they were"):
        require_optimizer("muon", torch.device("cpu"))


@pytest.mark.parametrize(("name", "precision"), [("adamw_8bit", "fp32"), ("muon", "bf16")])  # one of each kind of state
def test_stage_0_resumes_bit_for_bit_and_plain_torch_reads_its_state(
    name, precision, language_folder, vision_folder, records, tmp_path
):
    parts = {"language": language_folder, "vision": vision_folder, "records": records}
    recipe = chosen(make_recipe(parts, tmp_path / "straight", "zero0", rehearsal=True), name, precision=precision)
    train(recipe)
    values = losses(tmp_path / "straight")
    run = with_train(recipe, output=str(tmp_path / "run"))
    train(run, stop_at=2)
    assert train(run).finished
    assert hexed(tmp_path / "run") == hexed(tmp_path / "straight")
    assert values[-1] < values[0]
    if precision == "fp32":
        plain = with_train(recipe, output=str(tmp_path / "plain"), zero="none")
        train(plain)
        assert losses(tmp_path / "plain") == pytest.approx(values, rel=2e-3)
        other = with_train(recipe, output=str(tmp_path / "other"))
        train(other, stop_at=2)
        assert train(with_train(other, zero="none")).finished
        assert losses(tmp_path / "other") == pytest.approx(values, rel=2e-3)
