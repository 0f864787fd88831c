"""The logits of a model's class in TRL's head, which otherwise guesses scale and cap from a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mm_moslora.models.memory_efficient.loss_head import form_of, head_form
from mm_moslora.utils.errors import ModelError


def infer_logit_transform(model: PreTrainedModel) -> None:
    """Note what the class does around its head; ModelError where TRL's head cannot do it."""
    head: Any = model.get_output_embeddings()
    form = head_form(model)
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        fault = f"its head is {type(head).__name__}, which is no plain linear layer"
    elif form.words is not None:
        fault = f"only the first {form.words} of its head's {head.out_features} rows are words"
    else:
        head.form = form
        return
    raise ModelError(
        f"{type(model).__name__}: {fault}, and TRL's losses of preferences take a plain one. Choose another model, or "
        "set objective to sft."
    )


@contextmanager
def logits_of_class(model: PreTrainedModel) -> Iterator[None]:
    """TRL's heads that are made within compute the logits that `infer_logit_transform` found."""
    form, config = form_of(model.get_output_embeddings()), vars(model.config.get_text_config())
    new = {"logit_scale": form.scale, "final_logit_softcapping": form.cap}
    own = {name: config[name] for name in new if name in config}
    config.update(new)
    try:
        yield
    finally:
        for name in new:
            del config[name]
        config.update(own)
