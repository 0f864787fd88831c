"""Weights & Biases: online with an API key, else offline in the run folder.

The run's id is stored in `RUN/wandb_id.txt`, so a resumed run continues the same wandb run. Upload an offline run
later with `wandb sync RUN/wandb/offline-run-*`.
"""

from __future__ import annotations

import logging
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mm_moslora.config import TrackConfig
from mm_moslora.tracking.tracker import (  # fmt: skip
    PROJECT,
    Ending,
    SampleAnswer,
    Tracker,
    adapter_digest,
    chosen,
    default_name,
    headline,
    namespaced,
)
from mm_moslora.utils.errors import ConfigError, ExitStatus
from mm_moslora.utils.files import read_json, replace_text
from mm_moslora.utils.redaction import redact_text, redacted_argv
from mm_moslora.utils.untrusted_files import read_text_below

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id.txt"
INIT_SECONDS = 20.0
"""Seconds that the service may take before the run continues offline (the library's own limit is 90 s)."""
FINISH_SECONDS = 60.0
"""Seconds that the last upload may take; the rest stays on disk for `wandb sync`."""
MAX_SAMPLES = 200
"""Maximum rows of a sample table."""
STEP = "train/step"


def has_credentials() -> bool:
    """Whether wandb can log in without a prompt: a key in the environment, an identity token, or a login file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for candidate in candidates:
        path = Path(candidate or "").expanduser()
        if candidate and path.is_file():
            try:
                return netrc.netrc(str(path)).authenticators(host) is not None
            except (OSError, netrc.NetrcParseError):
                return False
    return False


def refuse_workspace_settings() -> None:
    """Refuse settings of wandb in the working folder, which could send the user's key elsewhere."""
    # wandb reads them first, and has no setting that leaves them out.
    for file in (Path(name).absolute() / "settings" for name in ("wandb", ".wandb")):
        if os.path.lexists(file):
            raise ConfigError(
                f"{file} would decide where wandb sends your key and your run: whoever owns the working folder may "
                "have written it. Delete it, and set WANDB_BASE_URL, WANDB_ENTITY or WANDB_MODE instead."
            )


