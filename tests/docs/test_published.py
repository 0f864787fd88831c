"""docs/published.md: every command resolves, and the arms and recipes that it names train on tiny parts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mm_moslora.adapters import MoSLoRAConfig
from mm_moslora.cli import app
from mm_moslora.compare.arms import parse_arms
from mm_moslora.config import Recipe, load_recipe, override_items
from mm_moslora.training.training_loop import train
from tests.docs.blocks import ROOT, blocks, commands

DOCUMENT = ROOT / "docs" / "published.md"
SCRIPT = ROOT / "examples" / "experiments" / "metamathqa.py"
EXPERIMENTS = sorted(path.name for path in SCRIPT.with_suffix("").iterdir())
SMALL = [
    "adapter.rank=4", "train.steps=1", "train.global_batch=4", "train.micro_batch=4", "train.zero=none",
    "train.precision=fp32", "train.rehearsal=false", "track.trackers=[]", "data.workers=0", "optim.warmup=0",
]  # fmt: skip


def recipes(verb: str) -> list[tuple[Recipe, dict]]:
    """The recipe of every command of a verb, and the command's options."""
    found = []
    for block in blocks(DOCUMENT):
        for words in commands(block.text) if block.kind == "bash" else ():
            words = words[words[0].startswith("CUDA") :]
            if words[:2] == ["mm-moslora", verb]:
                _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
                options = bound.arguments
                recipe = load_recipe(options["recipe"], override_items(options.get("overrides", ())))
                found.append((recipe, options))
    return found


def test_every_arm_of_the_published_table_trains(language_folder: Path, tmp_path: Path) -> None:
    ((shared, options),) = recipes("compare")
    assert (shared.adapter.rank, shared.adapter.alpha, shared.train.epochs) == (32, 64, 3)
    turns = [{"from": "human", "value": "Is it true?"}, {"from": "gpt", "value": "the correct answer is true"}]
    lines = [json.dumps({"id": str(number), "conversations": turns}) for number in range(12)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    losses = {}
    for arm in parse_arms(options["asked"].arms, shared):
        (tmp_path / "arm.yaml").write_text(arm.apply(shared).to_yaml())
        run = tmp_path / arm.slug
        tiny = load_recipe(
            tmp_path / "arm.yaml",
            [*SMALL, f"model.language={language_folder}", f"train.output={run}", "data.train.0.hold_out=2",
             f"data.train.0.path={tmp_path / 'records.jsonl'}"],
        )  # fmt: skip
        assert train(tiny).finished
        losses[arm.name] = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert list(losses) == ["lora", "moslora:kaiming"]
    assert losses["lora"] == losses["moslora:kaiming"]


def test_the_recipes_that_are_named_train(
    language_folder: Path, vision_folder: Path, records: Path, tmp_path: Path
) -> None:
    given = [recipe for recipe, _ in recipes("train")]
    assert [recipe.name for recipe in given] == [
        "commonsense-170k", "commonsense-170k", "llava15-7b-lora", "llava15-7b-moslora"
    ]  # fmt: skip
    assert [recipe.adapter.mixer_trainable for recipe in given] == [True, False, False, True]
    for recipe in given[2:]:
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        tiny = load_recipe(
            tmp_path / "recipe.yaml",
            [*SMALL, f"model.language={language_folder}", f"model.vision.name={vision_folder}",
             "model.projector.weights=null", f"data.train.0.path={records}", "data.max_length=512",
             f"data.train.0.image_folder={records.parent / 'images'}", f"train.output={tmp_path / recipe.name}"],
        )  # fmt: skip
        assert train(tiny).finished


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metamathqa", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def harness(tmp_path: Path) -> Path:
    """What the script needs of PEFT's comparison: texts to change, and a command that reads a configuration."""
    folder = tmp_path / "MetaMathQA"
    folder.mkdir()
    (folder / "utils.py").write_text('KINDS = ["cuda", "xpu"]\n')
    (folder / "run.py").write_text(
        "import sys, peft, utils\nloss = 5\nassert 1 < loss < 9 or 1 < wiki_loss_before < 2\n"
        "config = peft.PeftConfig.from_pretrained(sys.argv[-1])\n"
        "open('row', 'w').write(f'{type(config).__name__} {config.mixer_init} {utils.KINDS}')\n"
    )
    return folder


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_for_pefts_comparison_differs_from_loras_in_the_mixer_alone(experiment: str) -> None:
    folder = SCRIPT.with_suffix("") / experiment
    config = peft.PeftConfig.from_pretrained(str(folder))
    assert type(config) is MoSLoRAConfig
    stock = peft.LoraConfig(r=config.r, lora_alpha=64, task_type="CAUSAL_LM", use_rslora="rslora" in experiment)
    own = stock.to_dict()
    assert {key: value for key, value in config.to_dict().items() if key in own} == own
    assert not config.inference_mode
    assert config.mixer_init == experiment.rpartition("-")[2]
    assert f"rank{config.r}-" in experiment


def test_the_experiment_trains_as_pefts_comparison_trains(tmp_path: Path) -> None:
    config = peft.PeftConfig.from_pretrained(str(SCRIPT.with_suffix("") / EXPERIMENTS[0]))
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **shape))
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=True)
    mixers = 4 * config.r**2
    assert model.get_nb_trainable_parameters()[0] == mixers + 2 * config.r * (64 + 64 + 64 + 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    ids = torch.arange(12)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = [weight.grad is not None for name, weight in model.named_parameters() if "lora_mixer" in name]
    assert moved == [True] * 4
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_script_runs_the_harness_with_mixers_known_to_peft(
    script: ModuleType, harness: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(harness)
    monkeypatch.setattr(sys, "argv", ["metamathqa.py"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    script.main([str(harness), EXPERIMENTS[0]])
    assert (harness / "row").read_text() == "MoSLoRAConfig kaiming ['cuda', 'xpu']"
    monkeypatch.delitem(sys.modules, "utils")
    copied = harness / "experiments" / "moslora" / EXPERIMENTS[0] / "adapter_config.json"
    copied.write_text("{}")
    with pytest.raises(FileExistsError, match="is another experiment"):
        script.main([str(harness), EXPERIMENTS[0]])
    with pytest.raises(FileNotFoundError, match=r"no experiment 'rank32', only llama-3\.2-3B"):
        script.main([str(harness), "rank32"])
    with pytest.raises(FileNotFoundError, match=r"has no run\.py"):
        script.main([str(harness.parent), EXPERIMENTS[0]])
