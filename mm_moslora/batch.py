"""The data that models take: one `Example` per conversation, one `Batch` per micro-batch.

Shapes: ``T`` tokens of one example, ``S`` tokens of the whole batch, ``G`` examples (segments) in the batch,
``N`` images, ``K`` supervised positions, ``H x W`` pixels.

A batch is **padding-free**: its examples follow each other in one row of ``S`` tokens, position ids restart with every
example, and attention stays within each example. Models that cannot take such a row get the same batch cut into padded
rows (`mm_moslora.models.batching.padded_batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mm_moslora.config import BoxFormName
from mm_moslora.utils.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.video_utils import VideoMetadata

IGNORED = -100
"""Label of a token that is not supervised, in transformers' models."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video for a model that takes videos as such."""

    metadata: VideoMetadata
    """Of the file, with the numbers of the frames that are shown."""
    frames: Sequence[Image]
    """RGB, of one size."""


Placeholders = Sequence[int] | str
"""Token ids of a picture in a conversation, or the text of a video with its special tokens, which is tokenised with its
surroundings."""


@dataclass(frozen=True, kw_only=True)
class ProcessedImage:
    """One picture or video as the inputs of a model."""

    placeholders: tuple[int, ...] | str = ()
    """See `Placeholders`."""
    tensors: dict[str, Tensor]
    """Inputs of the model, with pictures, tiles or patches first: `pixel_values`, `image_grid_thw`, ..."""
    key: str = ""
    """Identifies its pixels: equal keys, equal pixels. Empty: unknown; it counts as different from all others."""


@dataclass(frozen=True, kw_only=True)
class PictureFrame:
    """Where the pixels of a picture's file, upright, lie in the picture that a model sees."""

    width: float
    """Of what the model sees, in its own pixels."""
    height: float
    scale: tuple[float, float] = (1.0, 1.0)
    """Pixels of the model per pixel of the file, across and down."""
    offset: tuple[float, float] = (0.0, 0.0)
    """Where the file's first corner lies: positive behind padding, negative where it is cropped away."""

    def seen(self, x: float, y: float) -> tuple[float, float]:
        """A point of the file in the model's pixels."""
        return x * self.scale[0] + self.offset[0], y * self.scale[1] + self.offset[1]

    def in_file(self, x: float, y: float) -> tuple[float, float]:
        """A point that the model sees in the file's pixels."""
        return (x - self.offset[0]) / self.scale[0], (y - self.offset[1]) / self.scale[1]


class VideoSampling(Protocol):
    """Chooses the frames of a video as a model's own processor does; its `repr` has the settings of that."""

    def sample(self, metadata: VideoMetadata, *, frames: int | None, fps: float | None) -> list[int]:
        """Numbers of the frames to show: about `frames`, or `fps` a second."""


class ImageProcessing(Protocol):
    """Turns pictures, and videos where the model takes them as such, into tensors for one model."""

    @property
    def videos(self) -> VideoSampling | None:
        """Chooses frames; None: a video is several pictures."""

    boxes: BoxFormName | None
    """The form in which the model reads and writes boxes; None: not known, see `ModelConfig.boxes`."""

    @property
    def fixed(self) -> bool:
        """Whether every picture takes as many tokens as any other."""

    def process(self, images: Sequence[Any]) -> list[ProcessedImage]:
        """Prepare the RGB pictures (PIL images) and `Video`s of one conversation."""

    def placeholders(self, sizes: Sequence[tuple[int, int] | VideoMetadata]) -> list[tuple[int, ...] | str]:
        """Placeholders of pictures with these widths and heights, and of videos, without decoding them."""

    def frame(self, size: tuple[int, int]) -> PictureFrame:
        """What becomes of the pixels of a picture of this width and height.

        Raises:
            ModelError: the processing crops or pads in a way that cannot be followed.
        """


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenised conversation with its decoded images."""

    id: str
    """The record's id, for logs and quarantine."""
    input_ids: Tensor
    """int64 ``[T]``; every image placeholder is already expanded to one token per visual token."""
    supervised: Tensor
    """bool ``[T]``; True for the tokens of an answer and its end-of-turn token."""
    weights: Tensor | None = None
    """fp32 ``[T]``; weights of the tokens in the loss, above 0 where supervised; None: these weigh 1."""
    pictures: Sequence[ProcessedImage] = ()
    """In the order of their placeholders."""

    def __post_init__(self) -> None:
        assert self.input_ids.ndim == 1
        assert self.input_ids.shape == self.supervised.shape
        assert self.supervised.dtype == torch.bool

    @property
    def length(self) -> int:
        """Tokens, visual tokens included."""
        return int(self.input_ids.shape[0])

    @property
    def labels(self) -> Tensor:
        """The ids of supervised tokens, `IGNORED` elsewhere and for the first token, which no position predicts.

        Raises:
            DataError: the tokens have weights, which a loss from labels would not use.
        """
        if self.weights is not None:
            raise DataError(
                f"Record {self.id} weighs its answers by other numbers than 0 and 1, which labels cannot hold. Train "
                "with `mm-moslora train`, or write loss: false or no weight into its turns."
            )
        labels = self.input_ids.masked_fill(~self.supervised, IGNORED)
        labels[0] = IGNORED
        return labels


def usable(examples: Sequence[Example | None]) -> list[Example]:
    """The examples of a batch without bad ones (None).

    Raises:
        DataError: all are bad.
    """
    whole = [example for example in examples if example is not None]
    if not whole:
        raise DataError("None of the examples of a batch can be used. Run `mm-moslora data check`.")
    return whole


