"""Example: checkpoints of mm_moslora as a model of VLMEvalKit, which has no hook for models of other packages.

In VLMEvalKit's `vlmeval/config.py` add

    from functools import partial
    from mm_moslora_eval.backends.vlmevalkit_example import VLMEvalKitModel
    supported_VLM["my_model"] = partial(VLMEvalKitModel, model_path="FOLDER")

and run `python run.py --data MMBench_DEV_EN --model my_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.protocol.model_interface import IMAGE, Message, Part, Request


class VLMEvalKitModel:
    """VLMEvalKit's model interface: `generate(message, dataset)` with a list of `{type, value}` parts.

    Args:
        model_path: as `--model` of `mm-moslora eval run`.
        max_new_tokens: longest answer.
        precision: fp32, bf16, fp16 or auto.
    """

    is_api = False
    INTERLEAVE = True

    def __init__(self, model_path: str, *, max_new_tokens: int = 512, precision: str = "auto", **_: Any) -> None:
        self.model = open_model(model_path, precision=precision)  # type: ignore[arg-type]
        self.max_new_tokens = max_new_tokens

    def use_custom_prompt(self, dataset: str) -> bool:
        """Return false, so that VLMEvalKit builds the data set's prompt."""
        return False

    def set_dump_image(self, dump_image: Any) -> None:
        """Ignore VLMEvalKit's function that writes pictures to files."""

    def generate(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """Answer one message."""
        return self.generate_inner(message, dataset)

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """Answer one message, its parts in their order."""
        parts: list[Part] = []
        for part in message:
            parts += [IMAGE, "\n"] if part["type"] == "image" else [part["value"]]
        images = tuple(Path(part["value"]) for part in message if part["type"] == "image")
        request = Request(
            id="0", messages=(Message(role="user", content=tuple(parts)),), images=images,
            max_new_tokens=self.max_new_tokens,
        )  # fmt: skip
        ((_, answer),) = self.model.generate([request], batch_size=1)
        return answer.text.strip()
