"""Rules for conclusions from results, and their wording, for reports, comparisons and the command line.

Rules:

- A difference is shown when its 95 % interval excludes zero and it rests on at least `FEWEST` independent pictures or
  questions. Otherwise it is "not shown", which does not claim equality.
- A model looks at the picture when its own pictures score above the plain picture and above another item's picture.
- Tuning helped when the model looks at the picture, scores above the answers that need no model, and above the model
  before tuning. For the model before tuning, every answer that contains the right word counts as right.
- Two arms are compared only where at least one of them is above its controls. Where their questions show pictures, and
  blind and wrong pictures were not measured, the conclusion is about their answers only.

Each conclusion needs several conditions at once, so none needs a correction for the number of tests (Berger 1982).
Intervals come from `mm_moslora_eval.scoring.measured_scores` and `mm_moslora.compare.seed_statistics`. Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_data import build_known

Mood = Literal["good", "mixed", "bad"]
Shown = Literal["more", "less", "not shown"]

FEWEST = 10
"""Minimum of independent pictures or questions for a conclusion; below it, t-intervals of binary scores are off."""
SIGNIFICANT = 0.05
UNREAD = 0.1
"""Share of answers that cannot be read above which a score says so."""
LIKELIHOOD = "log-likelihood per token"
"""Name of the score of a general text, in nats."""
PICTURE_CONTROLS = ("wrong_image", "blind")
FLOORS = ("majority", "best_answer")
AGAINST = {
    "untuned_lenient": "the model before tuning, with every answer that contains the right word counted as right",
    "untuned": "the model before tuning",
    "wrong_image": "another item's picture",
    "blind": "a plain picture of the mean colour",
    "majority": "always the most frequent answer",
    "best_answer": "the most frequent answer to each question",
}
"""Baselines of a tuned model, by their names in `evaluation.json`."""


def unread_text(unread: int, answers: int) -> str:
    """What to say of a score with so many answers that could not be read; empty up to a share of `UNREAD`."""
    if unread <= UNREAD * answers:
        return ""
    return f"{unread} of {answers} answers ({unread / answers:.0%}) could not be read and count as wrong"


def score_text(value: float, unit: str = "", *, named: bool = True) -> str:
    """`82.3 %`, or `CIDEr 0.660` for another named score."""
    if not unit:
        return f"{100 * value:.1f} %"
    return f"{unit} {value:.3f}" if named else f"{value:.3f}"


_Interval = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One system minus another on the same questions."""

    value: float
    low: float
    high: float
    """95 % interval."""
    groups: int | None = None
    """Number of independent pictures or questions; None: unknown."""
    unit: str = ""
    """Name of the score; empty for a share of right answers."""

    @classmethod
    def of_intervals(cls, a: _Interval, b: _Interval, *, groups: int | None, unit: str = "") -> Difference:
        """Two scores (each with low and high) that were not compared by question; wide, for any correlation."""
        return cls(value=a[0] - b[0], low=a[1] - b[2], high=a[2] - b[1], groups=groups, unit=unit)

    @property
    def few(self) -> bool:
        """Whether there are too few questions for a conclusion."""
        return self.groups is not None and self.groups < FEWEST

    @property
    def shown(self) -> Shown:
        """The conclusion from the interval."""
        if self.few or math.isnan(self.low) or self.low <= 0 <= self.high:
            return "not shown"
        return "more" if self.low > 0 else "less"

    @property
    def points(self) -> str:
        """`+6.7 points (95 % -1.2 to +14.6)`, or `CIDEr +0.590 (95 % +0.480 to +0.700)`."""
        value, low, high = (
            f"{number:+.3f}" if self.unit else f"{100 * number:+.1f}" for number in (self.value, self.low, self.high)
        )
        text = f"{self.unit} {value}" if self.unit else f"{value} points"
        return f"{text} (no interval)" if math.isnan(self.low) else f"{text} (95 % {low} to {high})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        numbers = {"value": self.value, "low": self.low, "high": self.high, "groups": self.groups}
        return numbers | {"unit": self.unit}


def difference_of(data: Any) -> Difference | None:
    """The inverse of `Difference.to_dict`; None where the value is not a difference."""
    try:
        return build_known(Difference, data, source="a difference")
    except (ConfigError, AttributeError):
        return None


