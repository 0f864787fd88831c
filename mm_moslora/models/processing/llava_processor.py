"""Processors of assembled models, which stock transformers loads: chat template, image processor, placeholders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mm_moslora.models.vision.vision_tower import ImageSpec
from mm_moslora.models.vlm import VlmConfig

IMAGE_TOKEN = "<image>"  # noqa: S105  (a vocabulary entry)

# Flattens content parts to text, so that the template of a language model, which takes strings only, takes messages
# with images. LLaVA's rule: an image is on a line of its own.
_FLATTEN_PARTS = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set parts = namespace(text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}"
    "{%- set parts.text = parts.text + '" + IMAGE_TOKEN + "\n' -%}"
    "{%- elif part['type'] == 'text' -%}"
    "{%- set parts.text = parts.text + part['text'] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': parts.text}] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)


class VlmProcessor(LlavaProcessor):
    """LLaVA's processor with a fixed number of visual tokens per image, for any tower and projector."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokens_per_image: int = 1,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.tokens_per_image = tokens_per_image

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """The placeholder text of one image."""
        return self.image_token * self.tokens_per_image


AutoProcessor.register(VlmConfig, VlmProcessor)


def image_processor(spec: ImageSpec, aspect: str) -> LlavaImageProcessorPil:
    """The image processor of a tower, PIL backend (the torchvision one gives slightly other pixels)."""
    square = {"height": spec.size, "width": spec.size}
    return LlavaImageProcessorPil(
        size=square if aspect == "resize" else {"shortest_edge": spec.size},
        crop_size=square,
        do_center_crop=aspect != "resize",
        do_pad=aspect == "pad",
        image_mean=list(spec.mean),
        image_std=list(spec.std),
        resample=spec.resample,
    )


def flattening_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A chat template for contents in parts, made from that of a language model, which takes strings only."""
    return _FLATTEN_PARTS + tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None


def plain_template(template: str | None) -> str | None:
    """The chat template of the language model within a `flattening_template`; any other template unchanged."""
    return None if template is None else template.removeprefix(_FLATTEN_PARTS)


def build_processor(
    tokenizer: PreTrainedTokenizerBase, spec: ImageSpec, *, aspect: str, tokens_per_image: int, standard: bool,
    select: str,
) -> LlavaProcessor:  # fmt: skip
    """The processor of an assembled model; a `standard` one is stock and counts tokens from the patch size.

    Args:
        select: the model's `vision_feature_select_strategy`; `default` drops the tokens before the first patch.
    """
    images = image_processor(spec, aspect)
    template = flattening_template(tokenizer)
    if not standard:
        return VlmProcessor(images, tokenizer, tokens_per_image=tokens_per_image, chat_template=template)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=spec.patch,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=spec.prefix,
        chat_template=template,
    )


def takes_plain_contents(processor: Any) -> bool:
    """Whether a processor has the chat template of a language model, as processors of assembled models do."""
    return str(processor.chat_template or "").startswith(_FLATTEN_PARTS)


def save_processor(processor: Any, folder: Path) -> None:
    """Save in both layouts: processor_config.json (transformers 5) and preprocessor_config.json (older readers)."""
    processor.save_pretrained(folder)
    if not (folder / "preprocessor_config.json").is_file():
        processor.image_processor.save_pretrained(folder)
