"""The tokens of prompts as a run, a checkpoint or an export reads them, counted without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers.video_utils import VideoMetadata

from mm_moslora.batch import VideoSampling
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.preprocessing_print import trained_videos
from mm_moslora.models.load_model import load_unweighted, model_of
from mm_moslora.models.model_sizes import base_sizes, sizes_of
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.run_paths import MANIFEST, find_checkpoint
from mm_moslora_eval.backends.local_model import thinking_tokens_of, turn_of
from mm_moslora_eval.protocol.model_interface import Message
from mm_moslora_eval.sources.document import ImageLike
from mm_moslora_eval.sources.source_images import image_size
from mm_moslora_eval.sources.source_videos import VideoFrame, WholeVideo


class PromptTokens:
    """Counts prompts by a model's tokenizer and processor; pictures are measured, not decoded."""

    def __init__(self, folder: Path) -> None:
        parts = load_unweighted(folder)
        self.name = str(folder)
        self._encoder, self._images = ConversationEncoder.of(parts), parts.image_processing
        place = find_checkpoint(folder)
        stored = (place / MANIFEST).is_file()
        config = base_sizes(model_of(place)) if stored else sizes_of(str(folder), None, key="--model")
        self.thinking_tokens = thinking_tokens_of(config) if self._encoder.asks_to_think else 0
        """See `thinking_tokens_of`; 0: the model is not asked to think."""
        self.trained_frames, self.trained_fps, whole = trained_videos(folder)
        whole = whole and self._images is not None
        self.videos: VideoSampling | None = self._images.videos if self._images is not None and whole else None
        """Chooses the frames of videos that the model takes as such; None: frames are pictures."""

    def of_prompt(self, messages: Sequence[Message], images: Sequence[ImageLike]) -> int:
        """Tokens of a prompt with its pictures and videos."""
        if images and self._images is None:
            raise EvalError(f"the task shows pictures, but {self.name} is a language model")
        shown = [] if self._images is None else self._images.placeholders([self._size(image) for image in images])
        return len(self._encoder.encode_prompt([turn_of(message) for message in messages], pictures=shown))

    def _size(self, image: ImageLike) -> tuple[int, int] | VideoMetadata:
        if isinstance(image, WholeVideo):
            return image.about
        if self._images is not None and self._images.fixed:
            return (1, 1)  # every picture takes as many
        size = image.video.size if isinstance(image, VideoFrame) and image.video is not None else None
        return size or image_size(image)
