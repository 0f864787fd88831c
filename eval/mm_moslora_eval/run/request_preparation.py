"""Prepares requests: renders prompts, identifies pictures, computes keys, divides the work among ranks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.errors import DataError, EvalError
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora_eval.metrics.box_iou import fault_of_reference
from mm_moslora_eval.protocol.model_interface import Message, OptionRequest, Request, TokenDraw
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.scoring.answer_scoring import BOX_METRICS, BOXES, PLACES
from mm_moslora_eval.sources.document import Document, ImageLike, StoredImage
from mm_moslora_eval.sources.source_images import Hasher, ImageMode, derangement, image_size, mean_image
from mm_moslora_eval.sources.source_videos import about_videos, with_whole_videos

if TYPE_CHECKING:
    from mm_moslora.batch import VideoSampling

FORMAT = 1
"""Version of keys and files; versions are never mixed."""

_TOKENS_PER_IMAGE = 576  # LLaVA-1.5; affects only the order of work
_CHARACTERS_PER_TOKEN = 4
_MEAN = "mean:"
"""Before the hash of a picture of which the mean colour is shown."""
_Identified = tuple[tuple[str, ...], str | None]
"""Hashes of a document's pictures, or why there are none."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One document, ready to be asked."""

    index: int
    document: Document
    key: str
    """Hash of everything that determines the answer: task, document, prompt, pictures, decoding, model."""
    messages: tuple[Message, ...]
    image_ids: tuple[str, ...]
    """Hashes of the pictures shown."""
    own_ids: tuple[str, ...]
    """Hashes of the document's own pictures, of videos the frames; they group samples in every image mode, whatever
    the model."""
    problem: str | None
    sample: int = 0
    """The number of the answer among several to the document."""

    @property
    def cost(self) -> float:
        """Rough length in tokens."""
        characters = sum(len(message.text) for message in self.messages)
        return characters / _CHARACTERS_PER_TOKEN + _TOKENS_PER_IMAGE * len(self.image_ids)

    @property
    def cluster(self) -> str:
        """Identifier of the pictures, equal for samples on the same pictures."""
        return "+".join(self.own_ids) or f"document {self.document.id}"


