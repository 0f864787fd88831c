"""The `mm-moslora` app: exit codes, error output, and the verbs that belong to no group."""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnknownCommandError

from mm_moslora import __version__
from mm_moslora.cli import (
    compare_verb,
    doctor_verb,
    export_verbs,
    init_verb,
    launch_verbs,
    plan_verb,
    serve_verbs,
)
from mm_moslora.cli.data_verbs import data_app
from mm_moslora.cli.evaluation.eval_app import eval_app
from mm_moslora.cli.launch_verbs import load_any_recipe, refuse_early, run_training, show_folders, show_recipe
from mm_moslora.cli.shared_options import Overrides, StopAt, quiet_libraries
from mm_moslora.config import Recipe
from mm_moslora.launch.child_processes import end_with_parent, install_handler, restore_handlers
from mm_moslora.launch.imported_code import imported, without_imports
from mm_moslora.launch.slurm_job import leave_foreign_step
from mm_moslora.utils.errors import ExitStatus, MoSLoRAError
from mm_moslora.utils.files import is_full
from mm_moslora.utils.redaction import RedactingFormatter, redact_text, redacted_traceback
from mm_moslora.utils.run_paths import adapter_folder
from mm_moslora.utils.text_format import whole_number

if TYPE_CHECKING:
    from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe
    from mm_moslora.training.run_driver import TrainResult
    from mm_moslora.training.supervision.stop_signals import StopRequest

_AT_HOME = re.compile(r"^(--[\w.-]+=)~/")
"""Matches `--output=~/runs`: shells expand a `~` only at the start of a word."""
_STDOUT = 1


def _shown_default(value: object) -> str | None:
    """The default that `--help` shows after an option; none for a switch that is off or an empty default."""
    words = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return None if value is None or value is False else words or None


app = App(
    name="mm-moslora",
    version=__version__,
    help="Assemble a vision-language model, tune it with MoSLoRA, measure it, export it.",
    help_epilogue="--import FILE.py, with any verb, also several times: execute a Python file of your own, which adds "
    "metrics, projectors, readers, rewards.",
    suppress_keyboard_interrupt=False,  # `run` handles it
    default_parameter=Parameter(negative_iterable=(), show_default=_shown_default),
)
app.command(data_app)
app.command(eval_app)
for _verb in (
    serve_verbs.chat, serve_verbs.serve, init_verb.init, launch_verbs.launch,
    export_verbs.export, export_verbs.verify, doctor_verb.doctor, compare_verb.compare, plan_verb.plan,
):  # fmt: skip
    app.command(_verb)
app.command(export_verbs.import_model, name="import")
adapters_app = App(name="adapters", help="Look into adapter folders.")
app.command(adapters_app)


