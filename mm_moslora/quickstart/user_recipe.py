"""Write a commented recipe for a user's own pictures into a new folder, with training data and questions."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mm_moslora_eval.metrics.exact_match import relaxed

from mm_moslora.config import Recipe
from mm_moslora.quickstart import model_assets
from mm_moslora.quickstart.asset_cache import Say, silent
from mm_moslora.quickstart.own_data import LEAST_TEST, OwnData, first_of
from mm_moslora.quickstart.user_data import lines_of, read_own
from mm_moslora.utils.errors import ConfigError, DataError
from mm_moslora.utils.file_locks import new_folder
from mm_moslora.utils.folder_marks import refuse_full_folder

PartsName = Literal["quickstart", "hub", "gguf"]

_NOT_IN_YAML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

STEP_TOKENS = 1600
"""Target tokens per step: fewer give noisy gradients, more give slow steps on a CPU."""
STEPS, MOST_EPOCHS = 100, 20
MOST_LEFT_OUT = 0.2
"""Share of unusable pictures or records above which nothing is written."""
_PER_TURN = 12
"""Tokens of the chat template around a question and its answer."""
_BYTES_PER_TOKEN = 4.0
"""Of English text. Other scripts have fewer, and their steps are larger than `STEP_TOKENS`."""
_LONG_BYTES_PER_TOKEN = 1.5
"""Bytes per token of text that the tokenizer splits badly; for limits that must hold."""


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """The models of the recipe."""

    language: str
    vision: dict[str, Any]
    visual_tokens: int
    why: str
    projector: str = "avg_pool, shuffle: 2"
    tokens: str = "each the mean of 2 x 2 patches"
    aspect: str = "resize   # the whole picture, whatever its shape; pad and crop spend or lose a part of it"


def _parts(name: PartsName, say: Say) -> ModelParts:
    if name == "hub":
        return ModelParts(
            language="HuggingFaceTB/SmolLM2-135M-Instruct",
            vision={"name": "google/siglip-base-patch16-224", "feature_layer": -2},
            visual_tokens=49,
            why="SigLIP was trained on pictures with texts; it is ten times as slow as EfficientNet-Lite0 on a CPU.",
        )
    if name == "gguf":
        return ModelParts(
            language="HuggingFaceTB/SmolLM2-135M-Instruct",
            vision={"name": "openai/clip-vit-base-patch32", "feature_layer": -2},
            visual_tokens=49,
            why="llama.cpp holds a CLIP tower with this projector: `mm-moslora export RUN OUT --to gguf`.",
            projector="mlp2x_gelu",
            tokens="one for each patch of 32 x 32 pixels",
            aspect="pad      # to a square, as llama.cpp does",
        )
    return ModelParts(
        language=str(model_assets.language_model(say)),
        vision={"name": str(model_assets.efficientnet_timm(say)), "image_size": 256, "feature_layer": -1},
        visual_tokens=16,
        why="EfficientNet-Lite0 knows 1,000 kinds of things from photos; 256 pixels are 8 x 8 patches.",
    )


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """Number of steps, and size of a step."""

    batch: int
    steps: int
    per_epoch: int
    tokens: int
    """Target tokens of a step."""
    max_length: int

    @classmethod
    def of(cls, data: OwnData, visual_tokens: int) -> StepSchedule:
        """The size for given data: steps of about `STEP_TOKENS`, and `STEPS` of them where the data suffice."""
        mean, longest = data.text_bytes
        tokens = visual_tokens + _PER_TURN * data.turns + mean / _BYTES_PER_TOKEN
        batch = min(32, max(4, round(STEP_TOKENS / tokens)))
        per_epoch = math.ceil(data.epoch / batch)
        limit = visual_tokens + _PER_TURN * data.longest[0] + longest / _LONG_BYTES_PER_TOKEN
        return cls(
            batch=batch,
            steps=min(STEPS, MOST_EPOCHS * per_epoch),
            per_epoch=per_epoch,
            tokens=100 * round(batch * tokens / 100),
            max_length=min(2048, max(128, 64 * math.ceil(limit / 64))),
        )


def initialise(
    source: Path,
    output: Path,
    *,
    images: Path | None = None,
    follow_links: bool = False,
    parts: PartsName = "quickstart",
    vlm: str | None = None,
    gpu: str | None = None,
    most_left_out: float = MOST_LEFT_OUT,
    say: Say = silent,
) -> str:
    """Write data, held-out questions, a recipe and `left_out.jsonl` into a new folder; a summary with next commands."""
    if vlm is None and gpu is not None:
        raise ConfigError(f"--gpu is {gpu}, which decides for a ready-made model only. Name one with --vlm.")
    if vlm is not None and parts != "quickstart":
        raise ConfigError(f"--vlm brings all its parts, and --parts is {parts}. Leave one of them out.")
    if output.name in ("", ".."):
        raise ConfigError(f"{output} already exists. Name a new folder, such as {output / 'first'}.")
    refuse_full_folder(output)
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{output} lies among the pictures of {source}. Choose a folder beside them.")
    data = read_own(source, images=images, follow_links=follow_links)
    _refuse_left_out(data, source, most_left_out)
    for path in (output.resolve(), data.images):
        if _NOT_IN_YAML.search(str(path)):
            raise ConfigError(f"The folder {str(path)!a} holds characters that a recipe cannot hold. Rename it.")
    recipe, steps = _written(output.resolve(), data, parts, vlm, gpu, say)
    left_out = [*data.faults, *data.notes]
    with new_folder(output) as folder:
        for file, lines in (
            ("train.jsonl", lines_of(data.train)),
            *((_repeated_file(times), lines_of(records)) for times, records in data.repeated.items()),
            ("recipe.yaml", [recipe]),
            *_tests(data),
            *([("left_out.jsonl", lines_of([{"reason": reason} for reason in left_out]))] if left_out else []),
        ):
            with (folder / file).open("w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(lines)
    return _closing_text(output, data, steps)


def _refuse_left_out(data: OwnData, source: Path, most: float) -> None:
    count, of = len(data.faults), len(data.faults) + data.used
    if count > most * of:
        raise DataError(
            f"{count} of {of} pictures or records of {source} cannot be used ({100 * count / of:.0f} %, at most "
            f"{100 * most:.0f} % may be): {first_of(data.faults, between='; ', shown=10)}. Mend them, or accept it "
            "with --max-left-out 1."
        )


def _written(
    folder: Path, data: OwnData, parts: PartsName, vlm: str | None, gpu: str | None, say: Say
) -> tuple[str, int]:
    """The recipe, and its number of steps."""
    if vlm is not None:
        from mm_moslora.quickstart.ready_made_recipe import ready_made_recipe

        return ready_made_recipe(folder, data, vlm=vlm, sources=_sources(data), gpu=gpu)
    chosen = _parts(parts, say)
    schedule = StepSchedule.of(data, chosen.visual_tokens)
    recipe = _recipe(folder, data, chosen, schedule)
    Recipe.from_yaml(recipe)
    return recipe, schedule.steps


def _repeated_file(times: int) -> str:
    return f"train-x{times}.jsonl"


def _sources(data: OwnData) -> str:
    """The sources of `data.train`, one per line."""
    folder = _pictures(data)
    lines = [f"- {{path: train.jsonl, {folder}}}"]
    if data.repeated:
        lines.append(
            "# Of small classes there are fewer different conversations; weight: how often an epoch sees each."
        )
    lines += [f"- {{path: {_repeated_file(times)}, {folder}, weight: {times}}}" for times in sorted(data.repeated)]
    return "\n".join(f"    {line}" for line in lines)


def _pictures(data: OwnData) -> str:
    """The keys of a source that say where its pictures are."""
    links = ", follow_links: true" if data.follow_links else ""
    return f"image_folder: {_quoted(str(data.images))}{links}"


def _quoted(value: Any) -> str:
    """A value as YAML, of which JSON is a subset."""
    return json.dumps(value, ensure_ascii=False)


def _recipe(folder: Path, data: OwnData, parts: ModelParts, schedule: StepSchedule) -> str:
    vision = ", ".join(f"{key}: {_quoted(value)}" for key, value in parts.vision.items())
    per_epoch = schedule.per_epoch
    passes = schedule.steps / per_epoch
    return f"""\
