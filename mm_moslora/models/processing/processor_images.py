"""Turns pictures into tensors and placeholder ids where a processor decides how many tokens a picture takes.

These are ready-made models, and assembled ones with anyres.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm_moslora.batch import ProcessedImage
from mm_moslora.models.batching.single_pictures import flat
from mm_moslora.models.families import PICTURE_TOKENS, processor_family

_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


class ProcessorImageProcessing:
    """Pictures as a processor of transformers prepares them, with its tiles, patches and wrapper tokens.

    Args:
        processor: with `image_token`.
        image_token_id: the token that visual features replace.
    """

    fixed = False

    def __init__(self, processor: Any, *, image_token_id: int) -> None:
        self.processor, self.image_token_id = processor, image_token_id
        self._family = processor_family(processor)
        self._count = functools.lru_cache(maxsize=65_536)(self._count_tokens)

    def process(self, images: Sequence[Image.Image]) -> list[ProcessedImage]:
        """See `ImageProcessing.process`."""
        if len(images) > 1 and self._family.untiled_when_several:
            return self._several(images)
        return [self._one(image) for image in images]

    def placeholders(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        """See `ImageProcessing.placeholders`."""
        if len(sizes) > 1 and self._family.untiled_when_several:
            return [image.placeholders for image in self._several([Image.new("RGB", (8, 8)) for _ in sizes])]
        return [self._count(*size) for size in sizes]

    def _one(self, image: Image.Image) -> ProcessedImage:
        ids, tensors = self._call([image])
        if self._family.one_image_list:
            tensors = {name: value[0] for name, value in tensors.items()}
        if self._family.one_by_one:
            tensors = flat(tensors)
        if self._family.adds_text:
            ids = [number for number in ids if number == self.image_token_id]
        return ProcessedImage(placeholders=tuple(ids), tensors=tensors)

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
        output = self.processor(
            text=[self.processor.image_token * len(images)], images=[list(images)], return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        tensors = {name: torch.as_tensor(value) for name, value in output.items() if name not in _OF_TEXT}
        if self._marked - {self.image_token_id}:
            tensors[PICTURE_TOKENS] = torch.tensor([sorted(self._marked)] * len(images))
        ids = output["input_ids"][0].tolist()
        # Some put the start of a text before it, which a picture is not.
        start = {self.processor.tokenizer.bos_token_id, self.processor.tokenizer.eos_token_id}
        return list(itertools.dropwhile(start.__contains__, ids)), tensors

    def _count_tokens(self, width: int, height: int) -> tuple[int, ...]:
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is None:
            return self._one(Image.new("RGB", (width, height))).placeholders
        visual = int(count(image_sizes=[(height, width)])["num_image_tokens"][0])
        return (self.image_token_id,) * (visual + self._uncounted)

    @functools.cached_property
    def _marked(self) -> set[int]:
        """The tokens whose type the processor gives as that of a picture."""
        return {number for number in getattr(self.processor, "image_token_ids", ()) or () if number is not None}

    @functools.cached_property
    def _uncounted(self) -> int:
        """Tokens around the visual ones, which some processors count and others do not."""
        counted = self.processor._get_num_multimodal_tokens(image_sizes=[(32, 32)])["num_image_tokens"][0]
        return len(self._one(Image.new("RGB", (32, 32))).placeholders) - int(counted)
