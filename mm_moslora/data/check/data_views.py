"""Views of the data: tokens of records and reports of checks for the terminal, and a page of samples, one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape

from PIL import Image, ImageDraw
from rich.console import Group, RenderableType
from rich.markup import escape as escape_markup
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, Encoded
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.check.check_findings import Finding, findings, length_percentiles
from mm_moslora.data.check.record_check import CheckReport, Match
from mm_moslora.data.images.record_picture import ImageError
from mm_moslora.data.record_faults import RecordError

SUPERVISED = "bold green"
SCAFFOLD = "dim"
SPECIAL = "reverse"
IMAGE = "magenta"
_BAR = 40
REPEATS = 3
"""Equal special tokens in a row above which they are counted: the visual tokens of a video."""
SHOWN = 20
"""Default number of faults, repeated ids and pairs of pictures shown."""
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


def view_record(record: Record, encoded: Encoded, encoder: ConversationEncoder) -> RenderableType:
    """One record with its tokens as they are trained on."""
    supervised, tokens = int(encoded.supervised.sum()), int(encoded.input_ids.shape[0])
    share = f"{supervised} of {tokens} tokens supervised ({supervised / tokens:.0%})"
    if encoded.weights is not None:
        weights = encoded.weights[encoded.supervised].unique().tolist()
        share += f", weights {', '.join(f'{weight:g}' for weight in weights)}"
    dropped = f", {encoded.dropped_turns} turns dropped" if encoded.dropped_turns else ""
    names = record.image_names
    text = view_tokens(encoded, encoder.tokenizer, image_token_id=encoder.image_token_id)
    head = Text("\n".join(names) + "\n", style="italic") if names else Text("")
    return Panel(Group(head, text), title=escape_markup(f"{record.id}: {share}{dropped}"), title_align="left")


def legend() -> Text:
    """Legend of the colours."""
    return Text.assemble(
        ("supervised", SUPERVISED), "  ", ("not supervised", SCAFFOLD), "  ", ("special token", SPECIAL), "  ",
        ("image", IMAGE),
    )  # fmt: skip


def view_tokens(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, image_token_id: int | None = None) -> Text:
    """Token ids as text: supervised ones coloured, special tokens reversed, image blocks counted."""
    text = Text()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for ids, supervised in _runs(encoded.input_ids.tolist(), encoded.supervised.tolist(), special):
        style = SUPERVISED if supervised else SCAFFOLD
        if ids[0] == image_token_id:
            text.append(f"[image: {len(ids)} tokens]", IMAGE)
        elif ids[0] in special and len(ids) > REPEATS:
            text.append(f"{tokenizer.decode(ids[:1])} x {len(ids)}", f"{style} {SPECIAL}")
        elif ids[0] in special:
            text.append(str(tokenizer.decode(ids)), f"{style} {SPECIAL}")
        else:
            text.append(str(tokenizer.decode(ids)), style)
    return text


def _runs(ids: Sequence[int], supervised: Sequence[bool], special: set[int]) -> list[tuple[list[int], bool]]:
    """Stretches of equal supervision; special tokens, with their repeats, are separate stretches."""
    runs: list[tuple[list[int], bool]] = []
    for number, flag in zip(ids, supervised, strict=True):
        if runs and runs[-1][1] == flag:
            last = runs[-1][0][-1]
            if number == last or not {number, last} & special:
                runs[-1][0].append(number)
                continue
        runs.append(([number], flag))
    return runs


def view_report(report: CheckReport, *, everything: bool = False) -> list[RenderableType]:
    """A check's report: counts, lengths, findings, the first `SHOWN` faults and repeated ids, or `everything`."""
    most = None if everything else SHOWN
    parts: list[RenderableType] = [_counts(report), _lengths(report), view_findings(findings(report))]
    if report.bad:
        parts.append(_faults(report, most))
    if report.repeated_ids:
        names = ", ".join(ascii(name) for name, _ in report.repeated_ids.most_common(most))
        parts.append(Text(f"{sum(report.repeated_ids.values())} records repeat an id: {names}", style="yellow"))
    bad = report.records - report.usable
    verdict = f"{report.usable} of {report.records} records can be used"
    if report.ok:
        parts.append(Text(f"{verdict}." if not bad else f"{verdict}; a run leaves out {bad}.", style="green"))
    else:
        parts.append(
            Text(f"{verdict}; a run would stop (it accepts {report.max_bad_share:.1%} bad ones).", style="bold red")
        )
    return parts


