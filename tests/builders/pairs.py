"""Preference records, recipes that learn from them, and what ranks call."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import COLOURS

from mm_moslora.config import Recipe


def make_pairs(folder: Path, count: int = 12, *, pictures: bool = True) -> Path:
    """Pairs in the form of ms-swift: the colour of the picture, or one that the question names, and another colour."""
    from PIL import Image

    (folder / "images" if pictures else folder).mkdir(parents=True, exist_ok=True)
    names, lines = list(COLOURS), []
    for index in range(count):
        right, wrong = names[index % 3], names[(index + 1) % 3]
        record: dict[str, Any] = {"id": f"p{index}", "rejected_response": wrong}
        question = f"say {right} {index}"
        if pictures:
            Image.new("RGB", (32 + index % 3, 32), COLOURS[right]).save(folder / "images" / f"{index}.png")
            record["images"] = [f"{index}.png"]
            question = f"<image>what is the color? {index}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": right}]
        lines.append(json.dumps(record | {"messages": turns}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_judged(pairs: Path, name: str = "judged.jsonl") -> Path:
    """The answers of pairs with labels, beside them."""
    lines = []
    for pair in map(json.loads, pairs.read_text().splitlines()):
        rejected, (asked, chosen) = pair.pop("rejected_response"), pair.pop("messages")
        for answer, label in ((chosen["content"], True), (rejected, False)):
            messages = [asked, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({**pair, "messages": messages, "label": label}))
    path = pairs.parent / name
    path.write_text("\n".join(lines) + "\n")
    return path


def make_questions(pairs: Path, name: str = "questions.jsonl", *, solution: str | None = None) -> Path:
    """The questions of pairs with the chosen answers as references, or with one for all, beside them."""
    lines = []
    for pair in map(json.loads, pairs.read_text().splitlines()):
        del pair["rejected_response"]
        asked, chosen = pair.pop("messages")
        lines.append(json.dumps({**pair, "prompt": [asked], "solution": solution or chosen["content"]}))
    path = pairs.parent / name
    path.write_text("\n".join(lines) + "\n")
    return path


def plain_recipe(output: Path, pairs: Path, model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A recipe of six steps as plain data; sections are merged."""
    images = pairs.parent / "images"
    source = {"path": str(pairs)} | ({"image_folder": str(images)} if images.is_dir() else {})
    plain: dict[str, Any] = {
        "name": output.name, "objective": "dpo", "model": model, "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": [source], "max_length": 256},
        "optim": {"lr": 5e-3, "warmup": 0, "schedule": "constant"},
        "train": {"output": str(output), "steps": 6, "global_batch": 4, "micro_batch": 2, "precision": "fp32"},
        "track": {"trackers": []},
    }  # fmt: skip
    for name, section in sections.items():
        plain[name] = {**plain.get(name, {}), **section} if isinstance(section, dict) else section
    return plain


def make_recipe(output: Path, pairs: Path, model: dict[str, Any], **sections: Any) -> Recipe:
    """See `plain_recipe`."""
    return Recipe.from_dict(plain_recipe(output, pairs, model, **sections))


def logged(run: Path, name: str = "loss") -> list[float]:
    """A measure of every step of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def train(*arguments: str) -> int:
    """Train recipes one after the other, `RECIPE[@STOP]`, on every rank; a `.py` is imported first."""
    from mm_moslora.config import load_recipe
    from mm_moslora.launch.imported_code import imported
    from mm_moslora.preferences.preference_training import train_preferences

    with imported([Path(argument) for argument in arguments if argument.endswith(".py")]):
        for argument in arguments:
            path, _, stop_at = argument.partition("@")
            if not path.endswith(".py"):
                train_preferences(load_recipe(path), stop_at=int(stop_at) if stop_at else None)
    return 0


def break_steps(fault: str, steps: set[int], set_attribute: Callable[..., None] = setattr) -> None:
    """In these steps of a run a `loss` or `gradient` is not finite, a `save` finds a full disk, or a signal comes."""
    import torch

    from mm_moslora.preferences.trl_trainers import RunTrainer, TakenPreferences

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Any) -> Any:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient * float("nan")

    def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
        loss = super(RunTrainer, self).compute_loss(*args, **options)
        if self.state.global_step + 1 not in steps or not self.model.training or fault == "save":
            return loss
        if fault == "loss":
            return loss * float("nan")
        if fault == "gradient":
            return Poison.apply(loss)
        signal.raise_signal(getattr(signal, fault))
        return loss

    real = TakenPreferences.write

    def write(self: Any, folder: Path) -> None:
        if self.manifest.step in steps and fault == "save":
            raise OSError(28, "No space left on device")
        real(self, folder)

    set_attribute(RunTrainer, "compute_loss", compute_loss)
    set_attribute(TakenPreferences, "write", write)
