"""The files of a run folder for its report, and a reader for complete and incomplete folders.

Every file is optional. `RunData.notes` names each missing or damaged one, and the report shows the note in its place.
Secrets are removed here, so that no report shows one.

    summary.json       see below
    config.yaml        the resolved recipe
    metrics.jsonl      {"step", "time", "loss", "lr/<group>", "tokens_per_second", "validation_loss", ...} per line
    evaluation.json    [{"name", "label", "task", "n", "mean", "low", "high",
                         "categories": {name: {"n", "mean", "low", "high"}}, "protocol", "subject", "remarks",
                         "not_inferable", "failed", "learned_from", "pictures",
                         "less": {"value", "low", "high", "groups", "unit"}, "unit"}];
                       shares of right answers between 0 and 1, or with `unit` a score of that name, such as CIDEr;
                       95 % intervals; `less` is the tuned model less this row, question by
                       question. Names with a meaning: those of verdicts.AGAINST, and tuned. Rows of unlike
                       `subject` (task, protocol, documents) are never compared
    forgetting.json    [{"what", "before", "after", "difference": as `less` above}], a general text and the tasks of
                       `validate.tasks` at the end less before the first step
    samples.json       [{"image": path below the run folder, "question", "options": {letter: text}, "answer", "before",
                         "after", "before_correct", "after_correct"}]
    mixers.json        [{"path", "rank", "before": [[..]], "after": [[..]], "pairs": [[..]], and those of
                         lens_maps.MEASURES that are known}], the adapted modules
    environment.json   {fact: value} where the summary has no `environment`
    quarantine.jsonl   one line per record that could not be used, with its "reason"
    state.json         {"state": running, finished, stopped or failed, "reason", "ranks": those to blame, "process",
                       "host", "since", "ended"}
    heartbeat/         rank-00000.json per rank, see mm_moslora.launch.heartbeat
    alerts.jsonl       {"time", "title", "text"} per line

summary.json, every key optional: `format` (version of this layout; missing before there were versions), `name`,
`title`, `description`, `steps`, `total_steps`, `counters` {"seconds" (of steps), "wall_seconds" (all in all), "tokens",
"images", "samples", "supervised_tokens", "skipped"}, `precision`, `world_size`, `zero`, `components` [{"name", "total",
"trainable"}] (parameters), `parts` {component: what it is}, `base` {"language", "vision"}, `tokens_per_image`,
`memory_gib`, `seconds` (the whole run), `hardware`, `date`, `data` {fact: value}, `environment` {package: version},
`licences` {part: licence}, `commands` [{"what", "command"}].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mm_moslora.reporting.lens_maps import MEASURES
from mm_moslora.reporting.run_status import RunState, read_state
from mm_moslora.reporting.verdicts import Difference, difference_of
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.redaction import redact, redact_text
from mm_moslora.utils.untrusted_data import LARGEST, build_known, parse_json, parse_lines, parse_yaml_value, read_value
from mm_moslora.utils.untrusted_files import FileError, read_text_below


@dataclass(frozen=True, kw_only=True)
class Score:
    """A share of right answers, or another named score, with its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One system on one task."""

    name: str
    label: str
    task: str
    score: Score
    categories: dict[str, Score]
    protocol: str = ""
    subject: str = ""
    """Identifies task, protocol and documents; empty where it is unknown."""
    selection: str = "all"
    """Selected documents of the data: all, `first 5`, `3 chosen`."""
    remarks: tuple[str, ...] = ()
    """Caveats of the score."""
    not_inferable: int = 0
    """Answers that could not be read."""
    failed: int = 0
    """Questions without an answer."""
    learned_from: str = ""
    """For answers without a model: the data that they were learned from."""
    less: Difference | None = None
    """The tuned model minus this row, question by question; None where it is unknown."""
    pictures: bool = True
    """For the tuned model: whether its questions show pictures."""
    unit: str = ""
    """Name of the score; empty for a share of right answers."""

    @property
    def measured_on(self) -> tuple[Any, ...]:
        """Rows with different values are never compared."""
        return (self.task, self.protocol, self.subject or self.score.n, self.unit)


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One held-out question with the answers before and after tuning."""

    image: str | None = None
    question: str = ""
    answer: str = ""
    before: str | None = None
    after: str | None = None
    before_correct: bool | None = None
    after_correct: bool | None = None
    options: dict[str, str] = field(default_factory=dict)
    """Options of a multiple-choice question by letter."""


@dataclass(frozen=True, kw_only=True)
class MixerRecord:
    """Measures of one adapted module, and its matrices where they were stored."""

    path: str
    rank: int | None
    before: list[list[float]] | None
    after: list[list[float]] | None
    pairs: list[list[float]] | None
    """Energies by pairs of directions of B and A."""
    figures: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ForgettingRow:
    """A text or a task before the first step and at the end."""

    what: str
    before: float
    after: float
    difference: Difference
    """After minus before, document by document."""


