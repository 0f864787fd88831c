"""A mixer for visual and another for text tokens: `mixer_form: by_modality`.

The update of a layer is ``s B M_v A`` for the tokens that pictures and videos became, and ``s B M_t A`` for all others;
A and B are one pair of subspaces for both. Each of the two folds, their pair does not: `take_modality` takes one out.

Only the model's input tells which tokens are visual. A hook before the model's body notes it: by ``input_ids``, or by
what `mark_visual` attached to ``inputs_embeds``. Layers read it when they mix, also when checkpointed layers run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.adapters.layers.factor_modules import Mixer
from mm_moslora.adapters.mixer import MIXER_FORMS, MIXER_INITS, MixerForm, init_mixer
from mm_moslora.utils.errors import AdapterError

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
    """Attach to a model's ``inputs_embeds`` which of them are visual; returns them.

    Args:
        embeddings: ``[B, T, D]``.
        visual: bool ``[B, T]``.
    """
    embeddings.visual_tokens = visual  # type: ignore[attr-defined]
    return embeddings


class TokenModalities:
    """Which tokens of a model's present input are visual."""

    def __init__(self, config: Any) -> None:
        """Know a model.

        Args:
            config: of the model.
        """
        self._config = config
        self._visual: Tensor | None = None

    @property
    def placeholders(self) -> list[int]:
        """The tokens that visual features replace."""
        numbers = (getattr(self._config, name, None) for name in _PLACEHOLDERS)
        return sorted({number for number in numbers if isinstance(number, int)})

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the input of the model's body, before it runs."""
        embeddings, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids", args[0] if args else None)
        self._visual = getattr(embeddings, "visual_tokens", None)
        if embeddings is None and ids is not None:
            self._visual = torch.stack([ids == number for number in self.placeholders]).any(dim=0)

    def among(self, z: Tensor) -> Tensor:
        """bool ``[..., 1]`` for subspace coordinates ``[..., R]`` of all tokens of the input.

        Raises:
            AdapterError: the input does not say it, or the layer sees other tokens than those of the input.
        """
        if self._visual is None:
            raise AdapterError(
                "mixer_form 'by_modality' mixes visual tokens otherwise than text, and the model got embeddings that "
                "do not say which are visual: beam search and rows that are cut over ranks do not. Use neither, or "
                "attach them (mm_moslora.adapters.mark_visual)."
            )
        if (found := z.shape[:-1].numel()) != self._visual.numel():
            raise AdapterError(
                f"mixer_form 'by_modality': a layer got {found} tokens, the model {self._visual.numel()}. "
                "It goes on layers that see every token of the input: no experts, and no layers outside the decoder."
            )
        return self._visual.to(z.device, non_blocking=True).view(*z.shape[:-1], 1)


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
    inside = set(model.get_decoder().modules())  # type: ignore[operator]
    if outside := next((path for path, mixer in mixers.items() if mixer not in inside), None):
        raise AdapterError(
            f"mixer_form is 'by_modality', and {outside.partition('.lora_mixer')[0]} is outside of the decoder, where "
            "tokens are not text and pictures. Adapt the language model alone."
        )
    for mixer in new:
        mixer.visual_tokens = tokens
    if known is None:
        body: nn.Module = model.base_model  # type: ignore[assignment]
        body.register_forward_pre_hook(tokens.note, with_kwargs=True)


def _by_modality(module: nn.Module) -> bool:
    return isinstance(module, Mixer) and isinstance(module.form, ByModality)