class WandbTracker(Tracker):
    """One wandb run per run folder."""

    name = "wandb"

    def __init__(self, config: TrackConfig) -> None:
        self._config = config
        self._run: Any = None
        self._online = False

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None:
        """See `Tracker.start`. Without a key, or when the service does not answer in time, the run is offline."""
        refuse_workspace_settings()
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if has_credentials() else "offline")
        earlier = "" if resume_step is None else (read_text_below(run_folder, ID_FILE) or "").strip()
        of_sweep = os.environ.get("WANDB_RUN_ID", "")  # a sweep's agent sets the id of the trial
        run_id = earlier or of_sweep or uuid.uuid4().hex[:12]
        try:
            self._run = self._init(mode, run_id, run_folder, config, resumed=bool(earlier or of_sweep))
        except Exception as error:
            if mode in ("offline", "disabled"):
                raise
            logger.warning(
                "wandb did not answer (%s); metrics go to %s/wandb, upload them later with `wandb sync`.",
                redact_text(str(error)).splitlines()[0][:200], run_folder,
            )  # fmt: skip
            wandb.teardown()  # the failed attempt still holds the id
            self._run = self._init("offline", run_id, run_folder, config, resumed=bool(earlier or of_sweep))
        replace_text(run_folder / ID_FILE, run_id + "\n")
        self._online = not self._run.offline
        # The step is a metric of the run: wandb drops records with a decreasing built-in step, as after a resume.
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def _init(self, mode: str, run_id: str, folder: Path, config: Mapping[str, Any], *, resumed: bool) -> Any:
        if mode != "online":
            # An offline client still sends telemetry to the service, and waits 10 s at exit without an answer.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        refuse_workspace_settings()
        import wandb

        with redacted_argv():  # wandb records the command line and has no setting to prevent that
            return wandb.init(
                **self._named(folder),
                id=run_id,
                # An offline run cannot ask the service; its parts are joined by id when they are uploaded.
                resume=None if mode != "online" else ("allow" if resumed else "never"),
                mode=mode,  # type: ignore[arg-type]
                dir=str(folder),
                config=dict(config),
                reinit="create_new",
                settings=_settings(),
            )

    def _named(self, folder: Path) -> dict[str, Any]:
        """The recipe's value, else wandb's environment variables, else a default from the folder."""
        config = self._config
        defaults = {"project": PROJECT, "name": default_name(folder)}
        names: dict[str, Any] = {
            name: chosen(getattr(config, name), f"WANDB_{variable}", f"track.{name}") or defaults.get(name)
            for name, variable in (
                ("project", "PROJECT"), ("entity", "ENTITY"), ("name", "NAME"), ("group", "RUN_GROUP"),
                ("job_type", "JOB_TYPE"), ("notes", "NOTES"),
            )
        }  # fmt: skip
        tags = chosen(",".join(config.tags), "WANDB_TAGS", "track.tags") or ""
        return names | {"tags": [tag.strip() for tag in tags.split(",") if tag.strip()]}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        self._run.log({STEP: step, **{namespaced(name): float(value) for name, value in metrics.items()}})

    def log_samples(self, title: str, samples: Sequence[SampleAnswer], step: int) -> None:
        """See `Tracker.log_samples`."""
        import wandb

        table = wandb.Table(columns=["image", "question", "expected", "prediction", "correct"])  # type: ignore[no-untyped-call]
        for sample in samples[:MAX_SAMPLES]:
            small = sample.small()
            image = None if small is None else wandb.Image(small)
            table.add_data(image, *sample.texts.values())  # type: ignore[no-untyped-call]
        if len(samples) > MAX_SAMPLES:
            logger.info("wandb: the first %d of %d samples are logged.", MAX_SAMPLES, len(samples))
        self._run.log({STEP: step, namespaced(title if "/" in title else f"eval/{title}"): table})

    def log_evaluation(self, rows: Sequence[Mapping[str, Any]], *, adapter: str | None, step: int) -> None:
        """See `Tracker.log_evaluation`: a table, and an artifact with the adapter in its lineage."""
        import wandb

        columns: list[str | int] = ["task", "system", "n", "mean", "low", "high"]
        keys = ("task", "label", "n", "mean", "low", "high")
        table = wandb.Table(columns=columns, data=[[row.get(key) for key in keys] for row in rows])  # type: ignore[no-untyped-call]
        if self._online and adapter is not None:
            self._run.use_artifact(f"adapter:{_alias(adapter)}")  # needs the service; the digest is recorded either way
        artifact = wandb.Artifact(
            name=f"evaluation-{self._run.id}", type="evaluation", metadata={"adapter": adapter, "step": step}
        )
        artifact.add(table, "scores")
        self._run.log_artifact(artifact)
        scores = headline(rows)
        self._run.log({STEP: step, "eval/scores": table, **scores})
        self._run.summary.update(scores | {"eval/adapter": adapter})

    def alert(self, title: str, text: str) -> None:
        """See `Tracker.alert`."""
        self._run.alert(title=title, text=text, level="WARN", wait_duration=600)

    def log_folder(self, title: str, folder: Path, *, aliases: Sequence[str]) -> None:
        """See `Tracker.log_folder`; the folder becomes an artifact of type `adapter`."""
        import wandb

        metadata = {}
        manifest = folder / "adapter_config.json"
        if manifest.is_file():
            metadata = read_json(manifest)
        digest = adapter_digest(folder)
        if digest is not None:
            metadata["sha256"] = digest
            aliases = [*aliases, _alias(digest)]
        artifact = wandb.Artifact(name=title, type="adapter", metadata=metadata)
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, *, ending: Ending = "finished") -> None:
        """See `Tracker.finish`; a stopped run becomes wandb's `preempted`."""
        if self._run is not None:
            if ending == "stopped":
                self._run.mark_preempting()
            self._run.finish(exit_code={"finished": 0, "stopped": ExitStatus.STOPPED}.get(ending, 1))
            self._run = None


def _alias(digest: str) -> str:
    """The alias of an adapter's version, from its weights."""
    return f"sha256-{digest[:12]}"


def _settings() -> Any:
    import wandb

    wanted: dict[str, Any] = {
        "init_timeout": INIT_SECONDS,
        "login_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "console": "off",  # wandb leaves progress bars alone, and printed text stays on this machine
        "silent": True,
        "disable_git": True,  # a remote's URL may hold a password; the commit is in the configuration
    }
    fields = wandb.Settings.model_fields  # older versions lack `finish_timeout` and refuse unknown settings
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in fields})
