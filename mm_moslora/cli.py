"""The command line: `mm-moslora <verb>`. Parsing and printing only; heavy imports happen inside the verbs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from mm_moslora import __version__
from mm_moslora.errors import ConfigError, MoSLoRAError

if TYPE_CHECKING:
    from mm_moslora.config import Recipe

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_REQUEUE = 1, 130, 75

app = App(
    name="mm-moslora",
    version=__version__,
    help="Assemble a vision-language model, tune it with MoSLoRA, measure it, hand it on.",
)
data_app = App(name="data", help="Look at training data before the run.")
eval_app = App(name="eval", help="Measure a model on tasks; infer and score are separate steps.")
app.command(data_app)
app.command(eval_app)
adapters_app = App(name="adapters", help="Look into adapter folders.")
app.command(adapters_app)

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Dotted recipe keys: --optim.lr 1e-4")]


def main() -> None:
    """Entry point; exits with 0 on success only."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name.

    Returns:
        0 on success, 1 on an error, 75 when a run was stopped by a signal and can go on, 130 on Ctrl-C.
    """
    _set_up_logging()
    try:
        result = app(arguments, exit_on_error=True, result_action="return_value")
    except MoSLoRAError as error:
        _fail(str(error))
        return EXIT_ERROR
    except KeyboardInterrupt:
        _fail("interrupted")
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _fail(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(f"error: {text}", file=sys.stderr)


def _set_up_logging() -> None:
    """Log lines of rank 0 for people; warnings of every rank; the chatter of libraries not at all."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on a busy machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    rank = int(os.environ.get("RANK", "0"))
    prefix = f"[rank {rank}] " if rank else ""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{prefix}%(message)s", force=True)
    logging.getLogger("mm_moslora").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("mm_moslora_eval").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for chatty in ("DeepSpeed", "bitsandbytes", "torchao"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def _quiet_libraries() -> None:
    """Switch off the libraries' own bars and notices; ours say what matters."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|deepspeed|timm|open_clip)(\.|$)")


def _recipe(name: str, tokens: tuple[str, ...]) -> Recipe:
    from mm_moslora.config import load_recipe

    return load_recipe(name, override_items(tokens))


def override_items(tokens: tuple[str, ...]) -> list[str]:
    """Turn `--optim.lr 1e-4`, `--optim.lr=1e-4` and `optim.lr=1e-4` into `optim.lr=1e-4`.

    Raises:
        ConfigError: a key without a value.
    """
    items, waiting = [], None
    for token in tokens:
        if waiting is not None:
            items.append(f"{waiting}={token}")
            waiting = None
        elif "=" in token:
            items.append(token.lstrip("-"))
        elif token.startswith("--"):
            waiting = token.lstrip("-")
        else:
            raise ConfigError(f"{token!r} is no override. Write --key value or key=value, such as --optim.lr 1e-4.")
    if waiting is not None:
        raise ConfigError(f"--{waiting} has no value. Write --{waiting} VALUE.")
    return items


@app.command
def train(recipe: str, *overrides: Overrides, resume: str = "auto", stop_at: int | None = None) -> int:
    """Train a recipe; the same command again continues it.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped preset (see `mm-moslora config`).
    resume
        auto, required, never, or a checkpoint folder.
    stop_at
        Save and stop after this optimiser step.
    """
    resolved = _recipe(recipe, overrides)
    _quiet_libraries()
    from mm_moslora import distributed
    from mm_moslora.training.loop import train as run_training

    result = run_training(resolved, resume=resume, stop_at=stop_at)
    if not distributed.is_main():
        return 0 if not result.stopped_by else EXIT_REQUEUE
    print(f"Checkpoint: {result.checkpoint} (step {result.step} of {result.total_steps})")
    if result.stopped_by:
        (Path(resolved.train.output) / "PREEMPTED").write_text(f"signal {result.stopped_by}\n", encoding="utf-8")
        print("Stopped by a signal. The same command continues from there.")
        return EXIT_REQUEUE
    (Path(resolved.train.output) / "PREEMPTED").unlink(missing_ok=True)
    return 0


@app.command
def config(recipe: str | None = None, *overrides: Overrides) -> int:
    """Print the resolved recipe, every default filled in; without a recipe, list the shipped presets."""
    from mm_moslora.config import recipe_names

    if recipe is None:
        print("\n".join(recipe_names()))
        return 0
    print(_recipe(recipe, overrides).to_yaml(), end="")
    return 0


@app.command
def merge(model: Path, output: Path, *, dtype: Literal["fp32", "bf16", "fp16"] = "fp32") -> int:
    """Merge the adapter into the base and write one Hugging Face folder; prints the largest logit difference."""
    return export(model, output, to="hf", dtype=dtype)


@app.command
def export(
    model: Path,
    output: Path,
    *,
    to: Literal["llava", "hf", "lora"] = "llava",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> int:
    """Hand a tuned model on.

    Parameters
    ----------
    model
        A run, a checkpoint or an export.
    output
        New folder.
    to
        llava: stock `LlavaForConditionalGeneration`, or a refusal with the reason; hf: the whole model whatever its
        parts; lora: the adapter alone, folded to plain LoRA.
    dtype
        Dtype of the written weights.
    """
    _quiet_libraries()
    from mm_moslora.models.export import export_lora, export_model
    from mm_moslora.models.load import load
    from mm_moslora.training.engine import dtype_of

    if to == "lora":
        export_lora(load(model, merge=False), output)
        print(f"{output}: plain LoRA for stock PEFT, and the unfolded factors beside it.")
        return 0
    result = export_model(load(model, dtype=dtype_of(dtype)), output, require_stock=to == "llava")
    print(f"{result.folder}: {result.architecture}, largest logit difference {result.max_logit_difference:.2e}")
    if not result.stock:
        print("Loads with transformers after `import mm_moslora.models`.")
    return 0


@app.command
def chat(
    model: Path,
    *,
    image: Path | None = None,
    question: str | None = None,
    max_new_tokens: int = 128,
) -> int:
    """Talk to a model in the terminal.

    Parameters
    ----------
    model
        A run, a checkpoint or an export.
    image
        Picture to start with; /image PATH changes it later.
    question
        Ask this one question and leave.
    max_new_tokens
        Longest answer, tokens.
    """
    _quiet_libraries()
    from mm_moslora.serve.chat import Chat, interactive

    talk = Chat.from_folder(model, max_new_tokens=max_new_tokens)
    if image is not None:
        talk.show(image)
    if question is not None:
        print(talk.ask(question))
        return 0
    interactive(talk)
    return 0


@app.command
def doctor() -> int:
    """Check versions, accelerator, threads and leftovers; exit code 1 when something is bad."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mm_moslora.doctor import diagnose

    table = Table("", "what", "found", "what to do", box=None)
    findings = diagnose()
    signs = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "bad": "[red]bad[/]"}
    for item in findings:
        table.add_row(signs[item.status], *map(escape, (item.name, item.detail, item.remedy)))
    Console().print(table)
    return EXIT_ERROR if any(item.status == "bad" for item in findings) else 0


