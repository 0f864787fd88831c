"""Mistakes at the command line: each is refused with its exit code, and the message names what was wrong."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from trials import write

from mm_moslora.cli import run
from mm_moslora.config import Recipe

VALUES = """
adapter.rnak=4: rank
adapter.lora_r=4: adapter.rank
lora_alpha=4: adapter.alpha
learning_rate=1e-3: optim.lr
max_steps=3: train.steps
batch_size=4: train.
per_device_train_batch_size=4: train.micro_batch
gradient_accumulation_steps=4: train.global_batch
num_train_epochs=4: train.epochs
trian.steps=3: train
nothing: nothing
adapter=4: adapter
adapter.rank=0: adapter.rank
adapter.rank=-4: adapter.rank
adapter.rank=four: adapter.rank
adapter.rank=4.5: adapter.rank
adapter.rank=1e99: adapter.rank
adapter.alpha=nan: adapter.alpha
adapter.alpha=x: adapter.alpha
adapter.dropout=1.5: adapter.dropout
adapter.dropout=-0.1: adapter.dropout
adapter.mixer_init=orthogonl: adapter.mixer_init
adapter.use_rslora=maybe: adapter.use_rslora
adapter.rank_pattern=[1]: adapter.rank_pattern
adapter.targets=[nothing]: nothing
adapter.method=moslroa: adapter.method
adapter.peft={type: LORAA}: adapter.peft
optim.lr=2e-4x: optim.lr
optim.lr=-1: optim.lr
optim.lr=.inf: optim.lr
optim.lr=[1]: optim.lr
optim.betas=[0.9]: optim.betas
optim.betas=[0.9, 2]: optim.betas
optim.warmup=-2: optim.warmup
optim.weight_decay=-1: optim.weight_decay
optim.optimizer=adamm: optim.optimizer
optim.schedule=cosin: optim.schedule
train.steps=0: train.steps
train.steps=-1: train.steps
train.steps=ten: train.steps
train.epochs=0: train.epochs
train.global_batch=0: train.global_batch
train.global_batch=10: train.global_batch
train.global_batch=100001: 100000
train.micro_batch=0: train.micro_batch
train.micro_batch=3: train.micro_batch
train.zero=zero9: zero9
train.zero=9: train.zero
train.precision=fp8x: train.precision
train.save_every=-1: train.save_every
train.keep_last=-1: train.keep_last
train.log_every=0: train.log_every
train.timeout_minutes=0: train.timeout_minutes
train.seed=x: train.seed
train.sequence_parallel=2: train.sequence_parallel
train.gradient_checkpointing=-1: train.gradient_checkpointing
train.activation_offload=true: train.activation_offload
data.max_length=0: data.max_length
data.max_length=long: data.max_length
data.max_bad_share=2: data.max_bad_share
data.order=shuffle: data.order
data.too_long=trim: data.too_long
data.train=[]: data
data.train=x.json: data.train
data.train.0.path=/gone/rows.json: data.train: /gone/rows.json
data.train.0.image_folder=/gone/images: data.train: image_folder
data.train.0.weight=-1: weight
data.train.7.path=x.json: data.train
data.validation.0.path=/gone/rows.json: data.validation
model.language=/gone/model: model.language
model.vision.name=/gone/encoder: model.vision.name
model.vision.name=tim:resnet50: timm
model.vision.image_size=-1: model.vision.image_size
model.vision.feature_layer=x: model.vision.feature_layer
model.projector.kind=mlpp: model.projector.kind
model.projector.weights=/gone/run: model.projector.weights
model.image_aspect=padd: model.image_aspect
model.attention=flash: model.attention
model.quantisation=nf5: model.quantisation
model.quantise=nf4: quantisation
model.language_mode=lora: model.language_mode
model.vlm=/gone/vlm: model.vlm
model.boxes=pixels: model.boxes
objective=dpp: objective
objective=denoising: denoising
preference.beta=-1: preference
validate.tasks=[mmmuu]: mmmuu
track.trackers=[wandbb]: wandbb
track.trackers=wandb: track.trackers
"""
"""Override: what the message of `train` names."""

LINES = """
1 train absent.yaml: absent.yaml
1 train smollm2_siglip_mosloar: smollm2_siglip_moslora
1 train BAD: line 3
1 train LIST: LIST
1 train TABS: line 2
1 train TWICE: name
1 train EMPTY: EMPTY
2 trian RECIPE: train
2 train: RECIPE
1 train RECIPE --nothing: nothing
2 eval rnu: run
1 eval run mmmuu --output out: mmmuu
1 eval run llava:gone.jsonl --output out: gone.jsonl
1 eval run llava:gone.jsonl --output out --modes own wrong: --modes own,wrong
2 eval run llava:gone.jsonl --output out --modes own,wrogn: wrong
1 eval run mmmu --model /gone/run --output out: /gone/run
2 eval run mmmu --output out --batch-size x: batch-size
1 compare RECIPE: --tasks
1 compare RECIPE --arms lora,moslroa --tasks llava:q.jsonl --output out: moslora
1 compare RECIPE --arms lora,moslora@rnak=4 --tasks llava:q.jsonl --output out: rnak
1 compare absent.yaml: absent.yaml
1 report /gone/run: /gone/run
1 export /gone/run out: /gone/run
2 export /gone/run out --to gguff: gguf
1 chat /gone/run: /gone/run
1 serve /gone/run: /gone/run
2 serve /gone/run --port x: port
1 data check absent.yaml: absent.yaml
1 data view absent.yaml: absent.yaml
1 adapters inspect /gone/adapter: /gone/adapter
1 import /gone/llava out: /gone/llava
1 init /gone/pictures out: /gone/pictures
1 init CSV out: CSV
1 init FOLDER out: FOLDER
1 launch RECIPE --rdzv node-1: HOST:PORT
1 launch RECIPE --gpus x: gpus
2 plan RECIPE: --gpus
1 plan RECIPE --gpus 8xH1000: H1000
1 doctor absent.yaml: absent.yaml
1 doctor --model /gone/model: /gone/model
1 config RECIPE adapter.rnak=4: rank
"""
"""Exit code, words, and what the message names; words in capitals are files below."""

FILES = {
    "BAD": "name: x\nmodel: {language: a\n",
    "LIST": "- a\n- b\n",
    "TABS": "model:\n\tlanguage: a\n",
    "TWICE": "name: a\nname: b\n",
    "EMPTY": "",
    "CSV": "image,question\na.png,what?\n",
}


def rows(table: str) -> list[tuple[str, str]]:
    return [tuple(line.rsplit(": ", 1)) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("override", "named"), rows(VALUES))
def test_a_wrong_value_is_refused_and_named(override: str, named: str, recipe: Recipe, capsys) -> None:
    assert run(["train", str(write(recipe)), override]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: ")
    assert named in said


@pytest.mark.parametrize(("line", "named"), rows(LINES))
def test_a_wrong_command_is_refused_and_named(line, named, recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("FOLDER").mkdir()
    code, *words = shlex.split(line.replace("RECIPE", str(write(recipe))))
    files = [f"./{word}" if word in FILES else word for word in words]
    assert run(files) == int(code)
    said = " ".join(capsys.readouterr().err.split())
    assert "error: " in said
    assert named in said