def amount_text(value: float, unit: str = "") -> str:
    """The size of a difference: `4.2 points`, or `CIDEr 0.120`."""
    return score_text(value, unit) if unit else f"{100 * value:.1f} points"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A conclusion with its evidence, and whether it is good news."""

    mood: Mood
    sentences: tuple[str, ...]
    """The conclusion first."""
    uses_pictures: bool
    """Whether the model is shown to look at its pictures."""


def judge_tuning(differences: Mapping[str, Difference], *, pictures: bool = True) -> Judgement:
    """Whether tuning helped, from the tuned model minus each measured baseline, by the keys of `AGAINST`."""
    shown = {name: difference.shown for name, difference in differences.items()}
    before = shown.get("untuned_lenient", shown.get("untuned"))
    missing = [name for name in PICTURE_CONTROLS if name not in shown] if pictures else []
    beaten = all(shown.get(name, "more") == "more" for name in PICTURE_CONTROLS)
    uses_pictures = pictures and beaten and not missing
    above_floors = all(shown.get(name, "more") == "more" for name in FLOORS)
    mood: Mood = "mixed"
    if before == "less":
        mood, conclusion = "bad", "Tuning made the model worse."
    elif beaten and missing:
        conclusion = _missing_controls(missing)
    elif pictures and not uses_pictures:
        conclusion = "It is not shown that the model looks at the picture, so it is not known whether tuning helped."
        if before == "more":
            conclusion += " It may have learned only the form and the frequencies of answers."
    elif not above_floors:
        conclusion = f"{_SEEN[uses_pictures]} is not shown to do better than answers that need no model."
    elif before is None:
        mood = "good" if uses_pictures else "mixed"
        conclusion = f"{_SEEN[uses_pictures]} was not measured before tuning, so it is not known whether tuning helped."
    elif before == "not shown":
        conclusion = f"{_SEEN[uses_pictures]} is not shown to do better than before tuning."
    else:
        mood, conclusion = "good", f"Tuning helped{', and the model looks at the picture' if uses_pictures else ''}."
    compared = [name for name in AGAINST if name in shown and (name, "untuned_lenient" in shown) != ("untuned", True)]
    controls = [name for name in compared if name in (*PICTURE_CONTROLS, *FLOORS)]
    best = min(controls, key=lambda name: differences[name].value) if len(controls) > 1 else None
    compared.sort(key=lambda name: name != best)
    evidence = [against(name, differences[name], best=name == best) for name in compared]
    return Judgement(mood=mood, sentences=(conclusion, *evidence), uses_pictures=uses_pictures)


_SEEN = {True: "The model looks at the picture, but it", False: "The model"}


def _missing_controls(controls: Sequence[str]) -> str:
    words = {"wrong_image": "a wrong picture", "blind": "a plain picture"}
    return (
        f"The model was not measured with {' and '.join(words[name] for name in controls)} (`--modes blind --modes "
        "wrong` of `eval run`), so it is not known whether it looks at the picture, or whether tuning helped."
    )


def against(name: str, difference: Difference, *, best: bool = False) -> str:
    """One comparison of a tuned model as a sentence."""
    few = f"; {difference.groups} independent questions are too few" if difference.few else ""
    words = {"more": "more", "less": "less", "not shown": f"not shown to be more{few}"}[difference.shown]
    rank = "the best control, " if best else ""
    return f"Against {rank}{AGAINST.get(name, name)}: {difference.points}, {words}."


def own_pictures(difference: Difference, *, control: str) -> str:
    """A model's own pictures against a control, for a table of image modes."""
    words = {"more": "better than", "less": "worse than", "not shown": "not shown to be better than"}[difference.shown]
    return f"With its own pictures the model is {words} with {control}: {difference.points}."


def between(difference: Difference, *, a: str = "A", b: str = "B") -> str:
    """Two systems on the same questions, A minus B."""
    if difference.shown == "more":
        return f"{a} is better than {b}"
    if difference.shown == "less":
        return f"{b} is better than {a}"
    few = f" ({difference.groups} independent questions are too few)" if difference.few else ""
    return f"It is not shown that {a} and {b} differ{few}"


def forgetting_sentence(what: str, difference: Difference) -> str:
    """Whether a model lost something on a text or a task, after minus before."""
    words = {"more": "better than before", "less": "worse than before", "not shown": "no change is shown"}
    few = f" ({difference.groups} documents are too few)" if difference.few else ""
    return f"{what}: {words[difference.shown]}{few}, {difference.points}."


def resting_on(questions: int, pictures: int, groups: int) -> str:
    """On how much an interval rests; `groups`: pictures with equally many questions that would show as much."""
    if pictures == questions:
        return f"The interval rests on {questions} documents."
    uneven = f", which show as much as {groups} with equally many questions" if groups < 0.8 * pictures else ""
    return f"The interval rests on {pictures} picture{'s' * (pictures > 1)} with {questions} questions{uneven}."


OF_ONE_SCORE = (
    "Each interval is of one score. Two that overlap neither show nor exclude a difference; the summary compares "
    "question by question."
)
HOLDS_ZERO = "An interval that contains zero shows no difference. It does not show that there is none."

Verdict = Literal["better", "worse", "not shown", "one seed", "nothing follows"]
UNJUDGED = ("one seed", "nothing follows")
"""Verdicts without a p-value."""