@app.command
def report(run: Path, *, output: Path | None = None) -> int:
    """Write one self-contained report.html of a run.

    Parameters
    ----------
    run
        Run folder.
    output
        HTML file; default: report.html in the run folder.
    """
    from mm_moslora.report import build_report

    target = output or run / "report.html"
    build_report(run, target)
    print(target)
    return 0


@app.command
def quickstart(
    *,
    images: Literal["easy-vqa", "stamps"] = "easy-vqa",
    encoder: Literal["auto", "dinov2", "efficientnet", "open_clip"] = "auto",
    output: Path | None = None,
    stamps_deb: Path | None = None,
    smoke: bool = False,
) -> int:
    """The main job in minutes on two CPU cores: fetch real parts, align, tune, measure, report. Again continues it.

    Parameters
    ----------
    images
        easy-vqa: coloured shapes with questions; stamps: 800 real pictures with sentences and categories.
    encoder
        auto picks the one that was measured best for the pictures.
    output
        Run folder; default: runs/quickstart (runs/quickstart-stamps, ...-smoke).
    stamps_deb
        Path of Debian's tuxpaint-stamps-default package, where apt is not at hand.
    smoke
        Everything in two minutes, at lower quality.
    """
    _quiet_libraries()
    from mm_moslora.quickstart.run import quickstart as run_quickstart

    return run_quickstart(images=images, encoder=encoder, output=output, stamps_deb=stamps_deb, smoke=smoke)


