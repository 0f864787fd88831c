"""The quickstart, end to end: download models and data, align, tune, evaluate with controls, export, report.

Every stage stores its result in the run folder and is skipped where the result exists. The same command therefore
continues after an interruption, and after the end it only prints.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mm_moslora.config import AdapterConfig, Precision, Recipe, SourceConfig, load_recipe, refuse_lacking
from mm_moslora.launch.launcher import EXIT_REQUEUE
from mm_moslora.quickstart import model_assets
from mm_moslora.quickstart.instruction_data import DATA_SET, DatasetFiles, build_easy_vqa
from mm_moslora.quickstart.quickstart_evaluation import evaluate_all, measured, subject_of, table
from mm_moslora.quickstart.quickstart_notes import (
    QUICKSTART,
    StageClock,
    read_earlier,
    refuse_other,
    refuse_other_recipe,
    tuned_summary,
)
from mm_moslora.quickstart.stamp_data import IMAGES, build_stamps
from mm_moslora.utils.files import building, mark, replace_json
from mm_moslora.utils.folder_marks import MARK, is_built, refuse_strangers
from mm_moslora.utils.hardware import hardware
from mm_moslora.utils.run_paths import RUN_FILES, RUN_LOCK, cache_folder, checkpoints
from mm_moslora.utils.text_format import format_seconds

if TYPE_CHECKING:
    from mm_moslora.training.supervision.run_state import RunEnding

logger = logging.getLogger(__name__)

Images = Literal["easy-vqa", "stamps"]
Encoder = Literal["auto", "dinov2", "efficientnet", "open_clip"]


@dataclass(frozen=True, kw_only=True)
class QuickstartSize:
    """The size of a quickstart."""

    train_images: int
    align_steps: int
    test_questions: int


SIZES: dict[tuple[Images, bool], QuickstartSize] = {
    ("easy-vqa", False): QuickstartSize(train_images=768, align_steps=2, test_questions=320),
    ("easy-vqa", True): QuickstartSize(train_images=64, align_steps=4, test_questions=40),
    ("stamps", False): QuickstartSize(train_images=10_000, align_steps=20, test_questions=10_000),
    ("stamps", True): QuickstartSize(train_images=96, align_steps=4, test_questions=48),
}
TURNS = 8
"""Questions per conversation of easy-VQA."""
_FILES = (
    "align", "tune", "data", "eval", "export", "export.json", "timing.json", "report.html", QUICKSTART, *RUN_FILES,
)  # fmt: skip
BEST_ENCODER: dict[Images, Encoder] = {"easy-vqa": "dinov2", "stamps": "efficientnet"}


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """Which quickstart."""

    images: Images = "easy-vqa"
    encoder: Encoder = "auto"
    """auto: the encoder with the best measured scores for the pictures."""
    precision: Precision = "auto"
    """Number format of training and evaluation; auto: bf16 where the hardware multiplies it fast, else fp32."""
    seed: int = 0
    """Seed of initialisation and data order; for easy-VQA also of the choice of training pictures."""
    smoke: bool = False
    """A small version for tests, with lower quality."""

    @property
    def name(self) -> str:
        """Name of the run folder, from the settings that differ from the defaults."""
        default = QuickstartOptions()
        words = [word for word in ("images", "encoder", "precision") if getattr(self, word) != getattr(default, word)]
        return "-".join(
            ["quickstart", *(getattr(self, word) for word in words), *([f"seed{self.seed}"] if self.seed else []),
             *(["smoke"] if self.smoke else [])]
        )  # fmt: skip

    @property
    def tower(self) -> Encoder:
        """The encoder, with auto resolved."""
        return BEST_ENCODER[self.images] if self.encoder == "auto" else self.encoder

    @property
    def size(self) -> QuickstartSize:
        """Its size."""
        return SIZES[self.images, self.smoke]

    @property
    def facts(self) -> dict[str, Any]:
        """All settings that affect the results."""
        chosen = {"images": self.images, "encoder": self.tower, "precision": self.precision, "seed": self.seed}
        return chosen | dataclasses.asdict(self.size)


def quickstart(options: QuickstartOptions, *, output: Path | None = None, stamps_deb: Path | None = None) -> int:
    """Run or continue the quickstart.

    Returns:
        0, or 75 after a signal; the same command then continues.

    Raises:
        ConfigError: the run folder holds files of another program, or another quickstart.
        AssetError: an asset cannot be downloaded or read.
    """
    from mm_moslora.training.supervision.run_folder import exclusive
    from mm_moslora.training.supervision.run_state import record_run_state
    from mm_moslora.training.supervision.watchdog import Watchdog

    folder = (output or Path("runs") / options.name).resolve()
    model_assets.check_readers(options.images, options.tower)
    refuse_lacking(load_recipe("quickstart_tune"))
    refuse_strangers(folder, _FILES, kind="quickstart", also=(f"align/{RUN_LOCK}",))
    with exclusive(folder):
        refuse_other(folder, options.facts)
        mark(folder, "quickstart")
        (folder / "data").mkdir(exist_ok=True)
        mark(folder / "data", DATA_SET)
        with record_run_state(folder, stages=("align", "tune")) as ending, Watchdog(folder):
            closing = _quickstart(folder, options, stamps_deb, ending)
            ending.finished = closing is not None
        if closing is None:
            return EXIT_REQUEUE
        # After the end is recorded, since the report starts with the status of the run.
        from mm_moslora.reporting import build_report

        build_report(folder, folder / "report.html")
        sys.stdout.write(closing + "\n")
    return 0


def _quickstart(folder: Path, options: QuickstartOptions, stamps_deb: Path | None, ending: RunEnding) -> str | None:
    """Run all stages; returns the closing text, None after a signal."""
    from mm_moslora.training.training_loop import train

    clock = StageClock(folder)
    _say(f"Models and data are cached in {cache_folder('quickstart')}; missing ones are downloaded.")
    data, (align, tune) = _begin(folder, options, stamps_deb)
    ending.begun = True
    _say(f"Data: {data.train_pictures} training pictures, {data.questions} held-out questions.")
    for what, recipe in (("Align the projector", align), ("Tune with MoSLoRA", tune)):
        with clock.stage(recipe.name):
            _say(f"\n{what}:")
            result = train(recipe)
        if not result.finished:
            _say("Stopped. The same command continues from here.")
            return None
    with clock.stage("evaluate"):
        _say("\nMeasure on held-out pictures, with controls:")
        subject = subject_of(folder, data)
        if (results := measured(folder, subject)) is None:
            results = evaluate_all(folder, data, name=options.images, precision=options.precision, subject=subject)
            _track(results, tune, step=result.step)
    with clock.stage("export"):
        exported = _export(folder, model=subject["model"])
    _summarise(folder, data, options, clock=clock, exported=exported)
    commands = _commands(folder, data.images, stock=exported["stock"])
    return "\n".join(
        [table(results), f"Took {format_seconds(clock.total)}. Report: {folder / 'report.html'}", "",
         *(f"{what + ':':<24}{command}" for what, command in commands)]
    )  # fmt: skip


def _begin(
    folder: Path, options: QuickstartOptions, stamps_deb: Path | None
) -> tuple[DatasetFiles, tuple[Recipe, Recipe]]:
    """Download the assets, write the data, and record the settings in the folder."""
    from mm_moslora.training.checkpointing.resume_choice import changed_since

    (language, vision), out = _parts(options.tower), folder / "data"
    stamps = options.images == "stamps"
    source = model_assets.stamps(stamps_deb, _say) if stamps else model_assets.easy_vqa(_say)
    stages = recipes(language, vision, DatasetFiles.below(out, out / IMAGES if stamps else source), folder, options)
    for recipe in stages:
        refuse_other_recipe(folder, Path(recipe.train.output).name, changed_since(recipe))
    data = _data(options, source, out, replace=not any(checkpoints(Path(recipe.train.output)) for recipe in stages))
    replace_json(folder / QUICKSTART, options.facts)
    return data, stages


def _track(rows: list[dict[str, Any]], tune: Recipe, *, step: int) -> None:
    """Send the scores to the trackers of the tuned run, with the name of the adapter that they belong to."""
    from mm_moslora.tracking import build_trackers
    from mm_moslora.tracking.tracker import adapter_digest
    from mm_moslora.training.checkpointing.checkpoint_folder import folder_name

    run = Path(tune.train.output)
    trackers = build_trackers(tune.track)
    trackers.reopen(tune.to_dict(), run)
    trackers.log_evaluation(rows, adapter=adapter_digest(run / folder_name(step) / "adapter"), step=step)
    trackers.finish()


def _say(text: str) -> None:
    logger.info("%s", text)


def _parts(encoder: Encoder) -> tuple[Path, str]:
    """The language model's folder, and the name of the vision tower."""
    language = model_assets.language_model(_say)
    towers: dict[str, Callable[[], str]] = {
        "dinov2": lambda: str(model_assets.dinov2(_say)),
        "efficientnet": lambda: str(model_assets.efficientnet_timm(_say)),
        "open_clip": lambda: f"open_clip:{model_assets.efficientnet_open_clip(_say)}",
    }
    return language, towers[encoder]()