# Written by `mm-moslora init` from {data.source.encode("unicode_escape").decode()}. Change what you like.
name: {_quoted(folder.name)}
model:
  language: {_quoted(parts.language)}
  # {parts.why}
  vision: {{{vision}}}
  # {parts.visual_tokens} visual tokens per picture, {parts.tokens}. A least-squares fit to the answers
  # comes before the first step and takes the place of an alignment stage.
  projector: {{kind: {parts.projector}, fit_to_answers: true}}
  image_aspect: {parts.aspect}
  system_prompt: ""      # the default one would cost as many tokens as the picture
# A new kind of input has to be learned, not a new tone: a high rank in every linear layer.
adapter: {{rank: 64, alpha: 128}}
data:
  train:
{_sources(data)}
  # The longest conversation has {data.longest[0]} questions and {data.text_bytes[1]:,} bytes of text.
  max_length: {schedule.max_length}
  order: random
# {schedule.steps} steps are few, so the rates are high and the optimiser's memory short.
# Beyond 1,000 steps take lr: 2.0e-4 and leave betas out. The projector's rate is low: it keeps what the fit gave it.
optim: {{lr: 1.0e-3, projector_lr: 2.0e-5, warmup: 0.05, betas: [0.9, 0.98]}}
train:
  output: {_quoted(str(folder / "run"))}
  # {schedule.batch} conversations of {data.turns:.3g} questions a step, about {schedule.tokens:,} tokens.
  # The data last {per_epoch} steps, an epoch; these steps see them {passes:.2g} times, each time in another order.
  steps: {schedule.steps}
  global_batch: {schedule.batch}
  micro_batch: {schedule.batch}
  save_every: 50
