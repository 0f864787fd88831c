"""An HTML page of training samples: pictures with boxes, and tokens coloured by supervision. One file, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape

from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerBase

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.segment_encoder import Encoded
from mm_moslora.data.check.terminal_view import REPEATS
from mm_moslora.data.images.picture_faults import ImageError
from mm_moslora.data.record_faults import RecordError

THUMBNAIL = 224
"""Longest side of a picture on the page, pixels."""
BOX = "#ff2d95"
"""Colour of boxes and points."""
_STYLE = """
:root { color-scheme: light dark; --learnt: #1a7f37; --learnt-back: #d8f5df; --text: #222; --quiet: #6a6a6a;
  --back: #fff; --card: #f6f7f9; --line: #d5d8dd; --image: #8250df; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --learnt: #7ee29a; --learnt-back: #12361f; --text: #e8e8e8;
  --quiet: #a0a0a0; --back: #16181c; --card: #1f2227; --line: #3a3f47; --image: #c9a7ff; --bad: #ff8f85; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1.5rem; color: var(--text);
  background: var(--back); }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--quiet); }
.tokens span { border-bottom: 1px solid var(--line); padding: 1px 0; }
.tokens .s { color: var(--learnt); background: var(--learnt-back); font-weight: 600; border-color: var(--learnt); }
.tokens .x { border: 1px solid currentColor; border-radius: 4px; padding: 0 2px; }
.tokens .i { color: var(--image); border: 1px dashed var(--image); border-radius: 4px; padding: 0 4px; }
.key span { font: 14px ui-monospace, monospace; margin-right: 1rem; }
figure { display: inline-block; margin: 0 .8rem .8rem 0; } figcaption { font-size: .8rem; color: var(--quiet);
  max-width: 14rem; overflow-wrap: anywhere; } img { border-radius: 4px; border: 1px solid var(--line); }
.facts { color: var(--quiet); margin: 0 0 .7rem; } .bad { color: var(--bad); }
"""


@dataclass(frozen=True)
class RecordSample:
    """A record with its tokens, or with the fault for which it has none."""

    record: Record | None
    encoded: Encoded | None
    fault: RecordError | None = None


def page(samples: Sequence[RecordSample], encoder: ConversationEncoder, *, title: str) -> str:
    """The page as HTML text."""
    cards = "\n".join(_card(sample, encoder) for sample in samples)
    key = (
        '<p class="key tokens"><span class="s">supervised</span><span>not supervised</span>'
        '<span class="x">special token</span><span class="i">image</span></p>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" '
        'content="mm_moslora"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><p>Point at a token to see its number in the vocabulary, and its weight where "
        f"records have weights. The model is trained to predict the coloured ones.</p>{key}{cards}</body></html>\n"
    )


def _card(sample: RecordSample, encoder: ConversationEncoder) -> str:
    if sample.fault is not None or sample.record is None or sample.encoded is None:
        return f'<article><h2 class="bad">cannot be used</h2><p>{escape(str(sample.fault))}</p></article>'
    record, encoded = sample.record, sample.encoded
    total, learnt = int(encoded.input_ids.shape[0]), int(encoded.supervised.sum())
    facts = f"{learnt} of {total} tokens are supervised ({learnt / total:.0%})"
    if encoded.dropped_turns:
        facts += f", {encoded.dropped_turns} turns dropped"
    figures = "".join(_figure(record, number) for number in range(encoded.images))
    tokens = "".join(_spans(encoded, encoder))
    return (
        f'<article><h2>{escape(record.id)}</h2><p class="facts">{facts}</p>{figures}<div class="tokens">{tokens}</div>'
        "</article>"
    )


def _figure(record: Record, number: int) -> str:
    name = record.image_names[number]
    try:
        image = record.images[number].rgb()
    except ImageError as error:
        return f'<p class="bad">{escape(str(error))}</p>'
    shown = image.copy()
    shown.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    _draw_boxes(shown, record, number, image.size)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    caption = f"{escape(name.rpartition('/')[2])}, {image.width} x {image.height}"
    alt = escape(f"image {number + 1} of {record.id}", quote=True)
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" width="{shown.width}" height="{shown.height}" alt="{alt}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _draw_boxes(shown: Image.Image, record: Record, number: int, size: tuple[int, int]) -> None:
    """Draw the boxes and points of a picture over its small copy, which had this width and height."""
    if record.objects is None:
        return
    own = tuple(replace(region, image=0) for region in record.objects.regions if region.image == number)
    pen, scales = ImageDraw.Draw(shown), (shown.width / size[0], shown.height / size[1])
    for region in replace(record.objects, regions=own).in_pixels([size], record.where):
        x, y, *corner = (value * scales[index % 2] for index, value in enumerate(region.numbers))
        if corner:
            pen.rectangle((x, y, *corner), outline=BOX, width=2)
        else:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline=BOX, width=2)
        with suppress(ValueError):  # the built-in letters are Latin ones
            pen.text((x + 4, y + 3), region.label, fill=BOX)


def _spans(encoded: Encoded, encoder: ConversationEncoder) -> Iterator[str]:
    """One span per token; the tokens of an image share one."""
    special = {number for number, token in encoder.tokenizer.added_tokens_decoder.items() if token.special}
    ids, flags = encoded.input_ids.tolist(), encoded.supervised.tolist()
    texts = _texts(ids, encoder.tokenizer)
    index = 0
    while index < len(ids):
        number = ids[index]
        image = number == encoder.image_token_id
        most = (encoder.tokens_per_image if image else 0) or len(ids)
        end = index
        while (image or number in special) and end < len(ids) and ids[end] == number and end - index < most:
            end += 1
        if image or end - index > REPEATS:
            what = f"image: {end - index} tokens" if image else f"{escape(texts[index])} x {end - index}"
            yield f'<span class="i" title="{number}">{what}</span>'
            index = end
            continue
        classes = " ".join(["s"] * flags[index] + ["x"] * (number in special))
        attribute = f' class="{classes}"' if classes else ""
        weight = "" if encoded.weights is None or not flags[index] else f", weight {float(encoded.weights[index]):g}"
        yield f'<span{attribute} title="{number}{weight}">{escape(texts[index])}</span>'
        index += 1


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds; part of a character is shown as a dot, the whole character with its last token."""
    texts = []
    start = whole = 0  # the text of tokens before `whole` is out; tokens from `start` on are decoded again as context
    for index in range(len(ids)):
        before = str(tokenizer.decode(ids[start:whole], clean_up_tokenization_spaces=False))
        text = str(tokenizer.decode(ids[start : index + 1], clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd"):
            texts.append("·")
            continue
        texts.append(text[len(before) :])
        start, whole = whole, index + 1
    return texts
