"""The web demo: chat with the tuned model beside the base model, with the attention of the answer as a heat map."""

from __future__ import annotations

import math
import os
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm_moslora.batch import ProcessedImage
from mm_moslora.data.images.record_picture import open_image
from mm_moslora.models.decoding.generation import Prompt, embed_prompt
from mm_moslora.models.decoding.token_sampling import Sampling
from mm_moslora.models.transformers_patches import attention_within
from mm_moslora.serve.chat_request import ChatMessage, MessagePicture
from mm_moslora.serve.continuous_batching import AnswerPart, GenerationEngine, GenerationJob
from mm_moslora.serve.prompt_preparation import turns_of
from mm_moslora.serve.request_guard import Guard
from mm_moslora.serve.request_limits import Limits
from mm_moslora.serve.served_models import Models
from mm_moslora.serve.text_stream import ThinkingSplit
from mm_moslora.utils.errors import DataError, MoSLoRAError

LONGEST = 1024
"""Longest text, tokens; the weights of a longer one would take too much memory."""
SIDE = 448
"""Side of the drawn picture, pixels."""


@torch.inference_mode()
def attention_maps(
    models: Models, name: str, *, input_ids: Tensor, images: Sequence[ProcessedImage], answer: Sequence[int]
) -> list[Tensor] | None:
    """Attention of the answer to each picture's tokens, ``[G, G]``, largest 1; None where nothing can be drawn."""
    # Shapes: T tokens of prompt and answer, A answer tokens, G side of the square of visual tokens; `input_ids` is [T -
    # A]. Attention is averaged over layers and heads, and part of it always rests on tokens without content: it shows
    # which visual tokens were read and does not explain the answer. No other thread may use the models meanwhile.
    side = math.isqrt(models.assembly.tokens_per_image)
    length = len(input_ids) + len(answer)
    if not images or not answer or length > LONGEST or side * side != models.assembly.tokens_per_image:
        return None
    model = models.assembly.model
    ids = torch.cat([input_ids, torch.tensor(list(answer))])
    with models.use(name), attention_within(model, "eager"):  # the fast ones do not give their weights out
        embedded = embed_prompt(model, Prompt(input_ids=ids, features=models.image_tokens(name, images)))
        visual = torch.isin(ids, torch.tensor([models.assembly.image_token_id]))
        weights = model.base_model(inputs_embeds=embedded[None], output_attentions=True, use_cache=False).attentions
    asking = range(len(input_ids) - 1, length - 1)  # the outputs at these positions became the answer
    attention = torch.stack([layer[0, :, list(asking)].float().mean(dim=(0, 1)) for layer in weights]).mean(dim=0).cpu()
    maps = attention[visual].view(len(images), side, side)
    return [heat / heat.max().clamp_min(1e-12) for heat in maps]