def _score(item: Mapping[str, Any], source: str) -> Score:
    values = {"n": 0, "low": item.get("mean"), "high": item.get("mean"), **item}
    return build_known(Score, values, source=source)


def evaluation_row(item: dict[str, Any]) -> EvaluationRow:
    """A row of `evaluation.json`; an error where it is damaged."""
    name = str(item.get("name", "?"))
    categories = {key: _score(value, f"it, in {key},") for key, value in (item.get("categories") or {}).items()}
    values = {"name": name, "label": name.replace("_", " "), "task": ""} | {k: v for k, v in item.items() if v}
    values |= {"score": _score(item, "it"), "categories": categories, "less": difference_of(item.get("less"))}
    return build_known(EvaluationRow, values | {"pictures": item.get("pictures") is not False}, source="it")


def _sample_row(item: dict[str, Any]) -> SampleRow:
    return build_known(SampleRow, item, source="it")


def _forgetting_row(item: dict[str, Any]) -> ForgettingRow:
    if (difference := difference_of(item.get("difference"))) is None:
        raise ConfigError("`difference` is missing or damaged")
    return build_known(ForgettingRow, {"what": "", **item, "difference": difference}, source="it")


def _mixer(item: dict[str, Any]) -> MixerRecord:
    before, after, pairs = (_matrix(item.get(name)) for name in ("before", "after", "pairs"))
    figures = {name: float(item[name]) for name in MEASURES if _is_finite(item.get(name))}
    rank = item.get("rank")
    if not isinstance(rank, int):
        rank = len(after) if after else None
    return MixerRecord(
        path=str(item.get("path", "?")), rank=rank, before=before, after=after, pairs=pairs, figures=figures
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _matrix(value: Any) -> list[list[float]] | None:
    if value is None:
        return None
    rows = [[float(cell) for cell in row] for row in value]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("rows of different length, expected a matrix")
    if not all(_is_finite(cell) for row in rows for cell in row):
        raise ValueError("holds values that are not finite")
    return rows


Row = TypeVar("Row")
_KINDS: dict[str, Any] = {
    "steps": int, "total_steps": int, "counters": dict[str, float], "world_size": int, "memory_gib": float,
    "seconds": float, "parts": dict[str, Any], "base": dict[str, Any], "commands": list[dict[str, Any]],
}  # fmt: skip
"""Types of the keys of a summary that are more than shown."""
MARKS = ("state.json", "summary.json", "metrics.jsonl", "evaluation.json", "samples.json")
"""A run has at least one of these files."""
FORMAT = 1
"""Version of the layout above; newer ones are refused."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of the model, with its numbers of parameters."""

    name: str = ""
    total: int = 0
    trainable: int = 0


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a report shows of one run folder, read and checked."""

    folder: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]] | None
    """Records of `metrics.jsonl`; None: there is no such file."""
    config: str | None
    """The resolved recipe."""
    evaluation: list[EvaluationRow]
    samples: list[SampleRow]
    mixers: list[MixerRecord]
    forgetting: list[ForgettingRow]
    quarantine: dict[str, int]
    """Number of unusable records by reason."""
    state: RunState
    alerts: list[str]
    """Alerts sent to the trackers, in order."""
    notes: list[str] = field(default_factory=list)
    """Notes about files that could not be read, shown in the report."""


def load_run(folder: Path) -> RunData:
    """Read a run folder, complete or not."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; expected a run folder, such as the train.output of a recipe.")
    notes: list[str] = []
    summary = _mapping(_read_json(folder / "summary.json", notes), "summary.json", notes)
    version = summary.get("format", None if summary else FORMAT)
    if not isinstance(version, int) or version > FORMAT:
        raise ConfigError(
            f"{folder / 'summary.json'} has run format {version!r}, this release reads up to {FORMAT}. A newer "
            "release wrote it: update mm-moslora."
        )
    if "environment" not in summary:  # trackers write this file at the start; the run's own summary comes later
        file = folder / "environment.json"
        summary |= {"environment": _mapping(_read_json(file, notes), file.name, notes) or None}
    has_metrics = (folder / "metrics.jsonl").is_file()
    data = RunData(
        folder=folder,
        summary={key: value for key, value in summary.items() if value is not None},
        metrics=_metrics(folder / "metrics.jsonl", notes) if has_metrics else None,
        config=recipe_text(folder / "config.yaml", notes),
        evaluation=_rows(folder / "evaluation.json", notes, evaluation_row),
        samples=_rows(folder / "samples.json", notes, _sample_row),
        mixers=_rows(folder / "mixers.json", notes, _mixer),
        forgetting=_rows(folder / "forgetting.json", notes, _forgetting_row),
        quarantine=_quarantine(folder, notes),
        state=read_state(folder),
        alerts=_alerts(folder, notes),
        notes=notes,
    )
    has_state = (folder / "state.json").is_file()  # the only file of a run that failed before its first step
    if not (data.summary or has_metrics or has_state or data.evaluation or data.samples or data.mixers or notes):
        raise ConfigError(
            f"{folder} holds none of summary.json, metrics.jsonl, evaluation.json, samples.json or mixers.json. "
            f"{_which(folder)}"
        )
    return data


