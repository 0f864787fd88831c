"""MLflow: logs to `MLFLOW_TRACKING_URI`, or to a database in the run folder. View it with
`mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.config import TrackConfig
from mm_moslora.tracking.tracker import (  # fmt: skip
    PROJECT,
    Ending,
    SampleAnswer,
    Tracker,
    adapter_digest,
    chosen,
    default_name,
    flat,
    headline,
    namespaced,
)
from mm_moslora.utils.files import replace_text
from mm_moslora.utils.untrusted_files import read_text_below

ID_FILE = "mlflow_id.txt"
_LONGEST_VALUE = 500
"""Maximum characters of a parameter."""
_MOST_PARAMS = 100
"""Maximum parameters in a request."""
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}  # fmt: skip
"""Defaults of this process: the ranks wait while a server does not answer."""


class MlflowTracker(Tracker):
    """One MLflow run per run folder."""

    name = "mlflow"

    def __init__(self, config: TrackConfig) -> None:
        self._config = config
        self._client: Any = None
        self._run = ""
        self._until = -1
        self._logged_steps: dict[str, set[int]] = {}

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None:
        """See `Tracker.start`. A resumed run continues the same MLflow run."""
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_folder.resolve() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        run_id = None if resume_step is None else read_text_below(run_folder, ID_FILE)
        if run_id is not None:
            self._run = run_id.strip()
            self._client.update_run(self._run, status="RUNNING")
            self._until = max(self._steps_of(namespaced("loss")), default=-1)
            return
        project = chosen(self._config.project, "MLFLOW_EXPERIMENT_NAME", "track.project") or PROJECT
        existing = self._client.get_experiment_by_name(project)
        artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else (run_folder / "mlflow").resolve().as_uri()
        experiment = existing.experiment_id if existing else self._client.create_experiment(project, artifacts)
        name = self._config.name or default_name(run_folder)
        self._run = self._client.create_run(experiment, run_name=name).info.run_id
        for key, value in self._tags().items():
            self._client.set_tag(self._run, key, value)
        replace_text(run_folder / ID_FILE, self._run + "\n")
        params = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in flat(config).items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run, params=params[first : first + _MOST_PARAMS])

    def _tags(self) -> dict[str, str]:
        config = self._config
        tags = {"mlflow.note.content": config.notes, "group": config.group, "job_type": config.job_type}
        return {key: value for key, value in tags.items() if value} | {f"tag.{tag}": "yes" for tag in config.tags}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`. What a killed run logged after its last checkpoint is kept, and not logged again."""
        from mlflow.entities import Metric

        now, values = int(time.time() * 1000), {namespaced(name): float(value) for name, value in metrics.items()}
        if step <= self._until:
            values = {name: value for name, value in values.items() if step not in self._steps_of(name)}
        if values:  # one transaction or request for all
            self._client.log_batch(
                self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()]
            )

    def _steps_of(self, name: str) -> set[int]:
        """Steps of a metric that the run had before it was continued."""
        if name not in self._logged_steps:
            self._logged_steps[name] = {metric.step for metric in self._client.get_metric_history(self._run, name)}
        return self._logged_steps[name]

    def log_samples(self, title: str, samples: Sequence[SampleAnswer], step: int) -> None:
        """See `Tracker.log_samples`."""
        rows = []
        for index, sample in enumerate(samples):
            picture, small = None, sample.small()
            if small is not None:
                picture = f"samples/{title}/{step}/{index}.png"
                self._client.log_image(self._run, small, artifact_file=picture)
            rows.append({"image": picture, **sample.texts})
        self._client.log_dict(self._run, {"step": step, "samples": rows}, f"samples/{title}/{step}.json")

    def log_folder(self, title: str, folder: Path, *, aliases: Sequence[str]) -> None:
        """See `Tracker.log_folder`."""
        self._client.log_artifacts(self._run, str(folder), f"{title}/{aliases[0] if aliases else 'latest'}")
        digest = adapter_digest(folder)
        if digest is not None:
            self._client.set_tag(self._run, f"{title}.sha256", digest)

    def log_evaluation(self, rows: Sequence[Mapping[str, Any]], *, adapter: str | None, step: int) -> None:
        """See `Tracker.log_evaluation`."""
        for name, score in headline(rows).items():
            self._client.log_metric(self._run, name, score, step=step)
        scores = {"adapter": adapter, "step": step, "rows": list(rows)}
        self._client.log_dict(self._run, scores, f"evaluation/step-{step}.json")

    def alert(self, title: str, text: str) -> None:
        """See `Tracker.alert`."""
        self._client.set_tag(self._run, f"alert.{title.lower().replace(' ', '_')}", text)

    def finish(self, *, ending: Ending = "finished") -> None:
        """See `Tracker.finish`; MLflow's status of a stopped run is KILLED."""
        if self._run:
            self._client.set_terminated(self._run, {"stopped": "KILLED"}.get(ending, ending.upper()))
            self._run = ""