def main() -> None:
    """Run this process's command line and exit, with 0 on success only."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line.

    Returns:
        0 on success, an `ExitStatus`, or 129 and 143 on SIGHUP and SIGTERM.
    """
    if arguments and arguments[0].startswith("--local_rank="):  # DeepSpeed's launcher puts LOCAL_RANK there, too
        arguments = arguments[1:]
    if "SLURM_STEP_ID" in os.environ:
        leave_foreign_step()
    arguments = [_AT_HOME.sub(lambda match: f"{match[1]}{Path.home()}/", word) for word in arguments]
    try:
        end_with_parent()
        _set_up_logging()
        arguments, files = without_imports(arguments)
        with _ended_by_signals(), imported(files):
            result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        print(end="", flush=True)  # a full disk or a closed pipe can still be reported here
    except CycloptsError as error:
        return _fail(_usage(error), ExitStatus.USAGE)
    except MoSLoRAError as error:
        return _fail(str(error), ExitStatus.ERROR)
    except OSError as error:
        reader_left = isinstance(error, BrokenPipeError) and _nobody_reads()
        try:  # otherwise the buffered output is written again when the process ends
            print(end="", flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        if reader_left:
            return ExitStatus.NO_READER
        if error.filename is None and not is_full(error):
            raise  # without a path the one-line error would not help
        hidden = _hidden_by(error)
        return _fail(_refused(error) if hidden is None else f"{hidden} Then: {_refused(error)}", ExitStatus.ERROR)
    except Exception as error:
        if not is_full(error):
            raise
        return _fail(_refused(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), ExitStatus.ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", ExitStatus.INTERRUPTED)
    except _EndedError as error:
        code = 128 + error.number
        with suppress(OSError):  # the terminal may be closed
            return _fail(f"ended by {signal.Signals(error.number).name}", code)
        return code
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


class _EndedError(SystemExit):
    """A signal ends the verb; unlike Ctrl-C, no verb goes on after it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let verbs without handlers of their own clean up on SIGTERM and SIGHUP (a closed terminal).

    With several ranks the default stays: the launcher ends them, and a rank in a collective would not react.
    """
    process = os.getpid()

    def leave(number: int, _: object) -> None:
        if os.getpid() != process:  # a worker that was forked from this process
            os._exit(128 + number)
        raise _EndedError(number)

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    previous = install_handler(leave, (signal.SIGTERM, signal.SIGHUP)) if alone else {}
    try:
        yield
    finally:
        restore_handlers(previous)


OTHER_VERBS = {
    "merge": "export RUN OUT --to hf", "merge-lora": "export RUN OUT --to hf", "demo": "chat RUN --web",
    "webchat": "chat RUN --web", "infer": "chat RUN", "inference": "chat RUN", "sft": "train RECIPE",
    "finetune": "train RECIPE", "rlhf": "train RECIPE, with objective: dpo", "deploy": "serve RUN", "api": "serve RUN",
    "eval report": "report RUN", "eval compare": "eval table A B --paired", "eval describe": "eval list TASK --details",
}  # fmt: skip
"""What other programs call a verb -> what does it here."""


def _usage(error: CycloptsError) -> str:
    """The error of a command line, and the command that shows its help."""
    chain = error.command_chain or ()
    command = " ".join(("mm-moslora", *chain))
    text = str(error).strip()
    if isinstance(error, UnknownCommandError) and error.unused_tokens:
        verb = " ".join((*chain, error.unused_tokens[0]))
        if verb in OTHER_VERBS:
            return f"There is no command {verb!r}; this does it: mm-moslora {OTHER_VERBS[verb]}"
    if isinstance(error, MissingArgumentError) and error.argument is not None and error.keyword is None:
        name, info = error.argument.name, error.argument.field_info
        text = f"{command} needs {name.lstrip('-').upper().replace('-', '_') if info.is_positional else name}."
    return f"{text} See {command} --help."


def _nobody_reads() -> bool:
    """Whether standard output is a pipe without a reader."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _refused(error: OSError) -> str:
    """The file that could not be read or written, and the reason."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    remedy = (
        "Make room on its disk, or give a path on another."
        if is_full(error)
        else "Give a path that can be read and written."
    )
    return f"{' to '.join(names) or 'Writing failed'}: {error.strerror}. {remedy}"


def _hidden_by(error: BaseException) -> MoSLoRAError | None:
    """The `MoSLoRAError` that was being handled when another error was raised."""
    inner = error.__context__
    return inner if inner is None or isinstance(inner, MoSLoRAError) else _hidden_by(inner)


def _fail(text: str, code: int) -> int:
    """Print an error, for a process that ends with a code; one of several ranks ends here."""
    print(f"error: {redact_text(text, keep_hashes=True)}", file=sys.stderr)
    if ranks := sys.modules.get("mm_moslora.utils.distributed"):
        ranks.leave_at_once(code)
    return code


def _set_up_logging() -> None:
    """Log rank 0 at level INFO, all other ranks at level WARNING, and silence the libraries."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on a busy machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    rank = whole_number(os.environ, "RANK", 0)
    prefix = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter(f"{prefix}%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Python's own traceback, without secrets:
    sys.excepthook = lambda kind, error, _: print(redacted_traceback(error), file=sys.stderr)
    logging.getLogger("mm_moslora").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("mm_moslora_eval").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    for chatty in ("DeepSpeed", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    # DeepSpeed sets a level of its own when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


@app.command
def train(recipe: str, *overrides: Overrides, resume: str = "auto", stop_at: StopAt = None) -> int:
    """Train a recipe; the same command again continues it.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped recipe (see `mm-moslora config`).
    resume
        auto, required, never, or a checkpoint folder.
    """
    from mm_moslora.launch.child_processes import keep_rank_log

    keep_rank_log(os.environ)
    resolved = load_any_recipe(recipe, overrides)
    folder = Path(resolved.train.output)
    if isinstance(resolved, Recipe):
        return run_training(folder, partial(_train, resolved, resume=resume, stop_at=stop_at))
    refuse_early(resolved)
    session = partial(_train_diffusion, resolved, resume=resume, stop_at=stop_at)

    def advice(checkpoint: Path) -> str:
        return f'Draw with it: pipeline.load_lora_weights("{checkpoint}")\nReport: mm-moslora report {folder}'

    return run_training(folder, session, advice=advice)


def _train(recipe: Recipe, *, resume: str, stop_at: int | None, stop: StopRequest) -> TrainResult:
    checked = refuse_early(recipe, resume)
    quiet_libraries()
    from mm_moslora_eval.run.in_training import forgotten, measure

    from mm_moslora.training.training_loop import train

    if recipe.objective != "sft":
        from mm_moslora.preferences.preference_training import train_preferences

        return train_preferences(recipe, resume=resume, stop_at=stop_at, stop=stop, checked=checked)
    tasks = measure if recipe.validate.tasks else None
    return train(recipe, resume=resume, stop_at=stop_at, measure=tasks, forgotten=forgotten, stop=stop, checked=checked)


def _train_diffusion(recipe: DiffusionRecipe, *, resume: str, stop_at: int | None, stop: StopRequest) -> TrainResult:
    quiet_libraries()
    from mm_moslora.diffusion.diffusion_training import train_diffusion

    return train_diffusion(recipe, resume=resume, stop_at=stop_at, stop=stop)


@app.command
def config(
    recipe: str | None = None, *overrides: Overrides, files: Annotated[bool, Parameter(negative="")] = False
) -> int:
    """Check a recipe and print it with every default filled in; without a recipe, list the shipped ones.

    Keys, values and names are checked; files of the recipe and packages need not be here.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped recipe; or a key or a group of keys, such as train, data.train.0, or
        diffusion.train for recipes of diffusion models, which is explained.
    files
        Print shipped folders instead: that of scripts, deepspeed_configs, recipes or tutorials, or all of them, as in
        `bash "$(mm-moslora config --files scripts)"/train.sh`.
    """
    if files:
        return show_folders(recipe)
    return show_recipe(recipe, overrides)


@app.command
def report(run: Path, *, output: Path | None = None) -> int:
    """Write one self-contained HTML page of a training run or of an evaluation.

    Of a run, it also prints what follows from its scores.

    Parameters
    ----------
    run
        Run folder.
    output
        HTML file; default: report.html in the run folder.
    """
    output = output or run / "report.html"
    if (run / "results.json").is_file() and not (run / "metrics.jsonl").exists():
        from mm_moslora_eval.report.evaluation_page import write_report

        print(write_report(run, output))
        return 0
    from mm_moslora.reporting import build_report, load_run
    from mm_moslora.reporting.summary_text import tasks, verdict

    print(build_report(run, output))
    for found in filter(None, (verdict(task, rows) for task, rows in tasks(load_run(run)))):
        print(f"{found.task}: {' '.join(found.sentences)}")
    return 0


@app.command
def quickstart(
    *,
    output: Path | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    seed: int = 0,
    smoke: bool = False,
) -> int:
    """The whole workflow in minutes on two CPU cores: fetch, align, tune, evaluate, report. Run it again to continue.

    It prints each command before it runs it: `train` twice, `eval run`, `export` and `report`.

    Parameters
    ----------
    output
        Run folder; default: runs/quickstart, or runs/quickstart-smoke.
    precision
        auto: bf16 on hardware with fast bf16, else fp32.
    seed
        Seed of the initialisation, of the data order, and of the choice of training pictures.
    smoke
        Run a miniature of every step in about three minutes, at lower quality.
    """
    quiet_libraries()
    from mm_moslora.quickstart.quickstart_run import quickstart as run_quickstart

    stage = partial(app, exit_on_error=False, print_error=False, result_action="return_value")
    return run_quickstart(stage, output=output, precision=precision, seed=seed, smoke=smoke)


@adapters_app.command(name="inspect")
def adapters_inspect(
    folder: Path, *, plot: Path | None = None, against: Path | None = None, base: Path | None = None
) -> int:
    """Show what an adapter's update is made of, by module: ranks, pairs of subspaces, mixers, what moved.

    Parameters
    ----------
    folder
        Adapter folder, or a checkpoint or run with one.
    plot
        Also draw measures by module and layer, energies by pairs and singular values into this PNG, SVG or PDF file.
    against
        Adapter folder, checkpoint or run whose mixers take the place of the start, such as an earlier checkpoint's.
    base
        Folder of a model; also show whether the adapter fits its files, and under which names.
    """
    adapter, other = adapter_folder(folder), None if against is None else adapter_folder(against)
    quiet_libraries()
    from mm_moslora.adapters.adapter_inspection import inspect_adapter, summary, trained_parameters, why_unknown
    from mm_moslora.reporting.lens_maps import draw_lens, measures_table

    reports = inspect_adapter(adapter, against=other)
    rows = [report.row() for report in reports]
    lines = [measures_table(rows), "", *(f"{name:28} {value:.4g}" for name, value in summary(reports).items())]
    lines.append(f"{'trained parameters':28} {trained_parameters(adapter):,}")
    if why := why_unknown(reports, against_other=other is not None):
        lines.append(why)
    if plot is not None:
        lines.append(f"plot: {draw_lens(rows, plot)}")
    if base is not None:
        from mm_moslora.adapters.folders.verify_merge import modules_in
        from mm_moslora.adapters.name_mapping import exchanged

        placed = modules_in(base, adapter)
        lines.append(f"All {len(placed)} modules fit {base} by their shapes.")
        lines += [f"  {old or '(nothing)'} -> {new or '(nothing)'}" for old, new in exchanged(placed).items()]
    print("\n".join(lines))
    return 0
