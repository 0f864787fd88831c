"""Remarks that prevent misreading a score: why samples failed, what was removed from answers, that all answers are the
same, that answers contain the right word among others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mm_moslora.reporting.verdicts import unread_text
from mm_moslora_eval.scoring.answer_scoring import score_leniently
from mm_moslora_eval.scoring.score_aggregation import together
from mm_moslora_eval.scoring.scored_sample import Scored, with_scores

FEWEST = 5
"""Fewest answers for a remark that they are alike."""
ALIKE = 0.95
"""Share of one answer from which the answers count as the same."""
_APART = 0.2
"""Least difference between an answer's share of the answers and its share of the references."""
_WORDS = 5
"""Most words of a reference for the lenient score; longer references are whole texts."""
_LONGEST = 200
_PARTICULAR = re.compile(r"(?<!\w)'[^']*'|\"[^\"]*\"|\d+|/\S+")


def kind_of(error: str) -> str:
    """An error without what is particular in it: names, numbers, paths."""
    return _PARTICULAR.sub("...", error)


def failures(errors: Sequence[str | None]) -> Iterator[str]:
    """The most common error; errors that differ only in names and numbers count as one."""
    messages = [error for error in errors if error is not None]
    if not messages:
        return
    kinds = Counter(map(kind_of, messages))
    kind, count = kinds.most_common(1)[0]
    example = next(error for error in messages if kind_of(error) == kind)
    most = "all" if count == len(messages) else f"{count} of them"
    yield f"{len(messages)} of {len(errors)} samples failed, {most} with this error: {_short(example)}"


def ungraded(samples: Sequence[Scored], *, left_out: int = 0) -> Iterator[str]:
    """Remarks on answers that a judge could not grade, on those on which the rules failed, and on those with them."""
    graded, faults = len(with_scores(samples)), [sample.fault for sample in samples if sample.fault]
    by_judge = len(samples) - graded - len(faults)
    rest = f" The score is over the other {graded - left_out}." if graded > left_out else ""
    if left_out:
        rest = f" {left_out} more are left out, because they count together with one of these.{rest}"
    if by_judge:
        yield (f"{by_judge} of {len(samples)} answers have no grade, because the judge's replies cannot be read.{rest}")
    if faults:
        yield (
            f"{len(faults)} of {len(samples)} answers have no score, because the extraction, the metric or "
            f"another rule failed on them (the first: {_short(faults[0])}).{rest} Mend it, then score again "
            "(mm-moslora eval score)."
        )


def parted(aggregation: str, samples: Sequence[Scored], selection: Mapping[str, Any]) -> Iterator[str]:
    """A remark on a selection that was not made for an aggregation that counts several answers together."""
    if selection.get("name", "all") == "all" or selection.get("whole_for") == aggregation:
        return
    if len(set(together(aggregation, samples))) < len(samples):
        yield (
            f"The documents ({selection['name']}) were not selected for {aggregation}, which counts several answers "
            "together: where a part of them was not asked, the others may count as right alone, and the score is too "
            "high. Evaluate again in another folder."
        )


def agreement_text(found: Mapping[str, Any]) -> str:
    """How far a judge agrees with graded answers (`judged_scores.check_judge`)."""
    return (
        f"The judge agrees with {found['agreed']} of {found['n']} graded answers of {found['file']} "
        f"({found['share']:.0%}, 95 % {found['low']:.0%} to {found['high']:.0%})"
    )


def beside(about: Mapping[str, Any]) -> Iterator[str]:
    """What stands beside a score: that of the rules where a judge graded, how far the judge is right, what it cost."""
    if ruled := about.get("by_rules"):
        score, low, high = (math.nan if ruled[name] is None else ruled[name] for name in ("score", "low", "high"))
        yield (
            f"{score:.4f} ({low:.4f} to {high:.4f}) without a judge, by the rules {ruled['extraction']} and "
            f"{ruled['metric']}."
        )
    if spent := about.get("tokens"):
        cost = f"; {spent['cost']:.4g} at the given prices" if spent.get("cost") is not None else ""
        yield f"{spent['prompt']:,} tokens in, {spent['completion']:,} out{cost}."
    if found := about.get("judge", {}).get("agreement"):
        yield f"{agreement_text(found)}."


def disagreement(judge: Mapping[str, Any]) -> Iterator[str]:
    """A remark on a judge that agrees with too few graded answers, and on answers that it saw a part of."""
    found = judge.get("agreement")
    if found is not None and found["share"] < found["least"]:
        yield (
            f"{agreement_text(found)}, less than {found['least']:.0%} (--judge-agreement): its grades do not measure "
            "the answers. Ask another judge."
        )
    if shortened := judge.get("shortened"):
        yield f"{shortened} answers are so long that the judge was shown their beginning and end alone."


def thinking(answered: Sequence[Scored]) -> Iterator[str]:
    """A remark on `<think>` blocks, which are not scored, and on blocks without an end."""
    answers = [sample.visible for sample in answered]
    thought, unclosed = sum(answer.thought for answer in answers), sum(answer.unclosed for answer in answers)
    if thought:
        yield (
            f"{thought} of {len(answers)} answers contain <think> blocks, which were removed before scoring; "
            f"{unclosed} of these blocks have no end, so these answers cannot be read"
            + ("; more may end with a larger --max-new-tokens." if unclosed else ".")
        )


def answers_alike(answered: Sequence[Scored]) -> Iterator[str]:
    """Remarks if (nearly) all answers are the same though the references differ, and if many cannot be read."""
    if len(answered) < FEWEST:
        return
    unread = [sample for sample in answered if not sample.parsed.strip()]
    if len(unread) == len(answered):
        commonest, _ = Counter(_plain(sample.text) for sample in unread).most_common(1)[0]
        yield f"None of {len(answered)} answers could be read; the most common is {_short(commonest)!r}."
    elif text := unread_text(len(unread), len(answered)):
        yield (
            f"{text}, such as {_short(unread[0].text)!r}: the score is hardly one of the model. Read them with other "
            "rules (mm-moslora eval score RUN --protocol NAME@PROTOCOL), or ask for a letter alone."
        )
    answers = Counter(_plain(_answer_of(sample)) for sample in answered if _answer_of(sample))
    if not answers:
        return
    commonest, count = answers.most_common(1)[0]
    expected = sum(commonest in map(_plain, sample.document.answers) for sample in answered)
    if count >= ALIKE * len(answered) and count - expected >= _APART * len(answered):
        share = "All" if count == len(answered) else f"{count} of"
        yield (
            f"{share} {len(answered)} answers are {_short(commonest)!r}, the reference answer of {expected}: the "
            "score is that of one answer to every question."
        )


def wordy(answered: Sequence[Scored]) -> Iterator[str]:
    """A remark if many answers contain the right word among others and count as wrong."""
    if len(answered) < FEWEST or not all(
        any(0 < len(answer.split()) <= _WORDS for answer in sample.document.answers) for sample in answered
    ):
        return
    lenient = sum(sample.score for sample in score_leniently(answered)) / len(answered)
    missed = lenient - sum(sample.score for sample in answered) / len(answered)
    if missed >= _APART:
        yield (
            f"{100 * missed:.1f} % of the answers contain the right word among others and count as wrong. With them "
            f"the score is {100 * lenient:.1f} %, so the score also measures the form of the answers."
        )


def _answer_of(sample: Scored) -> str:
    """The model's answer: the extracted one, or the text where a judge read it, whose reply is no answer."""
    return sample.visible.text.strip() if sample.judged else sample.parsed.strip()


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