def view_findings(rows: Sequence[Finding]) -> Table:
    """Findings as a table."""
    colours = {"ok": "green", "warn": "yellow", "bad": "bold red"}
    table = Table(title="Findings", title_justify="left", box=None)
    for name in ("", "check", "found", "remedy"):
        table.add_column(name)
    for item in rows:
        status = Text(item.status, style=colours[item.status])
        table.add_row(status, Text(item.name), Text(item.detail), Text(item.remedy))
    return table


def view_matches(matches: Sequence[Match], *, everything: bool = False) -> Text:
    """Training pictures with the held-out pictures that they look like, one pair per line."""
    lines = [f"{a} is in both" if a == b else f"{a} looks like {b}" for a, b in matches]
    return _listed(lines, None if everything else SHOWN)


def _listed(lines: Sequence[str], most: int | None) -> Text:
    """The first lines, and the number of further lines."""
    left = len(lines) - len(lines[:most])
    return Text("\n".join([*lines[:most], *([f"... and {left} more; --all shows them"] if left else [])]))


def view_statistics(report: CheckReport) -> list[RenderableType]:
    """Statistics of a data set."""
    table = Table(title="Distribution", title_justify="left")
    table.add_column("")
    marks = length_percentiles(report)
    for name in marks:
        table.add_column(name, justify="right")
    table.add_row("tokens per record", *(f"{value:,}" for value in marks.values()))
    turns = ", ".join(f"{number}: {count:,}" for number, count in sorted(report.turns.items())[:12])
    sizes = ", ".join(f"{w} x {h} ({count:,})" for (w, h), count in report.sizes.most_common(8))
    short = ", ".join(f"{text!a} ({count:,})" for text, count in report.short_answers.most_common(8))
    lines = [f"Answers per record: {turns or '-'}", f"Picture sizes: {sizes or '-'}", f"Short answers: {short or '-'}"]
    return [_counts(report), _lengths(report), table, Text("\n".join(lines))]


def _counts(report: CheckReport) -> Table:
    table = Table(title=escape_markup("Data: " + ", ".join(report.sources)), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "records": report.records, "usable": report.usable, "text only": report.text_only,
        "with one image": report.one_image, "with several images": report.several_images,
        "with a video": report.videos, "boxes and points": report.boxes,
        "different image files": len(report.images), "answers": report.answers,
        "answers as context (weight 0)": report.context_answers, "records with weights": report.weighed,
        "records with tools": report.tools, "tokens": report.tokens,
        "supervised tokens": report.supervised_tokens, "cut at the end (too long)": report.truncated,
        "answers with thinking": report.thoughts, "answers with thinking left out": report.dropped_thoughts,
        "spelling special tokens (kept as text)": report.special_text,
        "spelling the template's separators": report.separator_text,
        "repeated ids": sum(report.repeated_ids.values()), "copies of other records": report.duplicates,
    }  # fmt: skip
    for name, value in rows.items():
        table.add_row(name, f"{value:,}")
    table.add_row("supervised share", f"{report.supervised_share:.1%}")
    return table


def _lengths(report: CheckReport) -> Table:
    table = Table(title="Tokens per record", title_justify="left")
    table.add_column("up to", justify="right")
    table.add_column("records", justify="right")
    table.add_column("")
    histogram = report.histogram()
    most = max(1, *(count for _, count in histogram))
    for bound, count in histogram:
        table.add_row(f"{bound:,}", f"{count:,}", "█" * round(_BAR * count / most))
    return table


def _faults(report: CheckReport, most: int | None) -> Group:
    table = Table(title="Records that cannot be used", title_justify="left")
    table.add_column("fault")
    table.add_column("records", justify="right")
    for code, count in report.bad.most_common():
        table.add_row(code.value, f"{count:,}")
    return Group(table, _listed([str(fault) for fault in report.faults], most))


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
