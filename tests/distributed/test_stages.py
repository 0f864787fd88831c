"""The same numbers for every split: ranks, accumulation, ZeRO stages, precisions, ranks without pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_records
from trials import STAGES, bounded, full, hexed, losses, make_recipe, metrics, with_train, write

from mm_moslora.config import OptimConfig, Recipe

pytestmark = pytest.mark.slow
SPLITS = {1: (*STAGES, "none"), 2: STAGES, 4: ("zero1", "zero3")}
"""Stages by ranks. Four ranks divide as two do: one stage with whole weights and the one with divided ones show it."""
SMALL = {"global_batch": 2, "micro_batch": 1}


@pytest.fixture(scope="module")
def splits(parts, ranks, tmp_path_factory) -> Path:
    """Eight samples per step as 1 x 4, 2 x 1 to 2 and 4 x 1 (ranks x micro-batches), in fp32.

    On two ranks the tokens decide: four samples share a micro-batch where they have no pictures. On one rank layers
    are those of unknown families. The six steps hold one without any picture, in which the projector gets no gradient.
    """
    folder = tmp_path_factory.mktemp("splits")

    def recipe(stage: str, world: int) -> Recipe:
        made = make_recipe(parts, folder / f"{stage}-{world}", stage, steps=6, micro_batch=2)
        if world == 2:
            return bounded(made, 4)
        return replace(made, model=replace(made.model, lean_layers=world > 1))

    for world, stages in SPLITS.items():
        ranks.run(["trials:train_counting", *(write(recipe(stage, world)) for stage in stages)], ranks=world)
    return folder


@pytest.mark.parametrize(
    ("stage", "world"), [(stage, world) for world, stages in SPLITS.items() for stage in stages if stage != "none"]
)
def test_losses_and_gradients_are_those_of_plain_torch(stage, world, splits):
    expected, found = metrics(splits / "none-1"), metrics(splits / f"{stage}-{world}")
    norms = [f"{kind}_norm/{part}" for kind in ("weight", "momentum") for part in ("adapter", "mixer", "projector")]
    for key in ("loss", "grad_norm", *norms):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5), key


def test_weights_that_each_host_keeps_whole_give_the_same_numbers_and_go_on(parts, ranks, tmp_path):
    """Also the small ones, which are gathered after each step, and with a rehearsal's engine in the same process."""
    plain, copied = (
        make_recipe(parts, tmp_path / zero, zero, steps=4, save_every=2, dropout=0.1, rehearsal=zero == "zero3_hpz")
        for zero in ("zero3", "zero3_hpz")
    )
    ranks.run([write(plain), f"{write(copied)}@2", write(copied)])
    assert hexed(tmp_path / "zero3_hpz") == hexed(tmp_path / "zero3")


def test_a_rank_without_pictures_takes_part(parts, ranks, tmp_path):
    """Two records per step, one with a picture and one without: one rank never sees a picture."""
    mixed = parts | {"records": make_records(tmp_path / "records", 8, text_only_every=2)}
    names = ["zero0", "zero2", "zero3", "none"]
    recipes = {name: make_recipe(mixed, tmp_path / name, name, order="sequential", **SMALL) for name in names}
    ranks.run([write(recipes[name]) for name in names[:3]])
    ranks.run([write(recipes["none"])], ranks=1)
    for stage in names[:3]:
        assert losses(tmp_path / stage) == pytest.approx(losses(tmp_path / "none"), rel=1e-5)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_all_ranks_end_where_images_are_ignored(stage, parts, ranks, tmp_path):
    """One of them never sees a picture, and there is nothing that it could compare."""
    mixed = parts | {"records": make_records(tmp_path / "records", 8, text_only_every=2)}
    recipe = make_recipe(mixed, tmp_path / stage, stage, order="sequential", **SMALL)
    group = ranks.finish(ranks.start(["trials:train_unseeing", write(recipe)]))
    assert group.codes == [1, 1], group.outputs
    assert all("does not depend on the images" in group.output(rank) for rank in range(2)), group.outputs