def overlay(pixels: Tensor, weights: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The picture as the model receives it, darkened where attention is low."""
    picture = (pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)
    base = Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).resize((SIDE, SIDE))
    heat = Image.fromarray((weights.sqrt().numpy() * 255).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    glow = Image.merge("RGB", [heat, heat.point(lambda value: value * 0.55), Image.new("L", heat.size)])
    dark = Image.blend(base, Image.new("RGB", base.size, (18, 22, 34)), 0.62)
    return Image.blend(Image.composite(base, dark, heat), glow, 0.28)


MOST_MIB = 20
"""Largest upload."""
_DESCRIPTION = (
    "Attach a picture and ask. Left: the tuned model. Right: the same conversation put to the model before tuning, and "
    "the tuned answer's attention to the projector's tokens, over the picture as the model sees it."
)


@dataclass(frozen=True, kw_only=True)
class Said:
    """Both conversations so far."""

    tuned: str = ""
    thinking: str = ""
    """Of the tuned model, before its answer."""
    base: str = ""
    attention: Image.Image | None = None


class Demo:
    """Sends a conversation to two variants and draws attention maps."""

    def __init__(self, models: Models, *, max_new_tokens: int = 128, why_no_base: str | None = None) -> None:
        self.models, self.max_new_tokens, self.why_no_base = models, max_new_tokens, why_no_base
        self.limits = Limits(queue=16, batch=8)
        self.engine = GenerationEngine(models, self.limits)
        self.engine.start()

    def close(self) -> None:
        """Stop answering."""
        self.engine.stop()

    def ask(self, messages: Sequence[ChatMessage]) -> Iterator[Said]:
        """Stream both answers; the attention map comes with the last event."""
        pictures = [part for message in messages for part in message.parts if isinstance(part, MessagePicture)]
        opened = [open_image(Path(picture.url)) for picture in pictures]
        if opened and not self.models.takes_pictures:
            raise DataError("This model has no vision encoder, so it takes no pictures.")
        ids, images = self.models.prompt(turns_of(messages), opened)
        events: queue.Queue[tuple[int, AnswerPart]] = queue.Queue()
        attention: Future[Image.Image | None] = Future()

        def deliver(number: int, part: AnswerPart) -> None:
            events.put((number, part))
            if number == 0 and part.ending is not None:  # the model belongs to this thread
                try:
                    attention.set_result(self._attention(ids, images, jobs[0].tokens))
                except Exception as error:
                    attention.set_exception(error)

        jobs = [
            GenerationJob(
                model=name, input_ids=ids, images=images, sampling=Sampling(max_tokens=self.max_new_tokens),
                deadline=time.monotonic() + self.limits.request_seconds, deliver=partial(deliver, number),
            )
            for number, name in enumerate(list(self.models.variants)[:2])
        ]  # fmt: skip
        self.engine.submit(jobs)
        splits, thinking, texts, open_ones = [ThinkingSplit(), ThinkingSplit()], "", ["", ""], len(jobs)
        try:
            while open_ones:
                number, part = events.get(timeout=self.limits.request_seconds + 5)
                thought, text = splits[number].add(part.text, last=part.ending is not None)
                thinking += "" if number else thought
                texts[number] += text
                open_ones -= part.ending is not None
                said = Said(tuned=texts[0], thinking=thinking, base=texts[1])
                yield said
            yield replace(said, attention=attention.result())
        finally:
            for job in jobs:
                job.cancelled = True

    def _attention(self, ids: Tensor, images: Sequence[ProcessedImage], answer: Sequence[int]) -> Image.Image | None:
        models, image = self.models, self.models.assembly.image
        if image is None:  # the visual tokens of a ready-made model form no known grid
            return None
        maps = attention_maps(models, models.default, input_ids=ids, images=images, answer=answer)
        if maps is None:
            return None
        return overlay(images[-1].tensors["pixel_values"][0], maps[-1], mean=image.mean, std=image.std)


def messages_of(message: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    """Gradio's history and the new message as messages."""
    messages = [
        ChatMessage(role="user" if entry.get("role") == "user" else "assistant", parts=parts)
        for entry in history
        if not (entry.get("metadata") or {}).get("title") and (parts := _parts(entry.get("content")))  # thinking
    ]
    files = tuple(MessagePicture(url=str(file), where="picture") for file in message.get("files") or [])
    messages.append(ChatMessage(role="user", parts=(*files, str(message.get("text") or ""))))
    return messages


def _parts(content: Any) -> tuple[str | MessagePicture, ...]:
    if isinstance(content, str):
        return (content,)
    if isinstance(content, Mapping):
        file = content.get("file") if isinstance(content.get("file"), Mapping) else content
        path = file.get("path") if isinstance(file, Mapping) else None
        return (MessagePicture(url=str(path), where="picture"),) if path else (str(content.get("text") or ""),)
    return tuple(part for item in content for part in _parts(item)) if isinstance(content, Sequence) else ()


def build(demo: Demo) -> Any:
    """The page, before it is launched."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    def answer(message: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[tuple[Any, str, Any]]:
        try:
            for event in demo.ask(messages_of(message, history)):
                folded = {"title": "Thinking", "status": "done" if event.tuned else "pending"}
                thought = gr.ChatMessage(content=event.thinking, metadata=folded) if event.thinking else None
                text = event.tuned or "…"
                yield text if thought is None else [thought, text], event.base, event.attention
        except MoSLoRAError as error:
            yield f"({error})", "", None

    with gr.Blocks(title="mm_moslora demo", analytics_enabled=False, fill_height=True) as page:
        with gr.Row():
            with gr.Column(scale=3):
                chat_column = gr.Column()
            with gr.Column(scale=2):
                base = gr.Textbox(
                    label="The model before tuning", interactive=False, lines=4, elem_id="base",
                    placeholder=f"Not available: {demo.why_no_base}." if demo.why_no_base else None,
                )  # fmt: skip
                attention = gr.Image(label="Where the tuned answer looked", interactive=False, elem_id="attention")
        with chat_column:
            # Answers are shown as plain text: the model's output must not be rendered as markup.
            chatbot = gr.Chatbot(
                label="The tuned model", render_markdown=False, sanitize_html=True, height=520, elem_id="tuned"
            )
            gr.ChatInterface(
                answer, multimodal=True, chatbot=chatbot, additional_outputs=[base, attention], title="mm_moslora demo",
                description=_DESCRIPTION, analytics_enabled=False, flagging_mode="never", save_history=False,
                textbox=gr.MultimodalTextbox(
                    file_types=["image"], placeholder="Ask about a picture", sources=["upload"]
                ),
            )  # fmt: skip
    return page.queue(max_size=16, default_concurrency_limit=2)


def launch(demo: Demo, *, port: int, wait: bool = True) -> tuple[Any, str]:
    """Open the demo on this machine, nothing shared, tracked or served from disk; its page, to be closed, and URL."""
    import gradio as gr
    from starlette.middleware import Middleware

    page = build(demo)
    guard = Middleware(Guard, limits=Limits(body_bytes=4 * MOST_MIB * 2**20))  # type: ignore[arg-type]
    fonts = ["system-ui", "sans-serif"]  # avoids fetching fonts
    _, url, _ = page.launch(
        server_name="127.0.0.1", server_port=port or None, share=False, show_error=False, quiet=True, strict_cors=True,
        enable_monitoring=False, allowed_paths=[], max_file_size=MOST_MIB * 2**20, prevent_thread_lock=not wait,
        ssr_mode=False, pwa=False, mcp_server=False, footer_links=[], inbrowser=False,
        app_kwargs={"middleware": [guard]}, theme=gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    return page, str(url)
