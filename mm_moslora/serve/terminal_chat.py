"""Chat with a model in the terminal: one conversation with its pictures."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mm_moslora.batch import ProcessedImage, Video
from mm_moslora.data.boxes.box_forms import FoundBox, read_boxes
from mm_moslora.data.chat.answer_thinking import THINK_END
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.data.images.record_picture import open_image
from mm_moslora.data.images.video_clip import SUFFIXES as VIDEO_SUFFIXES
from mm_moslora.data.images.video_clip import Clip
from mm_moslora.data.preprocessing_print import check_preprocessing, trained_videos
from mm_moslora.models.assembly import Parts
from mm_moslora.models.decoding.generation import Prompt, encode_images, stop_token_ids, stream, stream_padded_row
from mm_moslora.models.load_model import load
from mm_moslora.models.vlm import has_own_forward
from mm_moslora.serve.text_stream import TextStream, ThinkingSplit
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DataError, MoSLoRAError
from mm_moslora.utils.text_format import visible

HELP = """\
Ask a question, or paste the path of a picture or a video to show it.
  /image PATH   show a picture with the next question
  /video PATH   show frames of a video, or of a folder of frames, with the next question
  /images       list the pictures of this conversation
  /thinking     show or fold the thinking of answers
  /retry        ask the last question again
  /history      print the conversation so far
  /reset        forget the conversation and its pictures
  /help         this list
  /quit         leave (or Ctrl-D); Ctrl-C stops an answer"""
VIDEO_FRAMES = 8
"""Frames that are sampled from a video, where the model's folder names none."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


class Chat:
    """A conversation with one model."""

    def __init__(
        self,
        assembly: Parts,
        *,
        max_new_tokens: int = 128,
        video_frames: int = VIDEO_FRAMES,
        video_fps: float | None = None,
        whole_videos: bool = True,
    ) -> None:
        self.assembly, self.max_new_tokens = assembly, max_new_tokens
        self.video_frames, self.video_fps = video_frames, video_fps
        processing = assembly.image_processing if whole_videos else None
        self.sampling = None if processing is None else processing.videos
        self.encoder = ConversationEncoder.of(assembly)
        self.shows_thinking = False
        self.reset()

    def reset(self) -> None:
        """Clear the conversation and its pictures."""
        self.turns: list[Turn] = []
        self.images: list[Image.Image | Video] = []
        self.names: list[str] = []
        self.pending: list[int | None] = []
        """Shown since the last question: 1 for a picture, the number of frames for a video, None for one that the model
        takes as such."""
        self._features: list[Tensor] = []
        self._pending_by_turn: list[list[int | None]] = []

    @classmethod
    def from_folder(cls, folder: Path, *, max_new_tokens: int = 128, other_preprocessing: bool = False) -> Chat:
        """Load a run, a checkpoint or an export onto this process's accelerator and start a conversation."""
        assembly = load(folder)
        check_preprocessing(folder, assembly, accepted=other_preprocessing)
        assembly.model.to(distributed.device())  # type: ignore[arg-type]
        frames, fps, whole = trained_videos(folder)
        return cls(
            assembly, max_new_tokens=max_new_tokens, video_frames=frames or VIDEO_FRAMES, video_fps=fps,
            whole_videos=whole,
        )  # fmt: skip

    def show(self, path: Path) -> None:
        """Attach a picture file to the next question."""
        self.look(open_image(path), name=str(path))

    def watch(self, path: Path) -> int:
        """Attach the frames of a video, sampled as in training, to the next question; returns their number."""
        clip = Clip(path, str(path), self.video_frames, fps=self.video_fps, sampling=self.sampling)
        shown = clip.frames()
        self.look(*(shown if self.sampling is None else [clip.video()]), name=str(path))
        return len(shown)

    def look(self, *pictures: Image.Image | Video, name: str = "picture") -> None:
        """Attach an RGB picture, the frames of a video, or one that the model takes as such, to the next question."""
        if self.assembly.image_processing is None:
            raise DataError("This model has no vision encoder, so it takes no pictures.")
        self.images += pictures
        self.names.append(name)
        self.pending.append(None if isinstance(pictures[0], Video) else len(pictures))

    def stream(self, question: str) -> Iterator[str]:
        """Ask; yields the answer piece by piece and stores it, also when it is stopped half-way."""
        turn = Turn.asking(question, images=len(self.pending))
        turn = turn.showing(self.pending) if self.pending else turn
        ids, images = self._prompt([*self.turns, turn])
        self.turns.append(turn)
        self._pending_by_turn.append(self.pending)
        self.pending = []
        text, answer = TextStream(self.encoder), ""
        try:
            for token in self._tokens(ids, images):
                piece = text.add(token)
                answer += piece
                yield piece
            piece = text.finish()
            answer += piece
            yield piece
        finally:
            self.turns.append(Turn(role="assistant", text=answer))

    def ask(self, question: str) -> str:
        """Ask and return the whole answer."""
        return "".join(self.stream(question))

    def boxes(self) -> list[FoundBox]:
        """The boxes and points in the last answer, in pixels of the last picture's file; see `read_boxes`."""
        if not self.turns or not self.images or isinstance(self.images[-1], Video):
            return []
        answer = self.turns[-1].text.rpartition(THINK_END)[2]
        return read_boxes(answer, self.assembly.image_processing, self.images[-1].size)

    def take_back(self) -> str | None:
        """Remove the last question and its answer; returns the question, None where there is none."""
        if not self.turns:
            return None
        number = max(number for number, turn in enumerate(self.turns) if turn.role == "user")
        turn = self.turns[number]
        self.turns, self.pending = self.turns[:number], self._pending_by_turn.pop() + self.pending
        return turn.parts()[-1].removeprefix("\n") if turn.images else turn.text

    def _prompt(self, turns: list[Turn]) -> tuple[Tensor, list[ProcessedImage]]:
        """Token ids of a conversation, and its pictures as tensors."""
        images = self.assembly.image_processing.process(self.images) if self.assembly.image_processing else []
        ids = self.encoder.encode_prompt(turns, pictures=[picture.placeholders for picture in images])
        longest = getattr(self.assembly.model.config.get_text_config(), "max_position_embeddings", None)
        if longest and len(ids) + self.max_new_tokens > longest:
            raise DataError(
                f"The conversation takes {len(ids)} tokens and an answer up to {self.max_new_tokens}; this model holds "
                f"{longest}. Type /reset, or start with a smaller --max-new-tokens."
            )
        return ids, images

    def _tokens(self, ids: Tensor, images: list[ProcessedImage]) -> Iterator[int]:
        model = self.assembly.model
        stops = stop_token_ids(model, self.assembly.tokenizer.eos_token_id)
        if has_own_forward(model):
            yield from stream_padded_row(model, ids, images, max_new_tokens=self.max_new_tokens, stop_ids=stops)
            return
        self._features += [
            encode_images(model, image.tensors["pixel_values"])[0] for image in images[len(self._features) :]
        ]
        features = torch.cat(self._features) if self._features else None
        prompt = Prompt(input_ids=ids, features=features)
        for (token,) in stream(model, [prompt], max_new_tokens=self.max_new_tokens, stop_ids=stops):
            if token is None:
                return
            yield token


