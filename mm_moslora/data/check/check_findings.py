"""Findings of a data check: the common faults of instruction-tuning data, each ok, doubtful or bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mm_moslora.data.check.record_check import CheckReport, Fingerprint, Match, matches

FEW_SUPERVISED = 0.02
"""Below this share of supervised tokens, most of the computation is spent on text that is not learned."""
ONE_ANSWER = 0.5
"""Above this share one short answer gets a warning: a model that always gives it scores this share."""


class Finding(NamedTuple):
    """One property of the data."""

    status: Literal["ok", "warn", "bad"]
    name: str
    detail: str
    remedy: str = ""


def findings(report: CheckReport) -> list[Finding]:
    """The findings about some sources before they are trained on."""
    return [
        _usable(report), _ends(report), _supervision(report), _truncation(report), _thinking(report), _modality(report),
        _keys(report), _tools(report), _special(report),
        _separators(report), _repeats(report), _answers(report), _longest(report),
    ]  # fmt: skip


def leakage(
    train: Mapping[str, Fingerprint | None], held_out: Mapping[str, Fingerprint | None], *, name: str
) -> tuple[Finding, list[Match]]:
    """Whether pictures of the training data occur among held-out ones, as the same file or as a similar picture."""
    hashed = {path: mark for path, mark in train.items() if mark is not None}
    others = {path: mark for path, mark in held_out.items() if mark is not None}
    pairs = matches(hashed, others)
    title = f"leakage into {name}"
    if not pairs:
        return Finding("ok", title, f"none of {len(hashed)} training pictures looks like one of {len(others)}"), []
    detail = f"training pictures that look like held-out ones: {len(pairs)}"
    return Finding("warn", title, detail, "remove them from one of the sets; otherwise scores are too high"), pairs


def repeated_records(train: CheckReport, validation: CheckReport) -> Finding:
    """Whether records of the validation data are trained on, as copies with the same text and pictures."""
    title, count = "records in data.validation", sum(validation.contents.values())
    copies = sum(number for content, number in train.contents.items() if content in validation.contents)
    if not copies:
        return Finding("ok", title, f"no training record is a copy of one of {count}")
    detail = f"training records that are copies of held-out ones: {copies}"
    return Finding("warn", title, detail, "remove them from one of the sets; otherwise the validation loss is too low")


def length_percentiles(report: CheckReport) -> dict[str, int]:
    """Tokens per record: minimum, quartiles, 95th and 99th percentile, maximum."""
    if not report.lengths:
        return {}
    marks = {"least": 0, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "99 %": 99, "most": 100}
    values = np.percentile(np.array(report.lengths), list(marks.values()), method="nearest")
    return dict(zip(marks, map(int, values), strict=True))


def _usable(report: CheckReport) -> Finding:
    bad = report.records - report.usable
    detail = f"{report.usable} of {report.records} can be used"
    if bad:
        share = report.refused / max(1, report.records)
        detail += f", {report.refused} are refused ({share:.2%}, at most {report.max_bad_share:.2%})"
    if report.ok:
        return Finding("warn" if bad else "ok", "records", detail, "see the faults below" if bad else "")
    remedy = "repair them, or raise data.max_bad_share" if report.usable else "repair them"
    return Finding("bad", "records", f"{detail}; a run stops", remedy)


def _ends(report: CheckReport) -> Finding:
    if not report.endless:
        return Finding("ok", "ends of answers", "every answer ends with a supervised end-of-turn token")
    remedy = "a model tuned on them does not stop by itself; use a template with an end of turn"
    return Finding("warn", "ends of answers", f"{report.endless} records have an answer without one", remedy)


def _supervision(report: CheckReport) -> Finding:
    detail = f"{report.supervised_share:.1%} of the tokens are supervised"
    if report.supervised_share >= FEW_SUPERVISED or not report.usable:
        return Finding("ok", "supervision", detail)
    return Finding("warn", "supervision", detail, "put several questions about a picture into one record")


def _truncation(report: CheckReport) -> Finding:
    lost = report.bad.get("TOO_LONG", 0)  # type: ignore[call-overload]
    if not report.truncated and not lost:
        return Finding("ok", "length", f"all fit into {report.max_length} tokens")
    shorter = "are cut off" if report.too_long == "truncate" else "lose turns"
    longer = "left out (data.too_long: drop)" if report.too_long == "drop" else "refused"
    detail = f"over {report.max_length} tokens: {report.truncated} records {shorter}, {lost} are {longer}"
    return Finding("warn", "length", detail, "raise data.max_length, split long records, or set data.too_long")


def _thinking(report: CheckReport) -> Finding:
    form = report.form
    if form is None:
        return Finding("ok", "thinking", "no record was looked at")
    if report.dropped_thoughts:
        detail = f"{form.words}; {report.dropped_thoughts} answers are learned without their thinking"
        remedy = (
            "most chat templates keep only the last answer's thinking; split such records, or set model.thinking: never"
        )
        return Finding("warn", "thinking", detail, remedy)
    return Finding("warn" if form.mixed else "ok", "thinking", form.words, form.remedy if form.mixed else "")


def _keys(report: CheckReport) -> Finding:
    listed = _named(report.ignored)
    detail = f"not read, with the records that have them: {listed}" if listed else "all keys of records are read"
    return Finding("ok", "keys", detail)


def _tools(report: CheckReport) -> Finding:
    if not report.not_offered:
        return Finding("ok", "tools", "every call is of a tool that its record offers")
    detail = f"called and not offered, with the records that do so: {_named(report.not_offered)}"
    return Finding("warn", "tools", detail, "a model learns to call what it was not told of; complete `tools`")


def _named(counts: Counter[str]) -> str:
    """Names with their counts, the most frequent first."""
    listed = ", ".join(f"{ascii(key)[1:-1][:60]} ({count})" for key, count in counts.most_common(12))
    return listed + (f" and {len(counts) - 12} more" if len(counts) > 12 else "")


def _modality(report: CheckReport) -> Finding:
    pictures = report.one_image + report.several_images
    return Finding("ok", "modality", f"{pictures} records with pictures, {report.text_only} without")


def _special(report: CheckReport) -> Finding:
    if not report.special_text:
        return Finding("ok", "special tokens", "no text spells one")
    return Finding("ok", "special tokens", f"{report.special_text} records spell some in their texts; they stay text")


def _separators(report: CheckReport) -> Finding:
    if not report.separator_text:
        return Finding("ok", "separators", "no text spells what the template writes between turns")
    remedy = "labels are correct, but the model sees a change of speaker; reword, or use another template"
    return Finding("warn", "separators", f"{report.separator_text} records spell the template's separators", remedy)


def _repeats(report: CheckReport) -> Finding:
    repeats = sum(report.repeated_ids.values())
    detail = f"{report.duplicates} records are copies of others, {repeats} repeat an id"
    status: Literal["ok", "warn"] = "warn" if report.duplicates or repeats else "ok"
    remedy = "remove them, or set weight to repeat records" if status == "warn" else ""
    return Finding(status, "duplicates", detail, remedy)


def _answers(report: CheckReport) -> Finding:
    if not report.short_answers:
        return Finding("ok", "answers", f"{report.answers}, none of them short")
    text, count = report.short_answers.most_common(1)[0]
    detail = f"{report.answers}, most often {text!a} ({count / max(1, report.answers):.0%})"
    if count < report.answers and (count <= ONE_ANSWER * report.answers or report.answers < SMALL):
        return Finding("ok", "answers", detail)
    return Finding("warn", "answers", detail, "balance the questions, and compare with always giving that answer")


def _longest(report: CheckReport) -> Finding:
    lengths: Sequence[int] = sorted(report.lengths)[-1:]
    longest = lengths[0] if lengths else 0
    mean = report.tokens / max(1, report.usable)
    return Finding("ok", "longest record", f"{longest} tokens, {longest / max(1, mean):.1f} times the average")


SMALL = 50
"""Fewest answers for a finding about their distribution."""