track: {{trackers: []}}
"""


_TASK = """\
# Written by `mm-moslora init`: {why}.
name: {name}
source: {{kind: llava, path: {name}.jsonl, {pictures}}}
prompt: {{template: "{{question}}"}}
decoding: {{max_new_tokens: {tokens}}}
metric: exact
aggregation: {aggregation}
"""


def _tests(data: OwnData) -> Iterator[tuple[str, Iterable[str]]]:
    """The files of held-out questions, and the task files that the printed command needs for them."""
    answer = min(256, 16 * math.ceil(data.longest[1] / 2 / 16))
    if data.test:
        yield "test.jsonl", lines_of(data.test)
    if data.test and data.follow_links:  # `llava:FILE` follows no links
        why = "short answers, scored by exact match"
        yield "test.yaml", [_TASK.format(why=why, name="test", pictures=_pictures(data), tokens=64, aggregation="mean")]
    if data.captions:
        yield "captions.jsonl", lines_of(data.captions)
        why = "answers that are sentences are scored as captions (CIDEr-D, BLEU, ROUGE-L)"
        pictures, aggregation = _pictures(data), "caption"
        yield (
            "captions.yaml",
            [_TASK.format(why=why, name="captions", pictures=pictures, tokens=answer, aggregation=aggregation)],
        )


def _closing_text(output: Path, data: OwnData, steps: int) -> str:
    short = str(output / "test.yaml") if data.follow_links else f"llava:{output / 'test.jsonl'}@{data.images}"
    run = str(output / "run")
    modes = ("own", "wrong", "blind") if data.test_pictures >= LEAST_TEST else ("own", "blind")
    trained = ["train.jsonl", *(_repeated_file(times) for times in sorted(data.repeated))]
    commands: Sequence[Sequence[str]] = (
        ("data", "check", str(output / "recipe.yaml")),
        *([("eval", "run", short, "--model", str(output / "recipe.yaml"), "--output", str(output / "eval"), "--probe")]
          if data.test else []),
        ("train", str(output / "recipe.yaml")),
        ("eval", "run", *([short] if data.test else []), *([str(output / "captions.yaml")] if data.captions else []),
         "--model", run, "--output", str(output / "eval"), "--untuned",
         "--modes", ",".join(modes), *(("--baselines", "majority,question_majority", "--probe") if data.test else ()),
         *(word for file in trained if data.test for word in ("--train-answers", f"{output / file}@{data.images}"))),
        ("report", run),
    )  # fmt: skip
    both = f" and {len(data.captions)} for a sentence" if data.captions and data.test else ""
    lines = [
        f"{output}: {data.epoch} conversations about {data.train_pictures} training pictures, "
        f"{len(data.test or data.captions)} questions{both} about {data.test_pictures} held-out pictures; "
        f"{steps} steps."
    ]
    if left_out := [*data.faults, *data.notes]:
        lines += [f"Left out ({output / 'left_out.jsonl'} names all {len(left_out)}):", first_of(left_out)]
    if data.lopsided:
        lines += [
            "Often right without the picture, so give more pictures with other answers, or trust only the lead over "
            "blind and over the best answer per question:",
            first_of(data.lopsided),
        ]
    if len({relaxed(row["answer"]) for row in data.test}) == 1:
        only = data.test[0]["answer"]
        lines.append(f'All held-out questions have the answer "{only}", so no score tells what was learned.')
    if 0 < len(data.test) < 200:
        from mm_moslora_eval.scoring.measured_scores import smallest_shown

        shown = smallest_shown(len(data.test))  # NaN for one
        effect = f"differences of about {100 * shown:.0f} points or more" if shown < 1 else "nothing"
        lines.append(f"Held-out questions: {len(data.test)}; so many show {effect}. More pictures show smaller ones.")
    if "wrong" not in modes:
        lines.append(
            f"Only {data.test_pictures} picture is held out, so the evaluation goes without `--modes wrong`, which "
            "exchanges pictures; with more pictures two are held out."
        )
    lines += ["", "Next:", *(f"  {shlex.join(['mm-moslora', *command])}" for command in commands)]
    return "\n".join(lines)
