"""`mm-moslora data check --caches`: fills a recipe's caches before training."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mm_moslora.batch import ImageProcessing
from mm_moslora.config import Recipe, VisionConfig
from mm_moslora.data.images.record_picture import ImageError, LocalPicture
from mm_moslora.data.record_examples import RecordExamples
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.open_sources import open_sources
from mm_moslora.data.sources.record_file import RecordSource
from mm_moslora.data.training_set import source_caches
from mm_moslora.models.precision import dtype_of, resolve_precision
from mm_moslora.models.vision.feature_store import FeatureStore, tower_hash
from mm_moslora.models.vision.vision_tower import load_vision
from mm_moslora.models.vlm import tower_states
from mm_moslora.planning.recipe_data import DataParts, data_sets, parts_of
from mm_moslora.training.preflight import check_data
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.progress_bar import Progress

_Position = tuple[int, int, int]
"""Source, row, and number of a picture in its record."""
_TOGETHER = 16
"""Pictures that the vision tower encodes at a time."""


class Filled(NamedTuple):
    """Counts of a call."""

    records: int
    """Records whose tokens are in the cache."""
    pictures: int
    """Pictures whose features are in the cache."""
    encoded: int
    """Those of them that were not there before."""
    unreadable: int
    """Pictures that cannot be read; `data check` names them."""


def fill_caches(recipe: Recipe) -> Filled:
    """Fill `data.cache` and `model.vision.feature_cache` with a recipe's training and validation data."""
    check_data(recipe.data)
    vision = recipe.model.vision
    folder = None if vision is None else vision.feature_cache
    if recipe.data.cache is None and folder is None:
        raise ConfigError("The recipe names no cache to fill. Set data.cache, model.vision.feature_cache or both.")
    parts = parts_of(recipe)
    files = [
        file for _, sources in data_sets(recipe) for file in open_sources(sources, processing=parts.image_processing)
    ]
    filled = Filled(0, 0, 0, 0)
    if recipe.data.cache is not None:
        filled = filled._replace(records=_tokens(recipe, files, parts))
    if vision is not None and folder is not None and parts.image_processing is not None:
        store, encode = _tower(recipe, vision, Path(folder).expanduser())
        filled = _features(files, parts.image_processing, store, encode)._replace(records=filled.records)
    return filled


def _tokens(recipe: Recipe, files: Sequence[RecordSource], parts: DataParts) -> int:
    with Progress("tokenise records", 0, unit="record") as progress:
        examples = RecordExamples(files, parts.encoder, parts.image_processing, recipe.data)
        return sum(len(cache.load().lengths) for cache in source_caches(examples, on_progress=progress.of))


def _tower(recipe: Recipe, vision: VisionConfig, folder: Path) -> tuple[FeatureStore, Callable[[Tensor], Tensor]]:
    """The store of a recipe's vision tower, and the function that encodes ``[N, 3, H, W]``."""
    device, dtype = distributed.device(), dtype_of(resolve_precision(recipe.train.precision))
    tower, _ = load_vision(vision, dtype=dtype, device=device)
    tower.eval()
    store = FeatureStore(folder, tower_hash(tower, vision.feature_layer), limit_gib=vision.feature_cache_gib)

    @torch.inference_mode()
    def encode(pixels: Tensor) -> Tensor:
        return tower_states(tower, vision.feature_layer, pixels.to(device=device, dtype=dtype))

    return store, encode


def _features(
    files: Sequence[RecordSource], processing: ImageProcessing, store: FeatureStore, encode: Callable[[Tensor], Tensor]
) -> Filled:
    positions = _pictures(files)
    batches: Sequence[Sequence[_Position]] = [
        positions[start : start + _TOGETHER] for start in range(0, len(positions), _TOGETHER)
    ]
    seen = unreadable = 0
    with Progress("encode pictures", sum(map(len, batches)), unit="picture") as progress:
        for batch in batches:
            pictures = []
            for file, row, number in batch:
                with suppress(RecordError, ImageError):
                    pictures += processing.process([files[file][row].images[number].rgb()])
            keys = {picture.key: index for index, picture in enumerate(pictures)}
            missing = [key for key in keys if store.read(key) is None]
            if missing:  # the whole batch is encoded: digits may depend on the pictures beside
                states = encode(torch.cat([picture.tensors["pixel_values"] for picture in pictures]))
                for key in missing:
                    store.write(key, states[keys[key]])
            seen, unreadable = seen + len(pictures), unreadable + len(batch) - len(pictures)
            progress.update(seen + unreadable)
    return Filled(0, seen, store.counts.written, unreadable)


def _pictures(files: Sequence[RecordSource]) -> list[_Position]:
    """First position of every picture, in the order of the records; a file counts once."""
    first: dict[Hashable, _Position] = {}
    for file, source in enumerate(files):
        for row in range(len(source)):
            with suppress(RecordError):
                for number, picture in enumerate(source[row].images):
                    position = (file, row, number)
                    first.setdefault(picture.path if isinstance(picture, LocalPicture) else position, position)
    return list(first.values())