def _data(options: QuickstartOptions, source: Path, out: Path, *, replace: bool) -> DatasetFiles:
    size = options.size
    if options.images == "stamps":
        return build_stamps(source, out, limit=size.train_images, replace=replace)
    return build_easy_vqa(
        source,
        out,
        train_images=size.train_images,
        test_questions=size.test_questions,
        turns=TURNS,
        seed=options.seed,
        replace=replace,
    )


# Settings that differ from the shipped recipes (DINOv2 on easy-VQA) for other encoders and pictures: side in pixels,
# layer, and side of the square of patches per visual token (1: the plain MLP). They were chosen by how well color and
# shape, or the category, can be predicted from the features.
_VIEW: dict[tuple[Images, Encoder], tuple[int, int, int]] = {
    ("easy-vqa", "dinov2"): (56, -4, 1),
    ("easy-vqa", "efficientnet"): (64, -1, 1),
    ("easy-vqa", "open_clip"): (64, -1, 1),
    ("stamps", "dinov2"): (112, -5, 4),
    ("stamps", "efficientnet"): (128, -1, 2),
    ("stamps", "open_clip"): (128, -1, 2),
}


# Conversations have one question each, so a step takes more of them.
_TUNE_KEYS: dict[Images, list[str]] = {"easy-vqa": [], "stamps": ["train.global_batch=32", "train.micro_batch=32"]}


