"""Checks of mixer forms that others write: methods that contradict each other, and values that no folder holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from mm_moslora.adapters.mixer import MixerForm, form_named
from mm_moslora.utils.errors import AdapterError


@torch.no_grad()
def check_form(form: MixerForm, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a form whose methods contradict each other, before a layer holds it.

    Args:
        form: to check; stays as it is.
        rank: R.
        tensors: what the mixer starts with, on the CPU.

    Raises:
        AdapterError: `start` or `identity` gives other tensors than `shapes` names, M is not ``[R, R]``, `identity`
            does not make M the identity, or a tensor called `weight` is not M.
    """
    shapes = {name: tuple(shape) for name, shape in form.shapes(rank).items()}
    with torch.random.fork_rng(devices=[]):
        identity = form.identity(rank)
    copied, z = copy.deepcopy(form), torch.eye(rank)
    for method, result in (("identity", identity), ("start", tensors)):
        actual = {name: tuple(tensor.shape) for name, tensor in result.items()}
        if actual != shapes or not actual:
            raise AdapterError(
                f"The mixer form {form.spec!r} names the tensors {shapes} in shapes({rank}), and its {method} gives "
                f"{actual}. Both must name the same tensors, at least one."
            )
        M = copied.matrix(result) if form.fixed else None
        if M is not None and M.shape != (rank, rank):
            raise AdapterError(
                f"matrix of the mixer form {form.spec!r} gives {list(M.shape)} for its {method}, expected "
                f"{[rank, rank]}."
            )
        if method == "identity" and not _close(copied.apply(z, result), z):
            raise AdapterError(
                f"identity of the mixer form {form.spec!r} does not make M the identity: with its tensors the form "
                "changes subspace coordinates. Plain LoRA is loaded with them."
            )
        weight = result.get("weight")
        if weight is not None and (M is None or not _close(M, weight if weight.ndim == 2 else torch.diag(weight))):
            raise AdapterError(
                f"The mixer form {form.spec!r} calls a tensor 'weight' that is not M itself (nor its diagonal); "
                "readers take it for M. Give it another name."
            )


@torch.no_grad()
def check_named(form: MixerForm, spec: str, rank: int, device: torch.device) -> None:
    """Refuse a form that computes something else than the form that its name makes anew.

    Whatever makes the difference (a running mean, a permutation drawn at the start) is in no folder.

    Args:
        form: in a model; stays as it is.
        spec: what the configuration names.
        rank: R.
        device: of the layer.

    Raises:
        AdapterError: the two differ.
    """
    fresh, live = form_named(spec), copy.deepcopy(form)
    if live.shapes(rank) != fresh.shapes(rank):  # the tensors themselves are then refused
        return
    with torch.random.fork_rng(devices=[]):
        identity = fresh.identity(rank)
    steps = {name: torch.linspace(-0.1, 0.1, tensor.numel()).view(tensor.shape) for name, tensor in identity.items()}
    tensors = {name: tensor + steps[name] for name, tensor in identity.items()}
    z, run_on = torch.linspace(-1, 1, 2 * rank).view(2, rank), "cpu" if device.type == "meta" else device
    live_output = live.apply(z.to(run_on), {name: tensor.to(run_on) for name, tensor in tensors.items()}).cpu()
    if not _close(live_output, fresh.apply(z, tensors)):
        raise AdapterError(
            f"The mixer form {spec!r} in the model computes something else than a new one does from the same tensors: "
            "it keeps values outside of them, which no folder holds. Return them from shapes, identity and start, or "
            "compute them from the name and the rank."
        )


def _close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-3, rtol=1e-3)
