"""The quickstart: small parts and pictures from package registries, and the verbs that a user would give."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mm_moslora.config import Precision, load_recipe, refuse_lacking
from mm_moslora.quickstart import model_assets
from mm_moslora.quickstart.instruction_data import DatasetFiles, build_easy_vqa
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import mark, replace_text
from mm_moslora.utils.folder_marks import refuse_strangers
from mm_moslora.utils.run_paths import cache_folder, checkpoints
from mm_moslora.utils.untrusted_files import read_text

logger = logging.getLogger(__name__)

STAGES = ("align", "tune")
TURNS = 8
"""Questions per conversation."""
ANSWER_TOKENS = 16
"""Longest answer. The answers are one word; the untuned model tends to give a sentence with it."""


@dataclass(frozen=True)
class QuickstartSize:
    """Training pictures, steps of the first stage, and held-out questions."""

    train_images: int = 768
    align_steps: int = 2
    test_questions: int = 320


SMOKE = QuickstartSize(train_images=64, align_steps=4, test_questions=40)


def quickstart(
    run: Callable[[list[str]], int], *, output: Path | None, precision: Precision, seed: int, smoke: bool
) -> int:
    """Run or continue the quickstart by `run`, which executes a command line; the code of the first that failed."""
    folder = output or Path("runs") / ("quickstart-smoke" if smoke else "quickstart")
    size = SMOKE if smoke else QuickstartSize()
    model_assets.check_readers()
    refuse_lacking(load_recipe("quickstart_tune"))
    refuse_strangers(folder, [*STAGES, *map(_recipe_name, STAGES), "data", "eval", "report.html"], kind="quickstart")
    logger.info("Models and data are cached in %s; missing ones are downloaded.", cache_folder("quickstart"))
    parts = {"language": model_assets.language_model(logger.info), "vision": model_assets.dinov2(logger.info)}
    data_set = model_assets.easy_vqa(logger.info)
    recipes = _recipes(folder.resolve(), parts, data_set, size, [f"train.seed={seed}", f"train.precision={precision}"])
    for name, recipe in recipes.items():
        if (folder / name).is_file() and read_text(folder / name) != recipe:
            raise ConfigError(
                f"{folder / name} is the recipe of another quickstart: other options, or edited since. The folder is "
                "left unchanged. Choose another --output, or delete the folder."
            )
    data = build_easy_vqa(
        data_set,
        folder.resolve() / "data",
        train_images=size.train_images,
        test_questions=size.test_questions,
        turns=TURNS,
        seed=seed,
        replace=not any(checkpoints(folder / stage) for stage in STAGES),
    )
    mark(folder, "quickstart")
    for name, recipe in recipes.items():
        replace_text(folder / name, recipe)
    logger.info("Data: %d training pictures, %d held-out questions.", data.train_pictures, data.questions)
    code = _run_stages(run, folder, data)
    if code == 0:
        tune = folder / "tune"
        commands = {
            "Chat with it": ("chat", tune, "--image", "PICTURE"), "Compare it with before": ("chat", tune, "--web"),
            "Show supervised tokens": ("data", "view", tune),
        }  # fmt: skip
        sys.stdout.write("\n" + "".join(f"{what + ':':<24}{_shown(*words)}\n" for what, words in commands.items()))
    return code


def _recipe_name(stage: str) -> str:
    return f"{stage}.yaml"


def _recipes(
    folder: Path, parts: dict[str, Path], images: Path, size: QuickstartSize, changes: list[str]
) -> dict[str, str]:
    """The shipped recipes of both stages with the paths filled in, by file name."""
    data, texts = folder / "data", {}
    records = {"align": data / "align.jsonl", "tune": data / "train.jsonl"}
    own = {
        "align": [f"train.steps={size.align_steps}"],
        "tune": [f"model.projector.weights={json.dumps(str(folder / 'align'))}"],
    }
    for stage in STAGES:
        recipe = load_recipe(
            f"quickstart_{stage}",
            [
                f"model.language={json.dumps(str(parts['language']))}",
                f"model.vision.name={json.dumps(str(parts['vision']))}",
                f"data.train={json.dumps([{'path': str(records[stage]), 'image_folder': str(images)}])}",
                f"train.output={json.dumps(str(folder / stage))}",
                *own[stage],
                *changes,
            ],
        )
        texts[_recipe_name(stage)] = recipe.to_yaml()
    return texts


def _run_stages(run: Callable[[list[str]], int], folder: Path, data: DatasetFiles) -> int:
    """Run the verbs one after the other, until one ends with another code than 0."""
    tune = folder / "tune"
    stages: list[tuple[str | Path, ...]] = [
        *(("train", folder / _recipe_name(stage)) for stage in STAGES),
        ("eval", "run", f"llava:{data.test}@{data.images}", "--model", tune, "--output", folder / "eval", "--untuned",
         "--modes", "own,wrong,blind", "--baselines", "majority,question_majority", "--probe",
         "--train-answers", f"{data.train}@{data.images}", "--batch-size", "32",
         "--max-new-tokens", str(ANSWER_TOKENS)),
        ("export", tune, folder / "export", "--to", "hf"),
        ("report", tune, "--output", folder / "report.html"),
    ]  # fmt: skip
    for words in stages:
        if words[0] == "export" and (folder / "export").exists():
            logger.info("\n%s was written before and is left as it is.", folder / "export")
            continue
        logger.info("\n$ %s", _shown(*words))
        code = run([*map(str, words)])
        if code:
            return code
    return 0


def _shown(*words: str | Path) -> str:
    """A command as a user can paste it: the program by name, or by path where the environment is not activated."""
    beside = Path(sys.executable).parent / "mm-moslora"
    program = beside if shutil.which("mm-moslora") is None and beside.is_file() else Path("mm-moslora")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join(map(str, (program, *words)))