def recipes(
    language: Path, vision: str, data: DatasetFiles, folder: Path, options: QuickstartOptions
) -> tuple[Recipe, Recipe]:
    """The two stages, from the shipped recipes with the paths filled in."""
    size = options.size
    side, layer, fold = _VIEW[options.images, options.tower]
    common = [
        f"model.language={json.dumps(str(language))}",
        f"model.vision.name={json.dumps(vision)}",
        f"model.vision.image_size={side}",
        f"model.vision.feature_layer={layer}",
        *(["model.projector.kind=pixel_shuffle", f"model.projector.shuffle={fold}"] if fold > 1 else []),
        f"train.seed={options.seed}",
        f"train.precision={options.precision}",
    ]
    align = load_recipe("quickstart_align", [*common, f"train.steps={size.align_steps}"])
    tune = load_recipe("quickstart_tune", [*common, *_TUNE_KEYS[options.images], "train.epochs=1.0"])
    projector = folder / "align" / f"checkpoint-{size.align_steps:06d}" / "projector.safetensors"
    tune = dataclasses.replace(
        tune,
        model=dataclasses.replace(
            tune.model, projector=dataclasses.replace(tune.model.projector, weights=str(projector))
        ),
    )
    return (
        _placed(align, data.align, data.images, folder / "align"),
        _placed(tune, data.train, data.images, folder / "tune"),
    )