def test_packed_rows_give_the_numbers_of_one_rank(parts, ranks, tmp_path):
    """Five rows per step on two and three ranks, and on four of which two compute a row together; and after a stop."""
    way = {2: ("zero1",), 3: ("zero3",), 4: ("zero2",)}

    def recipe(name: str, zero: str, **train) -> Recipe:
        made = make_recipe(parts, tmp_path / name, zero, micro_batch=1, global_batch=5, steps=3, **train)
        return replace(made, data=replace(made.data, max_length=64, pack_tokens=150))

    ranks.run([write(recipe("none", "none"))], ranks=1)
    expected = metrics(tmp_path / "none")
    assert all(line["tokens"] > 5 * 64 for line in expected), "no row holds several records"
    for world, stages in way.items():
        together = {"sequence_parallel": 2} if world == 4 else {}
        paths = [write(recipe(f"{stage}-{world}", stage, **together)) for stage in stages]
        ranks.run([*paths[1:], f"{paths[0]}@2"], ranks=world)
        ranks.run(paths[:1], ranks=world)
        for stage in stages:
            found = metrics(tmp_path / f"{stage}-{world}")
            for key in ("loss", "grad_norm", "tokens", "samples_seen", "weight_norm/adapter"):
                assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5), key


def test_one_record_five_and_text_alone_give_the_numbers_of_one_rank(parts, ranks, tmp_path):
    """On three ranks, some or two of which have no record in a step, or none of which ever has a picture."""
    records = {
        "one": make_records(tmp_path / "one", 1), "five": make_records(tmp_path / "five", 5),
        "text": make_records(tmp_path / "text", 5, text_only_every=1),
    }  # fmt: skip
    runs = {
        (kind, stage): make_recipe(
            parts | {"records": path}, tmp_path / f"{kind}-{stage}", stage, micro_batch=1, steps=2
        )
        for kind, path in records.items()
        for stage in ("none", "zero3" if kind == "one" else "zero2")  # and divided weights where two have nothing to do
    }
    ranks.run([write(recipe) for (_, stage), recipe in runs.items() if stage != "none"], ranks=3)
    ranks.run([write(recipe) for (_, stage), recipe in runs.items() if stage == "none"], ranks=1)
    for kind, stage in runs:
        expected, found = metrics(tmp_path / f"{kind}-none"), metrics(tmp_path / f"{kind}-{stage}")
        assert {line["images"] for line in found} == {{"one": 1, "five": 4, "text": 0}[kind]}
        for key in ("loss", "grad_norm", "weight_norm/adapter", "momentum_norm/mixer"):
            assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5), key


def check_counts(run):
    """No layer ran as modules."""
    counts = json.loads((run / "kernel.json").read_text())
    assert counts["modules"] == 0
    assert counts["fused"] > 0


def check_fused(folder, names):
    """No layer ran as modules, and every run has the numbers of plain torch."""
    for name in names:
        check_counts(folder / name)
        for key in ("loss", "grad_norm"):
            found, expected = ([line[key] for line in metrics(folder / run)] for run in (name, "none"))
            assert found == pytest.approx(expected, rel=1e-5), key


@pytest.mark.parametrize("stage", [*STAGES, "none"])
def test_every_adapted_layer_takes_the_fused_kernel_on_every_stage(stage, splits):
    """Layers of unknown families; their micro-batches share the products of the adapters."""
    check_counts(splits / f"{stage}-1")


