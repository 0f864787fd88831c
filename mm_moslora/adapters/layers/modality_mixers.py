"""A mixer for visual and another for text tokens: `mixer_form: by_modality`.

The update of a layer is ``s B M_v A`` for the tokens that pictures and videos became, and ``s B M_t A`` for all others;
A and B are one pair of subspaces for both. Each of the two folds, their pair does not: `take_modality` takes one out.

Only the model's input tells which tokens are visual. Hooks of its body and its decoder note it: by ``input_ids``, or by
what `mark_visual` attached to ``inputs_embeds``. Layers read it when they mix, and when checkpointing runs them again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.adapters.layers.factor_modules import Mixer
from mm_moslora.adapters.mixer import MIXER_FORMS, MIXER_INITS, MixerForm, init_mixer
from mm_moslora.utils.errors import AdapterError

_PASSES = 16
"""Forward passes before one backward pass whose inputs are known to layers that run again."""
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class ByModality(MixerForm):
    """A dense mixer for text and one for visual tokens, which begin as the same."""

    inits = MIXER_INITS
    instead = "Use it unmerged, or take the mixers of one modality first: mm-moslora adapters modality."

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Two mixers."""
        return {"text": (rank, rank), "visual": (rank, rank)}

    def identity(self, rank: int) -> dict[str, Tensor]:
        """I, twice."""
        return {name: torch.eye(rank, device="cpu") for name in ("text", "visual")}

    def products(self, rank: int) -> int:
        """Every token goes through both: which of them counts is known on the device alone."""
        return 2 * rank * rank

    def start(self, rank: int, kind: str) -> dict[str, Tensor]:
        """One mixer, twice; see `init_mixer`."""
        mixer = init_mixer(rank, kind)
        return {"text": mixer, "visual": mixer.clone()}

    def apply(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``M_t z``: what is no model's input is text."""
        return F.linear(z, tensors["text"])

    def apply_to_tokens(self, z: Tensor, tensors: Mapping[str, Tensor], visual: Tensor) -> Tensor:
        """``M_v z`` of the visual rows of subspace coordinates ``[..., R]``, ``M_t z`` of the others.

        Args:
            z: subspace coordinates.
            tensors: both mixers. Both have gradients in every step, as ranks that exchange them expect.
            visual: bool ``[..., 1]``.
        """
        return torch.where(visual, F.linear(z, tensors["visual"]), F.linear(z, tensors["text"]))


MIXER_FORMS["by_modality"] = ByModality


def mark_visual(embeddings: Tensor, visual: Tensor) -> Tensor:
    """Attach to a model's ``inputs_embeds`` which of them are visual; returns them. A cast or a slice loses it.

    Args:
        embeddings: ``[B, T, D]``.
        visual: bool ``[B, T]``.

    Raises:
        AdapterError: another shape or dtype.
    """
    if visual.shape != embeddings.shape[:-1] or visual.dtype != torch.bool:
        raise AdapterError(
            f"The marks of visual tokens are {visual.dtype} {list(visual.shape)}, expected bool "
            f"{list(embeddings.shape[:-1])}: one for each embedding."
        )
    embeddings.visual_tokens = visual  # type: ignore[attr-defined]
    return embeddings


class TokenModalities:
    """Which tokens of a model's input are visual, while its body or its decoder runs and when layers run again."""

    def __init__(self, config: Any) -> None:
        """Know a model.

        Args:
            config: of the model.
        """
        self._config = config
        self._depth = 0
        self._now: Tensor | None = None
        self._learned: deque[Tensor] = deque(maxlen=_PASSES)
        self._run_again = False

    @property
    def placeholders(self) -> list[int]:
        """The tokens that visual features replace."""
        numbers = (getattr(self._config, name, None) for name in _PLACEHOLDERS)
        return sorted({number for number in numbers if isinstance(number, int)})

    def watch(self, module: nn.Module) -> None:
        """Look at the inputs of a module that holds all layers; within another that is watched, they are known."""
        module.register_forward_pre_hook(self._begin, with_kwargs=True)
        module.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if next(module.parameters(), None) is None:  # its replicas have tensors instead
            raise AdapterError(
                "mixer_form 'by_modality' does not run under torch's DataParallel, whose threads share what is known "
                "of the input. Launch a process for each GPU (mm-moslora launch, torchrun)."
            )
        self._depth += 1
        if self._depth > 1:
            return
        embeddings, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids", args[0] if args else None)
        self._now = getattr(embeddings, "visual_tokens", None)
        if embeddings is None and ids is not None:
            self._now = torch.stack([ids == number for number in self.placeholders]).any(dim=0)
        if self._now is not None and torch.is_grad_enabled():
            if self._run_again:  # the backward pass of what was learned is over
                self._learned.clear()
            self._learned.append(self._now)
            self._run_again = False

    def _end(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)  # it is called, too, where `_begin` has refused the pass
        if not self._depth:
            self._now = None

    def among(self, z: Tensor) -> Tensor:
        """bool ``[..., 1]`` for subspace coordinates ``[..., R]`` of all tokens of the input.

        Raises:
            AdapterError: the input does not say it, the layer sees other tokens than those of the input, or it runs
                again for a backward pass and passes of several inputs could be meant.
        """
        rows = z.shape[:-1].numel()
        visual = self._now if self._depth else self._of_checkpointed_layer(rows)
        if visual is None:
            raise AdapterError(
                "mixer_form 'by_modality' mixes visual tokens otherwise than text, and the model got embeddings that "
                "do not say which are visual: those of a beam search, and of rows that are cut over ranks, do not. "
                "Use neither; give input_ids, or embeddings as mm_moslora.adapters.mark_visual returns them."
            )
        if rows != visual.numel():
            raise AdapterError(
                f"mixer_form 'by_modality': a layer got {rows} tokens, the model {visual.numel()}. It goes on layers "
                "that see every token of the input: no experts, no layers outside the decoder, no adapter_names."
            )
        return visual.to(z.device, non_blocking=True).view(*z.shape[:-1], 1)

    def _of_checkpointed_layer(self, rows: int) -> Tensor | None:
        """The input of the pass whose backward pass runs a layer again; None: none was noted."""
        if not torch.is_grad_enabled():
            return None
        self._run_again = True
        fitting = [visual for visual in self._learned if visual.numel() == rows]
        if any(not torch.equal(visual.flatten(), fitting[0].flatten()) for visual in fitting[1:]):
            raise AdapterError(
                f"mixer_form 'by_modality': {len(fitting)} forward passes with {rows} tokens each came before this "
                "backward pass, and gradient checkpointing does not say which of them a layer runs again for. Call "
                "backward after each, or turn gradient checkpointing off."
            )
        return fitting[0] if fitting else None


def watch_visual_tokens(model: nn.Module) -> None:
    """Have mixers by modality know which tokens are visual. Models without such mixers stay as they are.

    Args:
        model: with adapters.

    Raises:
        AdapterError: it reads no pictures, or its adapters are not in its decoder.
    """
    mixers = {path: module for path, module in model.named_modules() if _by_modality(module)}
    new = [mixer for mixer in mixers.values() if mixer.visual_tokens is None]
    if not new:
        return
    known = next((mixer.visual_tokens for mixer in mixers.values() if mixer.visual_tokens is not None), None)
    tokens = known or TokenModalities(getattr(model, "config", None))
    if not tokens.placeholders or not hasattr(model, "get_decoder"):
        raise AdapterError(
            f"mixer_form is 'by_modality', and {type(model).__name__} has no token in the place of a picture "
            "(image_token_id in its configuration). Use it with a vision-language model, or choose another form."
        )
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
    words = set(model.get_input_embeddings().modules())  # type: ignore[operator]
    inside = set(decoder.modules()) - words
    if outside := next((path for path, mixer in mixers.items() if mixer not in inside), None):
        raise AdapterError(
            f"mixer_form is 'by_modality', and {outside.partition('.lora_mixer')[0]} is no layer of the decoder: it "
            "does not see text beside pictures. Adapt the layers of the language model alone."
        )
    for mixer in new:
        mixer.visual_tokens = tokens
    if known is None:
        body: nn.Module = model.base_model  # type: ignore[assignment]
        for module in {body, decoder}:
            tokens.watch(module)


def _by_modality(module: nn.Module) -> bool:
    return isinstance(module, Mixer) and isinstance(module.form, ByModality)
