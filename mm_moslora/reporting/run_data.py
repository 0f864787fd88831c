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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mm_moslora.reporting.run_rows import (
    EvaluationRow,
    ForgettingRow,
    MixerRecord,
    SampleRow,
    read_evaluation_row,
    read_mixer,
    read_sample_row,
)
from mm_moslora.reporting.run_status import RunState, read_state
from mm_moslora.reporting.verdicts import difference_of
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.redaction import redact, redact_text
from mm_moslora.utils.untrusted_data import build_known, parse_json, parse_lines, parse_yaml_value, read_value
from mm_moslora.utils.untrusted_files import FileError, read_text_below

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
        evaluation=[r for item in _rows(folder / "evaluation.json", notes) if (r := read_evaluation_row(item, notes))],
        samples=[s for item in _rows(folder / "samples.json", notes) if (s := read_sample_row(item, notes))],
        mixers=[m for item in _rows(folder / "mixers.json", notes) if (m := read_mixer(item, notes))],
        forgetting=_forgetting(folder / "forgetting.json", notes),
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


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    value = _read_json(path, notes)
    if value is None:
        return []
    if not isinstance(value, list):
        notes.append(f"{path.name} holds {type(value).__name__}, expected a list.")
        return []
    rows = [item for item in value if isinstance(item, dict)]
    if len(rows) < len(value):
        notes.append(f"{path.name}: {len(value) - len(rows)} entries are not objects and were left out.")
    return rows


def _forgetting(path: Path, notes: list[str]) -> list[ForgettingRow]:
    found = []
    for item in _rows(path, notes):
        try:
            if (difference := difference_of(item.get("difference"))) is None:
                raise ConfigError("`difference` is missing or damaged")
            row = {"what": "", **item, "difference": difference}
            found.append(build_known(ForgettingRow, row, source="forgetting.json: a row"))
        except (ConfigError, AttributeError) as error:
            notes.append(f"forgetting.json: a row was left out ({error}).")
    return found


def _quarantine(folder: Path, notes: list[str]) -> dict[str, int]:
    reasons = Counter(
        redact_text(str(record.get("reason", "no reason given")), keep_hashes=True)
        for record in _read_lines(folder / "quarantine.jsonl", notes)
    )
    return dict(reasons.most_common())


def _alerts(folder: Path, notes: list[str]) -> list[str]:
    records = _read_lines(folder / "alerts.jsonl", notes)
    return [redact_text(f"{record.get('title', 'Alert')}: {record.get('text', '')}") for record in records]