@adapters_app.command(name="inspect")
def adapters_inspect(folder: Path, *, picture: Path | None = None) -> int:
    """Show what an adapter learned, module by module: norms, effective rank, and how far its mixers moved.

    Parameters
    ----------
    folder
        Adapter folder, such as RUN/checkpoint-000500/adapter.
    picture
        Also draw the mixers and the singular values by depth into this PNG file.
    """
    _quiet_libraries()
    from mm_moslora.adapters.inspect import inspection

    print(inspection(folder, picture=picture))
    return 0


@data_app.command(name="check")
def data_check(recipe: str, *overrides: Overrides) -> int:
    """Read every record and picture of a recipe's data and say what is wrong; exit code 1 when the run would stop."""
    _quiet_libraries()
    from mm_moslora.datacheck import check_recipe

    return _print_all(*check_recipe(_recipe(recipe, overrides)))


@data_app.command(name="view")
def data_view(recipe: str, *overrides: Overrides, count: int = 3, start: int = 0) -> int:
    """Show records as the trainer sees them, supervised tokens coloured."""
    _quiet_libraries()
    from mm_moslora.datacheck import view_recipe

    return _print_all(view_recipe(_recipe(recipe, overrides), start=start, count=count), 0)


ModelName = Annotated[
    str, Parameter(help="A folder (run, checkpoint, export), hf:ID, openai:URL#MODEL or replay:FILE.")
]
JudgeName = Annotated[
    str | None, Parameter(help="URL#MODEL of an OpenAI-compatible judge; the key is read from the environment.")
]


@eval_app.command(name="run")
def eval_run(
    *tasks: str,
    model: ModelName = "",
    output: Path = Path("runs/eval"),
    protocol: str | None = None,
    modes: tuple[Literal["own", "blind", "wrong"], ...] = ("own",),
    baselines: tuple[Literal["majority", "question_majority"], ...] = (),
    batch_size: int = 8,
    limit: int | None = None,
    samples: tuple[str, ...] = (),
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    reference: bool = False,
    dry_run: bool = False,
    judge: JudgeName = None,
    judge_budget: int | None = None,
    max_failed_share: float = 0.0,
    report: bool = True,
) -> int:
    """Ask a model the questions of tasks and score the answers; the same command again asks only what is missing.

    Exit code 0: all scored; 1: an error; 3: more samples failed than --max-failed-share allows.

    Parameters
    ----------
    tasks
        NAME, NAME@PROTOCOL, a task file, llava:FILE[@IMAGE_FOLDER] or tsv:FILE; see `mm-moslora eval list`.
    output
        Run folder; it belongs to one model.
    protocol
        For tasks that name none.
    modes
        Pictures shown: own (the real ones), blind (their mean colour), wrong (another item's).
    baselines
        Answers without a model, scored alike.
    batch_size
        Questions decoded together; for an endpoint, requests under way.
    limit
        Only the first so many documents.
    samples
        Only documents with these ids.
    seed
        Picks the wrong pictures.
    precision
        Dtype of the weights; auto: bf16 where the hardware is fast at it, else fp32.
    reference
        One question at a time, nothing shared: slow, for comparisons.
    dry_run
        Print the first prompts and leave.
    judge_budget
        Most tokens to spend on the judge.
    max_failed_share
        Share of failed samples, 0 to 1, up to which the exit code is 0.
    report
        Write report.html into the run folder.
    """
    from mm_moslora_eval import cli as evaluation

    names = evaluation.with_protocol(tasks, protocol)
    if dry_run:
        print(evaluation.dry_run(names))
        return 0
    _quiet_libraries()
    from mm_moslora_eval.open_model import open_model
    from mm_moslora_eval.runner import Settings

    settings = Settings(batch_size=1 if reference else batch_size, limit=limit, samples=samples, seed=seed)
    results = evaluation.run(
        lambda: open_model(model, precision=precision, reference=reference),
        names,
        output,
        modes=modes,
        baselines=baselines,
        settings=settings,
        progress=evaluation.Bars(),
        judge=evaluation.make_judge(judge, output, budget=judge_budget),
    )
    return _eval_results(results, output, max_failed_share=max_failed_share, report=report) if settings.rank == 0 else 0