def join_images(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the tensors of several pictures; other dimensions than the first are padded with zeros."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _concatenate([part[name] for part in parts if name in part]) for name in names}


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) > 1:
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        padded = []
        for tensor in tensors:
            whole = tensor.new_zeros((tensor.shape[0], *largest))
            whole[tuple(slice(size) for size in tensor.shape)] = tensor
            padded.append(whole)
        tensors = padded
    return torch.cat(list(tensors))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, padding-free."""

    input_ids: Tensor
    """int64 ``[S]``."""
    position_ids: Tensor
    """int64 ``[S]``; 0, 1, 2, ... within each example; behind what it shares with another one."""
    segment_lengths: tuple[int, ...]
    """``G`` lengths that sum to ``S``."""
    shared: tuple[int, ...] = ()
    """``G`` numbers: tokens that an example has before these, of the last example before it that shares none; they and
    their pictures stand in the row once. Empty: all stand alone."""
    target_positions: Tensor
    """int64 ``[K]``; positions before a supervised token. Only these reach the language-model head."""
    targets: Tensor
    """int64 ``[K]``; the supervised next tokens."""
    weights: Tensor | None = None
    """fp32 ``[K]``; weights of the targets in the loss. None: all weigh 1."""
    pixel_values: Tensor | None = None
    """float32 ``[N, 3, H, W]`` of all images in the order of their placeholders; None without any. The shapes of
    ready-made models differ, with images, tiles or patches first."""
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    """Other inputs that a model takes with its images (`image_grid_thw`, `image_sizes`, ...), images or tiles first,
    and with its videos (`pixel_values_videos`, `video_grid_thw`, ...), videos or patches first."""
    images: int = 0
    """Images in the batch, ``N``; a video that the model takes as such is one."""
    image_keys: tuple[str, ...] = ()
    """`ProcessedImage.key` of the ``N`` images; empty if one of them has none."""
    image_rows: tuple[tuple[int, ...], ...] = ()
    """Entries of `pixel_values` (images, tiles, patches) that every image of each of the ``G`` examples has."""
    ids: tuple[str, ...] = field(default=())
    """Ids of the examples, for logs."""
    host: Batch | None = field(default=None, repr=False)
    """On an accelerator: the batch in main memory from which this one was copied."""

    @classmethod
    def from_examples(cls, examples: Sequence[Example], *, shared: Sequence[int] = ()) -> Batch:
        """Join examples to one row.

        Args:
            examples: at least one; their order is kept.
            shared: see `Batch.shared`; these tokens and all pictures of such an example are those of the other one.
        """
        assert examples, "a batch needs at least one example"
        position_ids, positions, targets, weights = [], [], [], []
        weighed = any(example.weights is not None for example in examples)
        starts = shared or [0] * len(examples)
        offset = whole = 0
        for example, start in zip(examples, starts, strict=True):
            whole = whole if start else offset
            position_ids.append(torch.arange(start, example.length))
            # No position predicts the first token of a conversation.
            supervised = example.supervised[1:].nonzero().flatten()
            positions.append(supervised + torch.where(supervised < start, whole, offset - start))
            targets.append(example.input_ids[1:][supervised])
            if weighed:
                own = example.supervised.float() if example.weights is None else example.weights
                weights.append(own[1:][supervised])
            offset += example.length - start
        owned = [() if start else example.pictures for example, start in zip(examples, starts, strict=True)]
        pictures = [picture for own_pictures in owned for picture in own_pictures]
        tensors = join_images([picture.tensors for picture in pictures])
        keys = tuple(picture.key for picture in pictures)
        return cls(
            input_ids=torch.cat([example.input_ids[start:] for example, start in zip(examples, starts, strict=True)]),
            position_ids=torch.cat(position_ids),
            segment_lengths=tuple(map(len, position_ids)),
            shared=tuple(shared),
            target_positions=torch.cat(positions),
            targets=torch.cat(targets),
            weights=torch.cat(weights) if weighed else None,
            pixel_values=tensors.pop("pixel_values", None),
            image_inputs=tensors,
            images=len(pictures),
            image_keys=keys if all(keys) else (),
            image_rows=tuple(
                tuple(len(picture.tensors.get("pixel_values", ())) for picture in own_pictures)
                for own_pictures in owned
            ),
            ids=tuple(example.id for example in examples),
        )

    @property
    def tokens(self) -> int:
        """Tokens in the batch, ``S``."""
        return int(self.input_ids.shape[0])

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens, ``K``."""
        return int(self.targets.shape[0])

    @property
    def loss_weight(self) -> float:
        """Sum of the weights of the supervised tokens; their number where all weigh 1."""
        weights = self.on_host.weights
        return float(self.supervised_tokens if weights is None else weights.sum(dtype=torch.float64))

    @property
    def on_host(self) -> Batch:
        """The same batch in main memory, where reading values does not wait for an accelerator."""
        return self.host or self

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; the host does not wait for a copy to an accelerator."""
        target = torch.device(device)
        if target.type == "cpu" and self.host is not None:
            return self.host
        copied = self._each(lambda tensor: tensor.to(target, non_blocking=target.type != "cpu"))
        return copied if target.type == "cpu" else replace(copied, host=self.on_host)

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, from which copies are asynchronous; `DataLoader` calls it."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = ("input_ids", "position_ids", "target_positions", "targets", "weights", "pixel_values")
        inputs = {name: change(value) for name, value in self.image_inputs.items()}
        tensors = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, image_inputs=inputs, **changed)