class Preparation:
    """The items of one task in one image mode.

    Wrong pictures come from `pool`, the whole data set, so that a document gets the same one in every selection.
    """

    def __init__(
        self,
        task: Task,
        documents: Sequence[Document],
        *,
        mode: ImageMode,
        seed: int,
        fingerprint: str,
        hasher: Hasher,
        pool: Sequence[Document] | None = None,
        videos: VideoSampling | None = None,
    ) -> None:
        self._task, self._mode, self._hasher = task, mode, hasher
        self._places = task.extraction in PLACES
        self._pictures: dict[str, ImageLike] = {}
        shown = documents if pool is None or mode != "wrong" else pool
        self._seen = {
            document.id: document if videos is None else with_whole_videos(document, videos) for document in shown
        }
        identified = {document.id: self._identify(document) for document in shown}
        seen = {name: self._identify(document) for name, document in self._seen.items()}
        beside = [ids for ids, problem in seen.values() if problem is None]
        names = [name for ids in beside for name in ids]
        self._other = derangement(names, seed=seed, apart=beside) if mode == "wrong" and names else {}
        self.items = tuple(
            item
            for index, document in enumerate(documents)
            for item in self._answers(
                self._item(index, document, identified[document.id], seen[document.id], fingerprint)
            )
        )
        keys = [item.key for item in self.items]
        assert len(set(keys)) == len(keys), "document ids are unique, so keys are"

    @property
    def documents(self) -> list[tuple[Item, ...]]:
        """The answers to each document, in their order."""
        count = self._task.decoding.samples
        return [self.items[start : start + count] for start in range(0, len(self.items), count)]

    @property
    def videos(self) -> dict[str, Any]:
        """See `about_videos`."""
        seen = self._seen.values()
        return about_videos(seen) if any(isinstance(i, StoredImage) for one in seen for i in one.images) else {}

    def _answers(self, item: Item) -> list[Item]:
        """An item for every answer; the first one has the key of a question with one answer."""
        count = range(1, self._task.decoding.samples)
        return [item, *(replace(item, sample=number, key=sha256_of_values([item.key, number])) for number in count)]

    def _identify(self, document: Document) -> _Identified:
        if document.problem is not None:
            return (), document.problem
        names = []
        for image in document.images:
            try:
                name = self._hasher(image)
            except (DataError, OSError) as error:
                return (), f"image cannot be read: {error}"
            self._pictures.setdefault(name, image)
            names.append(name)
        return tuple(names), None

    def _item(
        self, index: int, document: Document, identified: _Identified, as_seen: _Identified, fingerprint: str
    ) -> Item:
        task = self._task
        own, (seen, problem) = identified[0], as_seen
        messages: tuple[Message, ...] = ()
        if problem is None:
            whole = self._seen[document.id]
            try:
                messages = task.prompt.messages(whole)
                seen = tuple(seen[number] for number in task.prompt.image_order(whole))
                own = tuple(own[number] for number in task.prompt.image_order(document))
                problem = self._fault_of_boxes(document, own)
            except EvalError as error:
                problem = str(error)
        shown = seen
        if self._mode == "wrong":
            shown = tuple(self._other[name] for name in seen)
        elif self._mode == "blind":
            shown = tuple(f"{_MEAN}{name}" for name in seen)
        said = [[message.role, message.text] for message in messages]
        decided = {
            "format": FORMAT,
            "task": task.request_hash,
            "id": document.id,
            "document": document.hash,
            "prompt": sha256_of_values(said),
            "images": shown,
            "mode": self._mode,
            "model": fingerprint,
            "problem": problem,
        }
        return Item(
            index=index,
            document=document,
            key=sha256_of_values(decided),
            messages=messages,
            image_ids=shown,
            own_ids=own,
            problem=problem,
        )

    def _fault_of_boxes(self, document: Document, own: Sequence[str]) -> str | None:
        """Why the references of a task that compares boxes cannot be scored."""
        if self._task.extraction != BOXES or self._task.metric not in BOX_METRICS or not own:
            return None
        try:
            size = image_size(self._pictures[own[-1]])
        except DataError as error:
            return f"image cannot be read: {error}"
        faults = (fault_of_reference(answer, *size) for answer in document.answers)
        return next(filter(None, faults), None)

    def request(self, item: Item) -> Request:
        """The request for the model; creates the pictures of the mode `blind`."""
        pictures: list[Any] = []
        for name in item.image_ids:
            own = self._pictures[name.removeprefix(_MEAN)]
            pictures.append(mean_image(own) if self._mode == "blind" else own)
        return Request(
            id=item.document.id,
            messages=item.messages,
            images=tuple(pictures),
            max_new_tokens=self._task.decoding.max_new_tokens,
            stop=self._task.decoding.stop,
            beams=self._task.decoding.beams,
            draw=self._draw(item),
            sample=item.sample,
            aliases=_aliases(item.document),
            reference=self._task.reference_of(item.document),
            boxes=image_size(self._pictures[item.own_ids[-1]]) if item.own_ids and self._places else None,
        )

    def _draw(self, item: Item) -> TokenDraw | None:
        """The draw of an answer; its seed does not depend on the model, so two models get the same noise."""
        decoding = self._task.decoding
        if not decoding.temperature:
            return None
        seed = int(sha256_of_values([decoding.seed, self._task.id, item.document.id, item.sample])[:8], 16) % 2**31
        return TokenDraw(temperature=decoding.temperature, top_p=decoding.top_p, top_k=decoding.top_k, seed=seed)

    def option_request(self, item: Item) -> OptionRequest:
        """The request with the option letters as continuations."""
        return OptionRequest(request=self.request(item), options=tuple(item.document.options))

    def paths(self, item: Item) -> list[str | None]:
        """The files of the shown pictures, as far as they are files."""
        if self._mode == "blind":
            return [None for _ in item.image_ids]
        pictures = [self._pictures.get(name) for name in item.image_ids]
        return [str(picture) if isinstance(picture, Path) else None for picture in pictures]


def _aliases(document: Document) -> tuple[str, ...]:
    """Ids of a document in other harnesses: its question id, or its picture's file with and without the folder."""
    extra = document.extra
    path = extra.get("image_path", "")
    within = f"{document.category}/{path.rpartition('/')[2]}" if path and document.category else ""
    return tuple(name for name in (extra.get("question_id", ""), path, within) if name)


def deal(items: Sequence[Item], *, rank: int, world_size: int) -> list[Item]:
    """This rank's share: groups of one picture stay together; the costliest group goes first to the least loaded rank.

    The shares depend only on the items, so that all ranks and reruns agree without communication. The longest items
    come first, so that a lack of memory appears at once.
    """
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(_shown(item), []).append(item)
    ordered = sorted(groups.values(), key=lambda group: (-sum(item.cost for item in group), group[0].index))
    # Longest first to the least loaded rank: at most 4/3 of the best division (Graham 1969).
    loads = [0.0] * world_size
    share: list[list[Item]] = []
    for group in ordered:
        least = loads.index(min(loads))
        loads[least] += sum(item.cost for item in group)
        if least == rank:
            share.append(group)
    share.sort(key=lambda group: (-max(item.cost for item in group), group[0].index))
    return [item for group in share for item in sorted(group, key=lambda item: (-item.cost, item.index))]


def windows(share: Sequence[Item], size: int) -> list[list[Item]]:
    """The items that the model gets at a time, about `size` of a share: questions on one picture stay together.

    Batches are made within a window, so a window has the same answers wherever it is asked.
    """
    filled: list[list[Item]] = []
    for _, group in groupby(share, _shown):
        items = list(group)
        if not filled or len(filled[-1]) + len(items) > size:
            filled.append([])
        filled[-1] += items
    return filled


def _shown(item: Item) -> Hashable:
    return item.image_ids or (item.document.id,)