@pytest.mark.parametrize("lean", [True, False])
def test_a_base_in_four_bits_is_fused_on_every_stage(lean, parts, ranks, tmp_path):
    """On two ranks, and with dropout and layers of unknown families on one, where a stage of each kind is enough."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    names = (*STAGES, "none") if lean else ("zero2", "zero3", "none")
    recipes = {
        name: make_recipe(parts, tmp_path / name, name, steps=2, dropout=0.1 if not lean else 0.0) for name in names
    }
    model = replace(recipes["none"].model, quantisation="nf4", lean_layers=lean)
    recipes = {name: replace(item, model=model) for name, item in recipes.items()}
    together = [write(recipe) for name, recipe in recipes.items() if name != "none"]
    ranks.run(["trials:train_counting", write(recipes["none"])], ranks=1)
    ranks.run(["trials:train_counting", *together], ranks=2 if lean else 1)
    check_fused(tmp_path, recipes)


LLAVA_OFFLOAD = {
    "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    },
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}  # fmt: skip


def test_offload_gives_the_numbers_of_its_stage(parts, ranks, tmp_path):
    """In an order in which pictures come in some micro-batches only, and in some steps not at all.

    The third is a file of Hugging Face's kind: `auto` in many places, an optimiser and a schedule of its own.
    """
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps(LLAVA_OFFLOAD))
    stages = {"zero2_offload": "zero2_offload", "zero3_offload": "zero3_offload", "theirs": str(theirs)}
    mixed = parts | {"records": make_records(tmp_path / "records", 24, text_only_every=2)}
    recipes = {
        name: full(make_recipe(mixed, tmp_path / name, stage, order="random", global_batch=4, micro_batch=1, steps=8))
        for name, stage in ({"none": "none"} | stages).items()
    }
    ranks.run([write(recipes["none"])], ranks=1)
    ranks.run([write(recipes[name]) for name in stages])
    for name in stages:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "none"), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"zero_optimization": {"stage": 2, "reduce_buket_size": 5}},
            "reduce_buket_size Extra inputs are not permitted",
        ),
        ({"prescale_gradients": True}, "pre-scale gradients is not yet supported"),
    ],
)
def test_a_file_that_deepspeed_refuses_is_told_in_a_line(change, said, parts, ranks, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2}} | change))
    group = ranks.finish(ranks.start([write(make_recipe(parts, tmp_path / "run", str(own)))], ranks=1))
    assert group.codes == [1]
    last = group.output(0).strip().splitlines()[-1]
    assert last.startswith(f"mm_moslora.utils.errors.ConfigError: DeepSpeed refuses train.zero {own}: ")
    assert said in last


def test_half_precision_is_close_and_fp16_finds_its_loss_scale(parts, ranks, tmp_path):
    halves, scaled = ("zero2", "zero3"), ("zero0", "zero2")
    recipes = [make_recipe(parts, tmp_path / f"{s}-bf16", s, precision="bf16") for s in halves]
    recipes += [
        make_recipe(parts, tmp_path / f"{s}-fp16", s, precision="fp16", steps=8, rehearsal=True) for s in scaled
    ]
    recipes.append(make_recipe(parts, tmp_path / "fp32", "zero2"))
    ranks.run(["trials:train_fp16", *map(write, recipes)])
    expected = losses(tmp_path / "fp32")
    for stage in halves:
        assert losses(tmp_path / f"{stage}-bf16") == pytest.approx(expected, rel=2e-2)
    for stage in scaled:
        lines = metrics(tmp_path / f"{stage}-fp16")
        assert lines[0]["loss"] == pytest.approx(expected[0], rel=2e-2)
        first = next(line for line in lines if math.isfinite(line["grad_norm"]))
        assert first["grad_norm"] == pytest.approx(metrics(tmp_path / "fp32")[0]["grad_norm"], rel=2e-2)
        assert lines[-1]["loss_scale"] > 1
        assert lines[-1]["skipped_steps"] < len(lines) - 2


def test_sums_of_many_gradients_in_bf16_are_near_those_of_fp64(ranks, tmp_path):
    """DeepSpeed adds micro-batches in bf16, and in fp32 where a file of one's own for ZeRO-2 says so."""
    preset = json.loads((Path(__file__).parents[2] / "deepspeed_configs" / "zero2.json").read_text())
    wide = tmp_path / "zero2_wide.json"
    wide.write_text(json.dumps(preset | {"data_types": {"grad_accum_dtype": "fp32"}}))
    ranks.run(["trials:sum_gradients", str(tmp_path / "errors.json"), "zero1", "zero2", str(wide)])
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors["zero1"] < 0.015
    assert errors["zero2"] < 0.015
    assert errors["zero2_wide.json"] < 0.002  # one rounding to bf16, where ranks exchange them


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_gradients_that_overflow_at_any_loss_scale_end_the_run_at_the_limit(stage, parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / stage, stage, precision="fp16", steps=40, max_skipped_steps=2, **SMALL)
    group = ranks.finish(ranks.start(["trials:train_overflowing", write(recipe)]))
    assert group.codes == [1, 1]
    said = "DivergedError: 2 steps in a row had a loss or gradient that is not finite; stopped at step"
    assert all(said in group.output(rank) for rank in (0, 1)), group.outputs
    lines = metrics(tmp_path / stage)
    scales = [line.get("loss_scale", 1.0) for line in lines]
    assert scales == sorted(scales, reverse=True)
    assert scales[0] >= 2**15
    assert scales[-3:] == [1.0, 1.0, 1.0]
    assert scales[-4] == 2.0
    assert [line["skipped_steps"] for line in lines] == list(range(1, len(lines) + 1))
    assert len({line["lr/adapter"] for line in lines}) == 1