def _placed(recipe: Recipe, records: Path, images: Path, output: Path) -> Recipe:
    source = SourceConfig(path=str(records), image_folder=str(images))
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, train=[source]),
        train=dataclasses.replace(recipe.train, output=str(output)),
    )


_EXPORTED = ("architecture", "stock", "max_logit_difference")


def _export(folder: Path, *, model: str) -> dict[str, Any]:
    """The tuned model as a Hugging Face folder, verified; an export of weights with another digest is replaced."""
    from mm_moslora.data.preprocessing_print import check_preprocessing, hand_on_preprocessing
    from mm_moslora.models.export.export_huggingface import export_model
    from mm_moslora.models.load_model import load

    target, note = folder / "export", folder / "export.json"
    exported = read_earlier(note, dict, fits=itemgetter(*_EXPORTED))
    if is_built(target) and exported is not None and exported.get("model") == model:
        return dict(exported)
    with building(target, replaces=MARK) as part:
        assembly = load(folder / "tune")
        check_preprocessing(folder / "tune", assembly)
        result = export_model(assembly, part)
        hand_on_preprocessing(folder / "tune", assembly, part)
    facts = {name: getattr(result, name) for name in _EXPORTED} | {"model": model}
    replace_json(note, facts)
    return facts


def _summarise(
    folder: Path, data: DatasetFiles, options: QuickstartOptions, *, clock: StageClock, exported: dict[str, Any]
) -> None:
    from mm_moslora.tracking.run_environment import environment
    from mm_moslora.training.supervision.run_summary import peak_memory_gib

    tune = tuned_summary(folder)
    tokens = f"{tune['tokens_per_image']} visual tokens + " if tune else ""
    adapter: AdapterConfig = load_recipe("quickstart_tune").adapter
    replace_json(
        folder / "summary.json",
        tune
        | {
            "name": folder.name,
            "title": "mm_moslora quickstart" + (" (smoke)" if options.smoke else ""),
            "description": f"{options.tower} + {tokens}SmolLM2-135M-Instruct, "
            f"MoSLoRA rank {adapter.rank} ({adapter.mixer_init} mixer) in every linear layer, on {options.images}.",
            "seed": options.seed,
            "seconds": clock.total,
            "memory_gib": max(tune.get("memory_gib", 0.0), peak_memory_gib()),
            "stages": clock.seconds,
            "hardware": hardware(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "export": exported,
            "environment": environment(),
            "licences": {asset.what: asset.licence for asset in model_assets.used(options.images, options.tower)},
            "commands": [
                {"what": what, "command": command}
                for what, command in _commands(folder, data.images, stock=exported["stock"])
            ],
        },
    )


def _commands(folder: Path, pictures: Path, *, stock: bool) -> list[tuple[str, str]]:
    tune, task = _shown(folder / "tune"), f"llava:{_shown(folder / 'data' / 'test.jsonl')}@{pictures}"
    layout = [] if stock else ["--to", "hf"]
    words = {
        "Chat with it": ["chat", tune, "--image", "PICTURE"],
        "Export it": ["export", tune, _shown(folder / "handed-on"), *layout],
        "Measure it again": ["eval", "run", task, "--model", tune, "--output", _shown(folder / "again")],
        "Show supervised tokens": ["data", "view", tune],
    }
    return [(what, shlex.join([_program(), *map(str, command)])) for what, command in words.items()]


def _shown(path: Path) -> Path:
    """A path relative to the working directory, where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _program() -> str:
    """The command as a user can type it here: by name, or by path where the environment is not activated."""
    name = "mm-moslora"
    beside = Path(sys.executable).parent / name
    return str(_shown(beside)) if shutil.which(name) is None and beside.is_file() else name
