"""Runs the product on a fake CUDA device, case by case; a line of JSON for each on stdout.

python -c "import fake_cuda; fake_cuda.load(LIBRARY); import fake_cuda_worker; fake_cuda_worker.main(FOLDER)" [CASE ...]
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fake_cuda_device import fake_cuda, to_cuda
from tiny import make_records
from torch.utils._python_dispatch import _disable_current_modes
from trials import make_parts, make_recipe
from vlms import FAMILIES, make_vlm

from mm_moslora.batch import Batch
from mm_moslora.config import Recipe
from mm_moslora.kernels.attention.attention_choice import set_attention
from mm_moslora.models.decoding.generation import Prompt, encode_images, generate, prefill_row, score_options
from mm_moslora.models.vision.feature_store import FeatureStore
from mm_moslora.models.vlm import has_own_forward, is_multimodal
from mm_moslora.training import run_setup, weight_init
from mm_moslora.training.engine import OptimizerSettings, TorchEngine
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.utils import distributed

CUDA = torch.device("cuda", 0)
CHANGES: dict[str, dict[str, Any]] = {
    "bf16": {"adapter.dropout": 0.1},
    "adapter in the tower, checkpointed": {
        "vision.mode": "adapter", "train.vision_gradient_checkpointing": True, "train.gradient_checkpointing": True,
    },
    "all weights": {"model.language_mode": "full", "train.precision": "fp32"},
    "text": {},
    "feature cache": {},
    "qwen2_5_vl": {},
}  # fmt: skip

ANSWERING = ("bf16", "qwen2_5_vl")
"""Cases that go on to measure, decode and score."""


def changed(name: str, parts: dict[str, Path], folder: Path) -> Recipe:
    """The recipe of a case."""
    output = folder / name.replace(" ", "_")
    output.mkdir()
    if name == "text":
        parts = parts | {"records": make_records(output / "text", 8, text_only_every=1)}
    recipe = make_recipe(parts, output, "none", precision="bf16")
    if name in FAMILIES:
        recipe = replace(
            recipe, model=replace(recipe.model, language=None, vlm=str(make_vlm(output / "vlm", name)), vision=None)
        )
    if name == "text":
        recipe = replace(recipe, model=replace(recipe.model, vision=None))
    vision = {"feature_cache": str(output / "cache")} if name == "feature cache" else {}
    for key, value in ({"vision": vision} | CHANGES[name]).items():
        part, _, field = key.partition(".")
        more = {field: value} if field else value
        if not more:
            continue
        if part in ("vision", "projector"):
            part, more = "model", {part: replace(getattr(recipe.model, part), **more)}
        recipe = replace(recipe, **{part: replace(getattr(recipe, part), **more)})
    return recipe


def micro_batches(run: run_setup.Run) -> list[Batch]:
    """Pictures that repeat, in a micro-batch and in two; several conversations and one without a picture."""
    data = run.training_set
    seen = [number for number in data.usable if data.has_image[number]] or list(data.usable)
    blind = [number for number in data.usable if not data.has_image[number]]
    first, second, third = (data.load(number) for number in (*seen[:2], blind[0]))
    return [Batch.from_examples([first, third, second, first]), Batch.from_examples([second, first])]


_read = FeatureStore.read


def read(store: FeatureStore, key: str) -> torch.Tensor | None:
    """A file is read by the host."""
    with _disable_current_modes():
        return _read(store, key)


def train_step(name: str, recipe: Recipe) -> dict[str, Any]:
    run = run_setup.prepare(recipe)
    batches = micro_batches(run)
    module, model = run.engine.module, run.assembly.model
    blind = Batch.from_examples(
        [run.training_set.load(next(n for n in run.training_set.usable if not run.training_set.has_image[n]))]
    )
    if name == "feature cache":
        with torch.no_grad():
            module(batches[0], True)  # fills it
            module(blind, True)
    with fake_cuda() as device, mock.patch.object(FeatureStore, "read", read):
        to_cuda(module)
        settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
        engine = TorchEngine(module, parameter_groups(module, recipe.optim), settings)
        device.noted()
        queued = engine.queue(batches, lambda: 1.0)
        found: dict[str, Any] = {"queued": device.noted()}
        result = queued.result()
        found |= {"step": device.noted(), "applied": result.applied, "loss": result.loss}
        if is_multimodal(model):
            module(blind.to(CUDA), True)  # the dummy picture
        device.noted()
        if name in ANSWERING:
            engine.component_norms().read()
            found["norms"] = device.noted()
            engine.evaluate(batches[:1])
            found["evaluate"] = device.noted()
            found |= answers(run, batches, device)
    return found


class Loaded(list):  # type: ignore[type-arg]
    """Examples in memory in the place of a training set."""

    has_image = property(lambda self: [bool(example.pictures) for example in self])


def fitted(recipe: Recipe) -> dict[str, Any]:
    """The projector's fit to the training data."""
    Path(recipe.train.output).mkdir()
    run = run_setup.prepare(recipe)
    examples: Any = Loaded(run.training_set.load(number) for number in run.training_set.usable)
    model = run.assembly.model.model
    with fake_cuda() as device:
        to_cuda(model.vision_tower)
        to_cuda(model.multi_modal_projector)
        with torch.no_grad():
            weight_init._fit(run.assembly, examples, to_answers=True)
        return {"fit": device.noted()}


