"""Checkpoints of mm_moslora as a model of lmms-eval: `--model mm_moslora --model_args pretrained=FOLDER`.

The entry-point group `lmms_eval.models` registers the model. Prompts are lmms-eval's. As in LLaVA's adapter, pictures
go before the text unless the text has its own `<image>` tags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model

from mm_moslora.utils import distributed
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.protocol.model_interface import IMAGE, Message, OptionRequest, Part, Request

_TAG = "<image>"


@register_model("mm_moslora")
class MoSLoRALmms(lmms):  # type: ignore[misc,valid-type]
    """Any model that `open_model` accepts, such as a run, a checkpoint or an export, behind lmms-eval's interface.

    Args:
        pretrained: as `--model` of `mm-moslora eval run`.
        batch_size: questions decoded together.
        precision: fp32, bf16, fp16 or auto.
        reference: one question at a time, with no shared computation.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 8, precision: str = "auto", reference: bool = False, **_: Any
    ) -> None:
        super().__init__()
        self.answering = open_model(pretrained, precision=precision, reference=reference)  # type: ignore[arg-type]
        self.batch_size_per_gpu = int(batch_size)
        self._rank, self._world_size = distributed.rank(), distributed.world_size()

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer lmms-eval's generation requests, in their order."""
        prepared = [self._request(number, *instance.args) for number, instance in enumerate(requests)]
        answers = [""] * len(prepared)
        for index, answer in self.answering.generate(prepared, batch_size=self.batch_size_per_gpu):
            answers[index] = answer.text.strip()
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations: (sum of log-probabilities, whether it is the greedy answer).

        Tasks of lmms-eval that expect a mean loss (smaller is better) for images must not be run with it.
        """
        prepared = []
        for number, instance in enumerate(requests):
            context, target, visual, doc_id, task, split = instance.args
            text = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            request = self._request(number, context, {}, visual, doc_id, task, split)
            prepared.append(OptionRequest(request=request, options=(text,)))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(prepared)
        for index, (score,) in self.answering.loglikelihood(prepared, batch_size=self.batch_size_per_gpu):
            scores[index] = (score.logprob, score.greedy)
        return scores

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Conversations over several rounds are not supported."""
        raise NotImplementedError("mm_moslora answers one round; choose tasks of output_type generate_until.")

    def _request(
        self,
        number: int,
        context: str,
        settings: dict[str, Any],
        visual: Callable[[Any], Sequence[Any]] | None,
        doc_id: int,
        task: str,
        split: str,
    ) -> Request:
        images = [] if visual is None else list(visual(self.task_dict[task][split][doc_id]) or [])
        until = settings.get("until") or []
        return Request(
            id=f"{task}/{split}/{doc_id}/{number}",
            messages=(Message(role="user", content=_content(context, len(images))),),
            images=tuple(Path(image) if isinstance(image, str) else image for image in images),
            max_new_tokens=int(settings.get("max_new_tokens") or 128),
            stop=(until,) if isinstance(until, str) else tuple(until),
        )


def _content(context: str, images: int) -> tuple[Part, ...]:
    if images and context.count(_TAG) == images:
        parts: list[Part] = []
        for index, piece in enumerate(context.split(_TAG)):
            parts += [IMAGE, piece] if index else [piece]
        return tuple(part for part in parts if part != "")
    return (*((IMAGE,) * images), "\n" + context) if images else (context,)
