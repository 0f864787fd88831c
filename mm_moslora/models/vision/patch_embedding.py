"""Patch embeddings that are three-dimensional convolutions over single patches, as Qwen-VL has them, run as products.

Shapes: ``N`` patches, ``C`` channels, ``K`` numbers of a patch, ``V`` vision width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.models.transformers_patches import mix_in


class PatchConv3d(nn.Conv3d):
    """Multiplies patches ``[N, C, *kernel]`` by its weight ``[V, K]``, which keeps its name and its five dimensions.

    The weight is reshaped in the forward pass: at other times ZeRO-3 may hold a part of it. A convolution is many
    times slower (pytorch#174051, transformers#45750). transformers' `fusion_config` renames the weight in memory, and
    with it in checkpoints, and adds an entry to `config.json`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[N, V, 1, 1, 1]``; inputs of another size than one patch go through the convolution."""
        if input.shape[1:] != self.weight.shape[1:]:
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def use_linear_patches(model: nn.Module) -> None:
    """Have convolutions whose kernel is their stride multiply where they get single patches, in place."""
    for module in model.modules():
        if type(module) is nn.Conv3d and _steps_by_patches(module):
            mix_in(module, PatchConv3d)


def _steps_by_patches(layer: nn.Conv3d) -> bool:
    plain = layer.padding in ("valid", (0, 0, 0)) and layer.dilation == (1, 1, 1) and layer.groups == 1
    return plain and layer.kernel_size == layer.stride


def patch_embedding_words(model: nn.Module) -> str:
    """The three-dimensional convolutions of a model and what they run as, for people; empty: it has none."""
    runs = {True: "a linear layer", False: "a convolution, which may be slow"}
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv3d)}
    return "".join(f"; {path} runs as {runs[isinstance(layer, PatchConv3d)]}" for path, layer in layers.items())
