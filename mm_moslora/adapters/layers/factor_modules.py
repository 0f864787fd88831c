"""Modules that hold the factors of an adapter: the mixer, and an A or B that does not train.

Shapes: ``R`` rank; M ``[R, R]``, A ``[R, D_in]``, B ``[D_out, R]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mm_moslora.adapters.mixer import MixerForm
from mm_moslora.kernels.lora.lora_math import autocasts
from mm_moslora.utils.errors import AdapterError


class _Factor(nn.Module):
    """A factor that is a buffer where it must not train.

    No optimiser, no `requires_grad_` sweep of PEFT and no sharding can then make it move.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        try:
            return super()._apply(fn, recurse)
        except NotImplementedError:
            # Loading through the meta device fills it later; until then PEFT moves all but parameters that are empty.
            if any(buffer.is_meta for buffer in self.buffers(recurse=False)):
                return self
            raise


class Mixer(_Factor):
    """Holds the tensors of M and applies it to a row vector of subspace coordinates."""

    def __init__(self, form: MixerForm, tensors: Mapping[str, Tensor], *, trainable: bool) -> None:
        """Keep the tensors of a form.

        Args:
            form: how M is made of them.
            tensors: by name, of the shapes of the form.
            trainable: whether they are parameters; if not, they are buffers.
        """
        super().__init__()
        self.form, self._names = form, tuple(tensors)
        for name, tensor in tensors.items():
            if not name.isidentifier() or hasattr(self, name):
                raise AdapterError(
                    f"The mixer form {form.spec!r} has a tensor {name!r}, which is a name of torch's modules or of no "
                    "attribute. Give it another name."
                )
            if trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_state_dict_post_hook(_as_computed)

    @property
    def trainable(self) -> bool:
        """Whether M is made of parameters."""
        return next(self.parameters(), None) is not None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; those of a parametrisation (torch.nn.utils.parametrize) are computed."""
        return {name: getattr(self, name) for name in self._names}

    def matrix(self) -> Tensor:
        """M as ``[R, R]``; the parameter itself where the form is dense.

        Raises:
            AdapterError: M depends on its input.
        """
        return self.form.rounded_matrix(self.tensors())

    def forward(self, z: Tensor) -> Tensor:
        """``z M^T`` for ``z`` of shape ``[..., R]``."""
        tensors = self.tensors()
        # PEFT casts parameters to float32 but leaves buffers in the base's dtype: the narrower side follows.
        if not self.trainable:
            tensors = {name: tensor.to(z.dtype) for name, tensor in tensors.items()}
        elif not autocasts(z.device):
            z = z.to(tensors[self._names[0]].dtype)
        return self.form.apply(z, tensors)

    def extra_repr(self) -> str:
        """Form, shapes and whether it trains."""
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.tensors().items())
        return f"form={self.form.spec}, {shapes}, trainable={self.trainable}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """A parametrised tensor takes the value that was saved for it."""
        if is_parametrized(self):
            for name in self._names:
                if is_parametrized(self, name) and (value := state_dict.pop(f"{prefix}{name}", None)) is not None:
                    with torch.no_grad():
                        setattr(self, name, value.to(getattr(self, name)))
            inside = cast(nn.Module, self.parametrizations).state_dict()
            state_dict |= {f"{prefix}parametrizations.{name}": value for name, value in inside.items()}
        super()._load_from_state_dict(state_dict, prefix, *args)


def _as_computed(mixer: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """A parametrised mixer (torch.nn.utils.parametrize) is saved as what it computes, under the names of its form."""
    if isinstance(mixer, Mixer) and is_parametrized(mixer):
        for name in [name for name in state if name.startswith(f"{prefix}parametrizations.")]:
            del state[name]
        state |= {f"{prefix}{name}": tensor.detach() for name, tensor in mixer.tensors().items()}
