"""How routers spread tokens over experts in training: shares, their variation, and the model's auxiliary loss.

Shapes: G rows of S tokens, T tokens, E experts, K experts per token. Routers do not train; these numbers tell
whether the adapters are trained by few tokens, and whether new data use other experts than the model was balanced for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora.adapters.tree import named_base_modules, stacked_parameters
from mm_moslora.utils import distributed


class ExpertBalance:
    """Counts the tokens of every expert from now on, while the model trains.

    A module with stacked parameters counts where it gets the experts of its tokens, whole numbers, as an argument: that
    is how transformers calls experts. Models without such modules have no metrics. Padding does not count: the
    attention mask of the forward pass tells it.

    Args:
        model: with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        holders: dict[str, tuple[nn.Module, int]] = {}
        modules = dict(named_base_modules(model))
        for path, parameter in stacked_parameters(modules.items()):
            holder = path.rpartition(".")[0]
            holders[holder] = modules[holder], int(getattr(parameter, "ds_shape", parameter.shape)[0])
        self._watches = bool(holders)
        self._counts: dict[str, Tensor] = {}
        self._probabilities: dict[str, Tensor] = {}
        self.shares: dict[str, list[float]] = {}
        """Share of every expert in the last logged steps, by module path."""
        self._mask: Tensor | None = None
        for path, module in modules.items():
            if isinstance(module, PreTrainedModel) and any(holder.startswith(path) for holder in holders):
                module.register_forward_pre_hook(self._read_mask, with_kwargs=True)
        for path, (module, experts) in holders.items():
            module.register_forward_pre_hook(self._counting(path, experts), with_kwargs=True)
        for path, (module, index) in _routers(modules).items() if holders else ():
            module.register_forward_hook(self._adding_up(path, index))

    def _read_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        # A model hands the one inside on what it made of the mask: ``[G, 1, S, S]``, or one for every kind of layer.
        if module.training and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
            self._mask = mask

    def _real(self, rows: Tensor) -> Tensor:
        """1 for the rows of tokens, 0 for those of padding, ``[T, 1]``."""
        if self._mask is None or self._mask.numel() != len(rows):
            return rows.new_ones((len(rows), 1))
        return self._mask.to(rows.device, rows.dtype).view(-1, 1)

    def _counting(self, path: str, experts: int) -> Callable[..., None]:
        @torch.no_grad()
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not module.training or torch.compiler.is_compiling():
                return
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            chosen = next((value for value in tensors if value.dtype in (torch.int64, torch.int32)), None)
            if chosen is not None:  # E stands for an expert of another rank
                numbers = torch.arange(experts, device=chosen.device)  # bincount would wait for the GPU
                rows = (chosen.reshape(-1, chosen.shape[-1], 1) == numbers).sum(1)
                _add(self._counts, path, (rows * self._real(rows)).sum(0).double())

        return count

    def _adding_up(self, path: str, index: int) -> Callable[..., None]:
        @torch.no_grad()
        def add_up(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module.training and not torch.compiler.is_compiling():
                logits = output[index] if isinstance(output, tuple | list) else output
                rows = logits.detach().float().flatten(0, -2).softmax(-1)
                real = self._real(rows)
                _add(self._probabilities, path, torch.cat([(rows * real).sum(0), real.sum(0)]).double())

        return add_up

    def metrics(self) -> dict[str, float]:
        """Of the steps since the last call, over all ranks, under `experts/...`; all ranks call it together.

        `share_max` and `share_min` are the shares of the most and the least used expert, `variation` is the standard
        deviation of the shares over their mean: each the mean over the layers. `variation_max` is that of the worst
        layer, `unused` the share of experts without a token. `aux_loss` is what the model's own function gives: K for
        tokens that are spread evenly, more for others.
        """
        if not self._watches:
            return {}
        counts, probabilities = _over_ranks(self._counts), _over_ranks(self._probabilities)
        self._counts, self._probabilities = {}, {}
        shares = {path: value / value.sum() for path, value in counts.items() if value.sum() > 0}
        if not shares:
            return {}
        self.shares = {path: share.tolist() for path, share in shares.items()}
        variations = [float(share.std(correction=0) / share.mean()) for share in shares.values()]

        def mean(measure: Callable[[Tensor], Tensor]) -> float:
            return sum(float(measure(share)) for share in shares.values()) / len(shares)

        metrics = {
            "experts/share_max": mean(torch.max),
            "experts/share_min": mean(torch.min),
            "experts/variation": sum(variations) / len(variations),
            "experts/variation_max": max(variations),
            "experts/unused": mean(lambda share: (share == 0).double().mean()),
        }
        if len(probabilities) == len(counts) and len({len(value) for value in counts.values()}) == 1:
            total: Tensor = sum(probabilities.values(), torch.zeros(()))
            chosen: Tensor = sum(counts.values(), torch.zeros(()))
            tokens = total[-1]
            metrics["experts/aux_loss"] = float((chosen / tokens * (total[:-1] / tokens)).sum() * len(chosen))
        return metrics


def _add(sums: dict[str, Tensor], path: str, values: Tensor) -> None:
    sums[path] = values if path not in sums else sums[path] + values


def _over_ranks(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the ranks, on the CPU; a rank that has none adds nothing."""
    table = distributed.gather_objects({path: value.cpu() for path, value in sums.items()})
    added: dict[str, Tensor] = {}
    for row in table:
        for path, value in row.items():
            _add(added, path, value)
    return added


def _routers(modules: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, int]]:
    """Every router, and where its logits are in its output, by module path.

    Of models that have an auxiliary loss of their own; transformers records the logits for it.
    """
    routers: dict[str, tuple[nn.Module, int]] = {}
    for path, module in modules.items():
        code = sys.modules.get(type(module).__module__)
        if not isinstance(module, PreTrainedModel) or not hasattr(code, "load_balancing_loss_func"):
            continue
        recorders: Any = (module._can_record_outputs or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list | tuple) else [recorders]:
            kind: Any = getattr(recorder, "target_class", recorder)
            index = getattr(recorder, "index", 0)
            part = getattr(recorder, "layer_name", None) or ""
            for name, inner in modules.items():
                if name.startswith(f"{path}." if path else "") and isinstance(inner, kind) and part in name:
                    routers[name] = inner, index
    return routers