@eval_app.command(name="score")
def eval_score(
    answers: Path,
    *,
    protocol: str | None = None,
    judge: JudgeName = None,
    judge_budget: int | None = None,
    max_failed_share: float = 0.0,
    report: bool = True,
) -> int:
    """Score stored answers again; needs no model and no data.

    Parameters
    ----------
    answers
        A run folder, a task folder in it, or its answers.jsonl.
    protocol
        NAME@PROTOCOL whose extraction and metric are used instead.
    judge_budget
        Most tokens to spend on the judge.
    max_failed_share
        Share of failed samples, 0 to 1, up to which the exit code is 0.
    report
        Write report.html into the run folder.
    """
    from mm_moslora_eval import cli as evaluation

    run = evaluation.run_folder(answers)
    results = evaluation.score(answers, protocol=protocol, judge=evaluation.make_judge(judge, run, budget=judge_budget))
    return _eval_results(results, run, max_failed_share=max_failed_share, report=report)


def _eval_results(results: list[Any], run: Path, *, max_failed_share: float, report: bool) -> int:
    from mm_moslora_eval import cli as evaluation

    print(evaluation.table(results))
    if report:
        from mm_moslora_eval.report import write_report

        print(f"Report: {write_report(run)}")
    return evaluation.exit_code(results, max_failed_share=max_failed_share)


@eval_app.command(name="list")
def eval_list(words: str = "") -> int:
    """List the tasks, or those whose line holds all the given words."""
    from mm_moslora_eval import cli as evaluation

    print(evaluation.list_tasks(words))
    return 0


@eval_app.command(name="describe")
def eval_describe(task: str) -> int:
    """Show a task: data, prompt of its first document, decoding, extraction, metric, published numbers."""
    from mm_moslora_eval import cli as evaluation

    print(evaluation.describe(task))
    return 0


@eval_app.command(name="check")
def eval_check(*tasks: str) -> int:
    """Read the data of tasks, every picture included; exit code 1 when something is missing or unsound."""
    from mm_moslora_eval import cli as evaluation

    for task in evaluation.with_protocol(tasks, None):
        print(evaluation.check(task))
    return 0


@eval_app.command(name="compare")
def eval_compare(a: str, b: str, *, html: Path | None = None) -> int:
    """Compare two runs sample by sample: difference, interval, p-value, wins and losses, samples that changed.

    Parameters
    ----------
    a
        A run or task folder; several seeds of one system separated by commas.
    b
        The other one; A - B is reported.
    html
        Write the comparison as a page, too.
    """
    from mm_moslora_eval import cli as evaluation

    comparisons = evaluation.compare_runs(a, b)
    print("\n\n".join(text for _, text in comparisons))
    if html is not None:
        from mm_moslora_eval.report import write_comparison

        print(f"Page: {write_comparison([item for item, _ in comparisons], html)}")
    return 0


@eval_app.command(name="export")
def eval_export(answers: Path, output: Path, *, to: str = "vlmevalkit") -> int:
    """Write answers for an evaluation server or another harness.

    Parameters
    ----------
    answers
        A folder TASK@PROTOCOL/MODE of a run.
    output
        The file.
    to
        vqav2, vizwiz, docvqa, mmvet, mmbench, llava, vlmevalkit or vlmevalkit_xlsx.
    """
    from mm_moslora_eval.submissions import write_submission

    empty = write_submission(answers, output, form=to)
    print(f"{output}: written in the form {to}; {empty} documents have no answer and are written as empty ones.")
    return 0


@eval_app.command(name="miniature")
def eval_miniature(folder: Path) -> int:
    """Write small made-up documents of seventeen benchmarks in their original layouts, to try everything offline."""
    from mm_moslora_eval.miniature import make_miniature

    print(" ".join(str(path) for path in make_miniature(folder)))
    return 0


@eval_app.command(name="report")
def eval_report(run: Path, *, output: Path | None = None) -> int:
    """Write one self-contained page of an evaluation run.

    Parameters
    ----------
    run
        Run folder.
    output
        HTML file; default: report.html in the run folder.
    """
    from mm_moslora_eval.report import write_report

    print(write_report(run, output))
    return 0


def _print_all(renderables: list[Any], code: int) -> int:
    from rich.console import Console

    console = Console()
    for item in renderables:
        console.print(item)
    return code


if __name__ == "__main__":
    main()
