"""Starts of PEFT's LORA that read training data before the first step: EVA, CorDA, LoRA-GA.

PEFT's own functions compute them, from passes of the base model over some samples. Without samples, such a LORA starts
like any other, which is enough to count what it trains and to load what it has learned.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import peft
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from mm_moslora.utils.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of the training data."""

    batches: Callable[[int], Sequence[Mapping[str, Any]]]
    """In batches of a size: keyword arguments of the model, with labels."""
    progress: Callable[[str, int], Callable[[int], Any]] = lambda what, total: lambda done: None
    """Name and number of steps of a task -> what is called with the number of those that are done."""


_READ = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config"}
"""Starts that read data, and the options of their own."""
_BATCH = 16
"""Samples of a batch for EVA, which takes the supervised tokens of one at a time."""
_PASSES, _LEAST = 20, 200
"""Passes of EVA over the samples, and at least so many batches, until its directions must have converged."""


def reads_data(config: peft.PeftConfig) -> bool:
    """Whether an adapter's start needs samples."""
    return isinstance(config, peft.LoraConfig) and config.init_lora_weights in _READ


def without_data(config: peft.PeftConfig) -> peft.PeftConfig:
    """The configuration with PEFT's usual start, also of what was started from data and has been trained."""
    plain: Any = copy.deepcopy(config)
    if reads_data(config):
        plain.init_lora_weights = True
        for option in _READ.values():
            setattr(plain, option, None)
    return cast(peft.PeftConfig, plain)


def read_before(model: nn.Module, config: peft.PeftConfig, samples: Samples) -> None:
    """Run CorDA's and LoRA-GA's passes before PEFT adds the layers; PEFT keeps the results on the layers (`forget`)."""
    lora: Any = config
    training = model.training
    if lora.init_lora_weights == "corda":
        preprocess_corda(model, lora, run_model=lambda: _run(model, samples))
    elif lora.init_lora_weights == "lora_ga":
        lora.lora_ga_config = lora.lora_ga_config or peft.LoraGAConfig()
        with warnings.catch_warnings():  # PEFT counts gradients by hooks on layers whose input has none
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            preprocess_loraga(model, lora, train_step=lambda: _run(model, samples, backward=True))
    model.train(training)


def read_after(wrapped: peft.PeftModel, samples: Samples) -> None:
    """What EVA reads once PEFT has added the layers; it may move rank from layer to layer.

    Raises:
        AdapterError: too few supervised tokens for the rank.
    """
    config: Any = wrapped.peft_config["default"]
    if config.init_lora_weights != "eva":
        return
    batches, count = samples.batches(_BATCH), itertools.count(1)
    most = max(_LEAST, _PASSES * len(batches))
    progress = samples.progress("find EVA's directions, at most", most)

    def forward(model: nn.Module, inputs: Mapping[str, Any]) -> None:
        progress(min(done := next(count), most))
        if done > most:
            raise AdapterError(
                f"EVA's directions have not converged after {most} batches of {_BATCH} samples. A batch must have "
                f"more supervised tokens than {config.eva_config.rho:g} times the rank, {config.r}. Lower the rank, or "
                "set adapter.peft.eva_config to {use_label_mask: false}, which takes all tokens."
            )
        _loss(model, inputs)

    initialize_lora_eva_weights(
        wrapped, batches, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False
    )


def _run(model: nn.Module, samples: Samples, *, backward: bool = False) -> None:
    batches = samples.batches(1)
    progress = samples.progress("run the samples", len(batches))
    for done, batch in enumerate(batches, start=1):
        loss = _loss(model, batch)
        if backward:
            loss.backward()
        progress(done)


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return cast(Tensor, model(**batch, use_cache=False).loss)


def forget(model: nn.Module) -> None:
    """Remove what `read_before` left on the layers."""
    for module in model.modules():
        for name in ("eigens", "_peft_loraga_grad"):
            if name in module.__dict__:
                delattr(module, name)