def answers(run: run_setup.Run, batches: list[Batch], device: Any) -> dict[str, Any]:
    """Decoding and option scoring, as evaluation and serving do it."""
    model = run.assembly.model.eval()
    set_attention(model, "sdpa")
    device.noted()
    if has_own_forward(model):
        number = next(n for n in run.training_set.usable if run.training_set.has_image[n])
        example = run.training_set.load(number)
        decoder = prefill_row(model, example.input_ids, example.pictures)
        if decoder.can_share:
            decoder.join(prefill_row(model, example.input_ids, example.pictures))
        decoder.extend(
            model.get_input_embeddings()(decoder.logits.argmax(-1)[:, None]),
            torch.ones(len(decoder.logits), 1, dtype=torch.long, device=CUDA),
        )
        return {"generate": device.noted()}
    first, *_, last = batches[0].input_ids.split(batches[0].segment_lengths)
    features = None
    if is_multimodal(model):
        features = encode_images(model, batches[0].pixel_values[:1]).flatten(0, 1)
    prompts = [Prompt(input_ids=ids, features=features, group="one") for ids in (first, last)]
    generate(model, prompts, max_new_tokens=4, stop_ids=[2])
    found = {"generate": device.noted()}
    score_options(model, prompts, [[[5], [6, 7]], [[5, 6, 7], [8]]])
    return found | {"score": device.noted()}


def beyond_the_last() -> dict[str, Any]:
    """What uses a GPU that is not there."""
    uses = {
        "set_device": lambda index: torch.cuda.set_device(index),
        "new": lambda index: torch.ones(2, device=f"cuda:{index}"),
        "moved": lambda index: torch.ones(2).to(f"cuda:{index}"),
    }
    told = {}
    with fake_cuda():
        for name, use in uses.items():
            use(0)
            try:
                use(1)
            except RuntimeError as error:
                told[name] = str(error)
        return {"told": told, "device": str(distributed.device())}


def main(folder: Path, *names: str) -> None:
    """Run all cases, or some."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    parts = make_parts(folder / "parts", records=8)
    plain = make_recipe(parts, folder / "fitted", "none", precision="bf16")
    alone = {"projector's fit": partial(fitted, plain), "beyond the last": beyond_the_last}
    for name in names or (*CHANGES, *alone):
        started = time.process_time()
        try:
            found = alone[name]() if name in alone else train_step(name, changed(name, parts, folder))
        except Exception:
            found = {"error": traceback.format_exc()}
        seconds = round(time.process_time() - started, 1)
        print(json.dumps({"case": name, "seconds": seconds} | found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
