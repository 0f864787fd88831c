"""Turns pictures and videos into tensors and placeholders where a processor decides how many tokens they take.

A video stays one where the model takes it in one of two forms: its frames are pictures with text around them
(`pixel_values`, as in SmolVLM and InternVL), or patches with a grid and a token of their own (`video_grid_thw`, as in
Qwen-VL). A small video shows which. For other models a video is several pictures.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from mm_moslora.batch import PictureFrame, ProcessedImage, Video, VideoSampling
from mm_moslora.config import BoxFormName, ModelConfig
from mm_moslora.models.families import processor_family
from mm_moslora.models.processing.image_processing import picture_frame
from mm_moslora.utils.errors import ModelError, reason_of

logger = logging.getLogger(__name__)

_PROBED = ((320, 240), (96, 288))
"""Pictures that show whether a processor joins them."""
_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


class ProcessorImageProcessing:
    """Pictures as a processor of transformers prepares them, with its tiles, patches and wrapper tokens."""

    fixed = False

    def __init__(self, processor: Any, *, image_token_id: int, boxes: BoxFormName | None = None) -> None:
        self.processor, self.image_token_id, self.boxes = processor, image_token_id, boxes
        self._family = processor_family(processor)
        self._count = functools.lru_cache(maxsize=65_536)(self._count_tokens)
        self._tiled: dict[tuple[int, tuple[int, ...]], tuple[int, ...] | str] = {}
        self.frame = functools.lru_cache(maxsize=65_536)(self._frame)
        self._shapes = functools.lru_cache(maxsize=4_096)(self._video_shapes)

    @functools.cached_property
    def videos(self) -> VideoSampling | None:
        """See `ImageProcessing.videos`."""
        try:
            if _takes_videos(self):
                return ProcessorSampling(self.processor.video_processor)
        except Exception as error:  # processors raise nearly anything
            logger.debug("%s takes no videos: %s", type(self.processor).__name__, error)
        return None

    def process(self, images: Sequence[Image.Image | Video]) -> list[ProcessedImage]:
        """See `ImageProcessing.process`."""
        if len(images) > 1 and self._family.untiled_when_several:
            return self._several(cast(Sequence[Image.Image], images))
        return [self.video(image) if isinstance(image, Video) else self._one(image) for image in images]

    def placeholders(self, sizes: Sequence[tuple[int, int] | VideoMetadata]) -> list[tuple[int, ...] | str]:
        """See `ImageProcessing.placeholders`."""
        if len(sizes) > 1 and self._family.untiled_when_several:
            return [image.placeholders for image in self._several([Image.new("RGB", (8, 8)) for _ in sizes])]
        return [self._text(size) if isinstance(size, VideoMetadata) else self._count(*size) for size in sizes]

    def video(self, video: Video) -> ProcessedImage:
        """A video as the model's processor prepares it."""
        output = self.processor(
            text=[self.processor.video_token], videos=[np.stack([np.asarray(frame) for frame in video.frames])],
            video_metadata=[_copied(video.metadata)], do_sample_frames=False, return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        tensors = {name: torch.as_tensor(value) for name, value in output.items() if name not in _OF_TEXT}
        if self._family.one_image_list:
            tensors = {name: value[0] for name, value in tensors.items()}
        return ProcessedImage(placeholders=self._text(video.metadata), tensors=tensors)

    def _text(self, metadata: VideoMetadata) -> str:
        """The text of a video, as the processor writes it: visual tokens, and times and words around them."""
        shapes = self._shapes(len(metadata.frames_indices or ()), metadata.height or 1, metadata.width or 1)
        return str(self.processor.replace_video_token(shapes | {"video_metadata": [_copied(metadata)]}, video_idx=0))

    def _video_shapes(self, frames: int, height: int, width: int) -> dict[str, Any]:
        """What a video processor makes of a video without its pixels."""
        video = torch.empty((frames, 3, height, width), dtype=torch.uint8, device="meta")
        # Another filter gives the same shapes; transformers warns that some are not for every device.
        plain = {"do_sample_frames": False, "resample": Image.Resampling.BILINEAR, "return_tensors": "pt"}
        return dict(self.processor.video_processor([video], **plain))

    def _frame(self, size: tuple[int, int]) -> PictureFrame:
        """See `ImageProcessing.frame`."""
        # Idefics pads lists of pictures alone.
        found = None if self._family.one_image_list else picture_frame(self.processor.image_processor, size)
        if found is not None:
            return found
        if self.boxes != "qwen2_5_vl":  # the others count shares of the picture
            return PictureFrame(width=size[0], height=size[1])
        grid = self._call([Image.new("RGB", size)])[1].get("image_grid_thw")
        if grid is None:
            raise ModelError(
                "model.boxes is qwen2_5_vl, whose boxes count pixels of the resized picture, and "
                f"{type(self.processor).__name__} does not show that size. Choose another form."
            )
        height, width = (int(count) * int(self.processor.image_processor.patch_size) for count in grid[0, 1:])
        return PictureFrame(width=width, height=height, scale=(width / size[0], height / size[1]))

    def _one(self, image: Image.Image) -> ProcessedImage:
        if self._joins:
            raise ModelError(
                f"{type(self.processor).__name__} joins the pictures of a call, so a batch cannot hold those of "
                "several samples. Choose another model."
            )
        ids, tensors = self._call([image])
        if self._family.one_image_list:
            tensors = {name: value[0] for name, value in tensors.items()}
        if self._family.adds_text:
            ids = [number for number in ids if number == self.image_token_id]
        return ProcessedImage(placeholders=tuple(ids), tensors=tensors)

    @functools.cached_property
    def _joins(self) -> bool:
        """Whether two pictures become one tensor, or places that count over both."""
        if self._family.one_image_list:
            return False
        pictures = [Image.new("RGB", size) for size in _PROBED]
        try:
            *apart, together = (self._call(call)[1] for call in ([pictures[0]], [pictures[1]], pictures))
            if len(together["pixel_values"]) < sum(len(tensors["pixel_values"]) for tensors in apart):
                return True
        except (ModelError, KeyError):  # takes no two pictures, or no pixels
            return False
        places = [name for name, value in together.items() if not value.is_floating_point()]
        lists = [(together[name], [tensors[name] for tensors in apart]) for name in places]
        return any(len(value) == sum(map(len, own)) and not torch.equal(value, torch.cat(own)) for value, own in lists)

    def _several(self, images: Sequence[Image.Image]) -> list[ProcessedImage]:
        """Several pictures of one sample, for a processor that does not tile them then (LLaVA-OneVision)."""
        ids, tensors = self._call(images)
        count = len(images)
        tensors["batch_num_images"] = torch.full((count,), count)
        share = len(ids) // count
        return [
            ProcessedImage(
                placeholders=tuple(ids[index * share : (index + 1) * share]),
                tensors={name: value[index : index + 1] for name, value in tensors.items()},
            )
            for index in range(count)
        ]

    def _call(self, images: Sequence[Image.Image]) -> tuple[list[int], dict[str, Tensor]]:
        try:
            output = self.processor(
                text=[self.processor.image_token * len(images)], images=[list(images)], return_tensors="pt",
                add_special_tokens=False,
            )  # fmt: skip
        except Exception as error:  # processors raise nearly anything
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise ModelError(
                f"{type(self.processor).__name__} prepares no picture of {sizes} pixels: {reason_of(error)}. Compare "
                "do_resize and the sizes of its preprocessor_config.json with those of the model on the hub."
            ) from error
        tensors = {name: torch.as_tensor(value) for name, value in output.items() if name not in _OF_TEXT}
        return output["input_ids"][0].tolist(), tensors

    def _count_tokens(self, width: int, height: int) -> tuple[int, ...] | str:
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None:
            return self._one(Image.new("RGB", (width, height))).placeholders
        visual = int(count(image_sizes=[(height, width)])["num_image_tokens"][0])
        tiles = getattr(self.processor.image_processor, "get_number_of_image_patches", lambda *_: 0)(height, width, {})
        if isinstance(tiles, tuple):  # with rows and columns, whose text some versions do not count
            if (visual, tiles) not in self._tiled:
                self._tiled[visual, tiles] = self._one(Image.new("RGB", (width, height))).placeholders
            return self._tiled[visual, tiles]
        return (self.image_token_id,) * (visual + self._uncounted)

    @functools.cached_property
    def _uncounted(self) -> int:
        """Tokens around the visual ones, which some processors count and others do not."""
        counted = self.processor._get_num_multimodal_tokens(image_sizes=[(32, 32)])["num_image_tokens"][0]
        return len(self._one(Image.new("RGB", (32, 32))).placeholders) - int(counted)


class ProcessorSampling:
    """Frames as a video processor chooses them."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __repr__(self) -> str:
        return str(self.processor.to_json_string())

    def sample(self, metadata: VideoMetadata, *, frames: int | None, fps: float | None) -> list[int]:
        """See `VideoSampling.sample`; of a video that the processor refuses as too short, frames at even distances."""
        names = self.processor.valid_kwargs.__annotations__
        settings = {name: getattr(self.processor, name, None) for name in names} | {"num_frames": frames, "fps": fps}
        total = metadata.total_num_frames
        try:
            indices = [int(index) for index in self.processor.sample_frames(metadata=_copied(metadata), **settings)]
        except Exception as error:  # processors raise nearly anything
            logger.debug("%s does not sample %s: %s", type(self.processor).__name__, metadata, error)
            indices = []
        if indices and all(0 <= index < total for index in indices):
            return indices
        count = frames or int(total / (metadata.fps or 1) * (fps or 1))
        return np.linspace(0, total - 1, min(total, max(1, count))).round().astype(int).tolist()


def _copied(metadata: VideoMetadata) -> VideoMetadata:
    """A copy for a processor, which may write into it."""
    indices = metadata.frames_indices
    return replace(metadata, frames_indices=None if indices is None else list(indices))


def _takes_videos(processing: ProcessorImageProcessing) -> bool:
    """Whether a model takes a video in one of the two forms at the top, and its chat template has a place for it."""
    processor = processing.processor
    if getattr(processor, "video_processor", None) is None or not getattr(processor, "video_token", None):
        return False
    parts = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "a"}]
    written = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    places = [written.find(token) for token in (processor.video_token, processor.image_token)]
    if not 0 <= places[0] < places[1]:
        return False
    metadata = VideoMetadata(
        total_num_frames=4, fps=2.0, width=64, height=64, duration=2.0, frames_indices=[0, 1, 2, 3]
    )
    shown = processing.video(Video(metadata=metadata, frames=[Image.new("RGB", (64, 64))] * 4))
    text = str(shown.placeholders)
    if processor.image_token in text:
        return set(shown.tensors) <= {"pixel_values", "pixel_attention_mask"}
    grids = {"pixel_values_videos", "video_grid_thw"}
    return processor.video_token in text and grids <= set(shown.tensors) <= grids | {"second_per_grid_ts"}


def limit_pixels(processor: Any, config: ModelConfig) -> None:
    """Set the budget of a ready-made model's processor, which exports then have, too."""
    if config.min_pixels is None and config.max_pixels is None:
        return
    images = processor.image_processor
    own: Mapping[str, int] = dict(getattr(images, "size", None) or {})
    least, most = (own.get(name) for name in ("shortest_edge", "longest_edge"))
    if not least or not most or "image_grid_thw" not in images.model_input_names:
        raise ModelError(
            f"model.min_pixels or model.max_pixels is set, and {type(images).__name__} has no budget of pixels: its "
            f"size is {own}. Leave them out, or change the size in the model's preprocessor file."
        )
    least, most = config.min_pixels or min(least, config.max_pixels or least), config.max_pixels or most
    if least > most:
        raise ModelError(f"model.min_pixels is {least}, more than the {most} pixels that the model's processor allows.")
    images.size = {**own, "shortest_edge": least, "longest_edge": most}