def is_run(folder: Path) -> bool:
    """Whether a folder holds files of a run, whatever its name."""
    return any((folder / mark).is_file() for mark in MARKS)


def _which(folder: Path) -> str:
    """Advice for a folder that is not a run."""
    with suppress(OSError):
        below = sorted(child for child in folder.iterdir() if is_run(child))
        if below:
            return f"It contains runs: give one or several of {', '.join(str(path) for path in below[:6])}."
    return "Give the run folder itself, not a checkpoint or its parent."


def recipe_text(path: Path, notes: list[str]) -> str | None:
    """A recipe as YAML without its secrets, read by `_text_of`."""
    text = _text_of(path, notes)
    if text is None:
        return None
    with suppress(ConfigError):  # text that is not YAML is kept as plain text
        recipe = parse_yaml_value(text)
        clean = redact(recipe, keep_hashes=True)
        if clean != recipe:
            text = yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)
    return redact_text(text, keep_hashes=True)


def _text_of(path: Path, notes: list[str]) -> str | None:
    """The content of a file of a run folder; None where it is missing or must not be read."""
    try:
        return read_text_below(path.parent, path.name, errors="replace")
    except FileError as error:
        notes.append(f"{path.name} was not read ({error.what}).")
        return None


def _read_json(path: Path, notes: list[str]) -> Any:
    try:
        text = read_text_below(path.parent, path.name)
        return None if text is None else redact(parse_json(text, constants=True), keep_hashes=True)
    except ValueError as error:
        notes.append(f"{path.name} could not be read: it {error}.")
        return None


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    return parse_lines(_text_of(path, notes) or "", skip_damaged=True)


def _metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The numbers of each line; other values are left out."""
    records = [
        {key: value for key, value in record.items() if value is None or isinstance(value, int | float)}
        for record in _read_lines(path, notes)
    ]
    shown = {name: redact_text(name, keep_hashes=True) for name in {name for record in records for name in record}}
    return [{shown[name]: value for name, value in record.items()} for record in records]


def _mapping(value: Any, what: str, notes: list[str]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        notes.append(f"{what} holds {type(value).__name__}, expected an object.")
        return {}
    return _fitting(value, what, notes)


def _fitting(value: Mapping[str, Any], what: str, notes: list[str]) -> dict[str, Any]:
    """The keys of a summary or an environment whose values have the types of `_KINDS`; the rest is left out."""
    fitting = {}
    for key, item in value.items():
        try:
            if key == "components":
                item = [vars(build_known(Component, part, source=what)) for part in item or ()]
            fitting[key] = item if item is None else read_value(_KINDS.get(key, Any), item, source=what, where=key)
        except (ConfigError, TypeError, AttributeError) as error:
            notes.append(f"{error} It was left out.")
    return fitting


def _rows(path: Path, notes: list[str], read: Callable[[dict[str, Any]], Row]) -> list[Row]:
    """The rows of a file that `read` can read; damaged ones are left out, with a note."""
    value = _read_json(path, notes)
    if value is None:
        return []
    if not isinstance(value, list):
        notes.append(f"{path.name} holds {type(value).__name__}, expected a list.")
        return []
    items = [item for item in value if isinstance(item, dict)]
    if len(items) < len(value):
        notes.append(f"{path.name}: {len(value) - len(items)} entries are not objects and were left out.")
    rows = []
    for item in items:
        try:
            rows.append(read(item))
        except (AttributeError, TypeError, ValueError) as error:
            name = next((str(item[key]) for key in ("name", "path", "what", "question") if key in item), "?")
            notes.append(f"{path.name}: {name[:80]!r} was left out ({error}).")
    return rows


def _quarantine(folder: Path, notes: list[str]) -> dict[str, int]:
    reasons = Counter(
        redact_text(str(record.get("reason", "no reason given")), keep_hashes=True)
        for record in _read_lines(folder / "quarantine.jsonl", notes)
    )
    return dict(reasons.most_common())


def _alerts(folder: Path, notes: list[str]) -> list[str]:
    records = _read_lines(folder / "alerts.jsonl", notes)
    return [redact_text(f"{record.get('title', 'Alert')}: {record.get('text', '')}") for record in records]
