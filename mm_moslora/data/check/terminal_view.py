"""Data in the terminal: supervised tokens of records, and reports of checks. All functions return renderables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.segment_encoder import Encoded
from mm_moslora.data.check.check_findings import Finding, findings, length_percentiles
from mm_moslora.data.check.record_check import CheckReport
from mm_moslora.data.images.perceptual_hash import Match

SUPERVISED = "bold green"
SCAFFOLD = "dim"
SPECIAL = "reverse"
IMAGE = "magenta"
_BAR = 40
REPEATS = 3
"""Equal special tokens in a row above which they are counted: the visual tokens of a video."""
SHOWN = 20
"""Default number of faults, repeated ids and pairs of pictures shown."""


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
    return Panel(Group(head, text), title=escape(f"{record.id}: {share}{dropped}"), title_align="left")


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
    table = Table(title=escape("Data: " + ", ".join(report.sources)), title_justify="left", show_header=False)
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