def verdict_of_arms(difference: Difference, p: float, *, runs: bool, stand: bool) -> Verdict:
    """An arm against the reference; `runs`: the variation between runs is known, `stand`: one is above its controls."""
    if not stand:
        return "nothing follows"
    if not runs:
        return "one seed"
    if p < SIGNIFICANT and difference.shown != "not shown":
        return "better" if difference.value > 0 else "worse"
    return "not shown"


def verdict_of_nats(row: Mapping[str, Any]) -> str:
    """Whether an arm makes reference answers more likely than the reference arm does, from a row of `comparisons`."""
    nats = row["nats"]["own"]
    if nats["low"] is None:
        return "error unknown"
    if row["verdict"] in UNJUDGED:
        return str(row["verdict"])
    if not nats["run_degrees"]:
        return "one seed"
    if nats["p_corrected"] < SIGNIFICANT and (nats["low"] > 0 or nats["high"] < 0):
        return "more likely" if nats["difference"] > 0 else "less likely"
    return "not shown"


def arms_sentence(row: Mapping[str, Any]) -> str:
    """A row of `comparisons` of a comparison's `results.json`."""
    seeds = row["seeds"]
    size = f"{row['documents']} documents and {seeds} seed{'s' * (seeds != 1)}"
    subject = f"{row['arm']} against {row['reference']}"
    difference = Difference(value=row["difference"], low=row["low"], high=row["high"], groups=row["groups"])
    numbers = (
        difference.points
        if row["p_corrected"] is None
        else f"{difference.points}, corrected p {row['p_corrected']:.2g}"
    )
    match row["verdict"]:
        case "nothing follows":
            return f"{subject}: no conclusion from {difference.points}, since neither is above its controls."
        case "one seed":
            return (
                f"{subject}: {numbers}, for these documents and this one seed. The interval leaves out the variation "
                "between seeds; run at least 3 (--seeds 3)."
            )
        case "better" | "worse":
            if _looked(row):
                return f"{subject}: {row['verdict']}, {numbers}; {size}."
            return (
                f"{subject}: {row['verdict']} in answers only, {numbers}; {size}. It is not known whether either "
                "looks at the picture."
            )
    if difference.few:
        return f"{subject}: not shown, {numbers}; {difference.groups} independent pictures or questions are too few."
    if not row["stderr"] and not row["difference"]:
        return (
            f"{subject}: not shown, both score the same on all {size}; a true difference of up to "
            f"{100 * difference.high:.1f} points would not have been seen."
        )
    return (
        f"{subject}: not shown, {numbers}; {size} would show a true difference of {100 * row['detectable']:.1f} points "
        "four times out of five."
    )


def mood_of_arms(row: Mapping[str, Any]) -> Mood:
    """Whether a row of `comparisons` is good news; mixed where it is not known whether the arms look."""
    moods: Mapping[str, Mood] = {"better": "good", "worse": "bad"}
    return moods.get(row["verdict"], "mixed") if _looked(row) else "mixed"


def _looked(row: Mapping[str, Any]) -> bool:
    """Whether arms were measured with blind and wrong pictures on all tasks with pictures."""
    return row.get("controls_complete") is True


def above_controls(
    arms: Sequence[Mapping[str, Any]], column: str, *, alone: bool, requested: bool = True
) -> list[tuple[Mood, str]]:
    """Whether the arms of a comparison are above their controls, which all other conclusions require."""
    results = {arm["name"]: arm["controls"][column] for arm in arms if column in arm["controls"]}
    if not results:
        return []
    where = "" if alone else f"{column}: "
    above = [name for name, result in results.items() if result["above"]]
    below = [name for name in results if name not in above]
    names = {row["name"] for result in results.values() for row in result["rows"]}
    parts = [
        *(["answering without the right picture"] if names & set(PICTURE_CONTROLS) else []),
        *(["always giving the most frequent answer"] if names & set(FLOORS) else []),
    ]
    lines: list[tuple[Mood, str]] = []
    if not above:
        text = f"No arm is shown to be above {' and '.join(parts)}, so no arm can be called better."
        lines.append(("mixed", where + text))
    elif below:
        text = f"Above {' and '.join(parts)}: {', '.join(above)}. Not shown to be above: {', '.join(below)}."
        lines.append(("mixed", where + text))
    else:
        lines.append(("good", f"{where}Every arm is above {' and '.join(parts)}."))
    if not all(result["complete"] for result in results.values()):
        why = "a task has fewer than two different pictures" if requested else "--no-controls was given"
        lines.append(("mixed", f"{where}Not every task was measured with blind and wrong pictures ({why}), so it is "
                      "not known whether any arm looks at the picture."))  # fmt: skip
    return lines