def interactive(chat: Chat) -> None:
    """Read questions from the terminal until the end of input."""
    with suppress(ImportError):  # arrow keys and line history, where the platform supports them
        import readline  # noqa: F401  (importing it changes `input`)
    _say(f"{HELP}\n")
    if chat.encoder.asks_to_think:
        _say(f"The model is asked to think before it answers, in at most {chat.max_new_tokens} new tokens.\n")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            _say("\n")
            return
        try:
            if line in ("/quit", "/exit"):
                return
            _run_line(chat, line)
        except MoSLoRAError as error:
            _say(f"{error}\n")


def _run_line(chat: Chat, line: str) -> None:
    """Run one line of input."""
    command, _, rest = line.partition(" ")
    path = Path(
        _unquoted(line).removeprefix("file://")
    ).expanduser()  # terminals write it when a file is dropped on them
    dropped = path if path.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES and path.is_file() else None
    if command == "/video" or (dropped is not None and dropped.suffix.lower() in VIDEO_SUFFIXES):
        frames = chat.watch(dropped or Path(_unquoted(rest)).expanduser())
        _say(f"{frames} frames of the video go with your next question.\n")
    elif dropped is not None or command == "/image":
        chat.show(dropped or Path(_unquoted(rest)).expanduser())
        _say(f"Picture {len(chat.names)} goes with your next question.\n")
    elif command == "/images":
        _say("".join(f"{number}  {name}\n" for number, name in enumerate(chat.names, 1)) or "No pictures yet.\n")
    elif command == "/history":
        lines = [f"{turn.role}: {turn.parts()[-1].strip()}\n" for turn in chat.turns]
        _say("".join(lines) or "Nothing yet.\n")
    elif command == "/thinking":
        chat.shows_thinking = not chat.shows_thinking
        _say(f"Thinking is {'shown' if chat.shows_thinking else 'folded'}.\n")
    elif command == "/reset":
        chat.reset()
        _say("Forgotten.\n")
    elif command == "/retry":
        question = chat.take_back()
        _say("There is no question yet.\n") if question is None else _answer(chat, chat.stream(question))
    elif command == "/help":
        _say(f"{HELP}\n")
    elif line.startswith("/"):
        _say(f"Unknown command {command}. Type /help.\n")
    elif line:
        _answer(chat, chat.stream(line))


def folded(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of an answer with one line in the place of its thinking."""
    split, thinking = ThinkingSplit(), ""
    for piece in itertools.chain(pieces, (None,)):
        thought, content = split.add(piece or "", last=piece is None)
        thinking += thought
        if thinking and (content or piece is None):
            yield f"[{len(thinking.split())} words of thinking; /thinking shows them]\n"
            thinking = ""
        yield content


def _answer(chat: Chat, pieces: Iterator[str]) -> None:
    try:
        for piece in pieces if chat.shows_thinking else folded(pieces):
            _say(piece)
    except KeyboardInterrupt:  # the partial answer stays in the conversation
        _say(" [stopped]")
    finally:
        pieces.close()  # type: ignore[attr-defined]
    _say("\n")
    for box in chat.boxes():
        kind = "box" if len(box.numbers) == 4 else "point"
        _say(f"  {kind} {', '.join(f'{number:g}' for number in box.numbers)} {box.label}".rstrip())
        _say(f" (pixels of {chat.names[-1]})\n")


def _unquoted(text: str) -> str:
    try:
        parts = shlex.split(text)
    except ValueError:
        return text.strip()
    return parts[0] if len(parts) == 1 else text.strip()


def _say(text: str) -> None:
    sys.stdout.write(visible(text.replace("\r", "")))
    sys.stdout.flush()