def test_checkpointing_a_component_changes_no_number(parts, ranks, tmp_path):
    plain = make_recipe(parts, tmp_path / "plain", "zero2")
    plain = replace(plain, model=replace(plain.model, vision=replace(plain.model.vision, mode="adapter")))
    saving = replace(
        plain,
        train=replace(
            plain.train,
            output=str(tmp_path / "saving"),
            gradient_checkpointing=True,
            vision_gradient_checkpointing=True,
        ),
    )
    away = with_train(saving, output=str(tmp_path / "away"), activation_offload=True)
    some = with_train(away, output=str(tmp_path / "some"), gradient_checkpointing=1, zero="zero3")
    ranks.run([write(plain), write(saving), write(away), write(some)])
    assert losses(tmp_path / "saving") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert losses(tmp_path / "away") == losses(tmp_path / "saving")
    assert losses(tmp_path / "some") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def test_weights_of_answers_are_summed_over_ranks(parts, ranks, tmp_path):
    """One rank's records weigh eight times the other's; the ranks that share a row count its weights once."""
    lines = [json.loads(line) for line in parts["records"].read_text().splitlines()]
    for number, record in enumerate(lines):
        for answer in record["conversations"][1::2]:
            answer["weight"] = (0.25, 2.0, 1.0)[number % 3]
    path = parts["records"].with_name("weighted.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    weighted = parts | {"records": path}
    kinds = {"zero2": {}, "zero3": {}, "together": {"zero": "zero2", "sequence_parallel": 2}, "none": {}}
    recipes = {
        name: make_recipe(weighted, tmp_path / name, kind.pop("zero", name), order="sequential", **SMALL, **kind)
        for name, kind in kinds.items()
    }
    ranks.run([write(recipes[name]) for name in ("zero2", "zero3", "together")])
    ranks.run([write(recipes["none"])], ranks=1)
    expected = [(line["loss"], line["grad_norm"]) for line in metrics(tmp_path / "none")]
    for name in ("zero2", "zero3", "together"):
        found = [(line["loss"], line["grad_norm"]) for line in metrics(tmp_path / name)]
        assert sum(found, ()) == pytest.approx(sum(expected, ()), rel=1e-5), name


@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_trainer_gives_our_losses(stage, parts, ranks, tmp_path):
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup=0)
    ours = replace(make_recipe(parts, tmp_path / "ours", f"zero{stage}", order="sequential", steps=3), optim=optim)
    theirs = replace(ours, train=replace(ours.train, output=str(tmp_path / "theirs")))
    ranks.run([write(ours)])
    ranks.run(["hf_run:train", write(theirs), "3", stage])
    found = json.loads((tmp_path / "theirs" / "losses.json").read_text())
    assert found == pytest.approx(losses(tmp_path / "ours"), rel=1e-4)
