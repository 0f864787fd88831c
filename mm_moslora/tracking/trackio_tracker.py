"""trackio: a local store; open its dashboard with `trackio show --project PROJECT`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.config import TrackConfig
from mm_moslora.tracking.tracker import PROJECT, Ending, SampleAnswer, Tracker, default_name, flat, headline, namespaced


class TrackioTracker(Tracker):
    """One trackio run per run folder, in trackio's own store on this machine; trackio has no tags and notes."""

    name = "trackio"

    def __init__(self, config: TrackConfig) -> None:
        self._config = config
        self._run: Any = None

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None:
        """See `Tracker.start`."""
        import trackio

        self._run = trackio.init(
            project=self._config.project or PROJECT, name=self._config.name or default_name(run_folder),
            group=self._config.group, config=flat(config),
            resume="never" if resume_step is None else "allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        self._run.log({namespaced(name): float(value) for name, value in metrics.items()}, step=step)

    def log_samples(self, title: str, samples: Sequence[SampleAnswer], step: int) -> None:
        """See `Tracker.log_samples`."""
        import pandas
        import trackio

        rows = [
            {"image": None if (picture := sample.small()) is None else trackio.Image(picture), **sample.texts}
            for sample in samples
        ]
        self._run.log({f"samples/{title}": trackio.Table(dataframe=pandas.DataFrame(rows))}, step=step)

    def log_evaluation(self, rows: Sequence[Mapping[str, Any]], *, adapter: str | None, step: int) -> None:
        """See `Tracker.log_evaluation`."""
        self._run.log({**headline(rows), "eval/adapter": adapter or "none"}, step=step)

    def alert(self, title: str, text: str) -> None:
        """See `Tracker.alert`."""
        import trackio

        trackio.alert(title, text)

    def finish(self, *, ending: Ending = "finished") -> None:
        """See `Tracker.finish`."""
        if self._run is not None:
            self._run.finish()
            self._run = None
