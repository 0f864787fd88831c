"""The boxes of a model's answer, in pixels of the picture's file, for tasks that score them."""

from __future__ import annotations

from mm_moslora.batch import ImageProcessing
from mm_moslora.data.boxes.box_forms import read_boxes
from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.protocol.model_interface import Request
from mm_moslora_eval.scoring.scored_sample import without_thinking
from mm_moslora_eval.sources.source_images import image_size


def boxes_of(request: Request, text: str, processing: ImageProcessing | None) -> tuple[tuple[float, ...], ...] | None:
    """`Answer.boxes` of a text.

    In a control the model sees another picture. What it wrote counts as shares of that one, and lies in its own.
    """
    if request.boxes is None or not request.images:
        return None
    if processing is None or processing.boxes is None:
        raise EvalError(
            "The task scores boxes, and neither family nor vocabulary of this model says in which form it writes them. "
            "Set model.boxes in the recipe of its training."
        )
    shown = image_size(request.images[-1])
    boxes = read_boxes(without_thinking(text).text, processing, request.boxes, shown=shown)
    return tuple(box.numbers for box in boxes)
