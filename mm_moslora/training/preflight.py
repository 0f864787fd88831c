"""Checks before the first step, from the recipe, file names and installed packages.

`check_settings` needs no file of the run: every verb that takes a recipe calls it first, on a machine without the data,
too. `check_recipe` adds files and packages; the command line calls it before it trains, and `launch` before it starts
ranks. Both import nothing heavy unless a recipe has unusual names. `check_libraries` imports the libraries of a run and
asks them. All run before models and records are loaded. `check_model` asks a model, which may be without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mm_moslora.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    Recipe,
    refuse_lacking,
    usual_names,
)
from mm_moslora.config.llava_chat_templates import require_template
from mm_moslora.config.run_config import OPTIMIZERS
from mm_moslora.data.chat.record_keys import READ, READ_OF_OBJECTIVE
from mm_moslora.data.sources.open_sources import require_sources
from mm_moslora.launch.imported_code import import_words
from mm_moslora.training.deepspeed_presets import read_preset, wants_cpu_adam
from mm_moslora.training.supervision.run_folder import refuse_folder, refuse_resume
from mm_moslora.utils.errors import AdapterError, ConfigError, DataError, TrainingError, suggestion
from mm_moslora.utils.run_paths import (
    adapter_folder,
    checkpoints,
    is_adapter,
    require_model,
    require_projector,
    resume_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOSS, ACCURACY = "validation_loss", "validation_token_accuracy"
"""The metrics of held-out records."""


def check_recipe(recipe: Recipe, *, resume: str = "auto", tasks: Sequence[str] | None = None) -> None:
    """Refuse a recipe that cannot run, without PyTorch; `tasks`: names in `validate.tasks`, None: not known here."""
    run = Path(recipe.train.output)
    before = resume_folder(resume) or next((folder for _, folder in reversed(checkpoints(run))), None)
    if before is not None and resume != "never":
        from mm_moslora.models.model_paths import require_imports

        require_imports(before)
    check_settings(recipe, tasks=tasks)
    for check in checks_here(recipe, resume=resume).values():
        check()


def checks_here(recipe: Recipe, *, resume: str = "auto") -> dict[str, Callable[[], None]]:
    """The checks of a recipe that depend on this machine's files and packages, by subject."""
    run = Path(recipe.train.output)

    def folder() -> None:
        refuse_folder(run)
        refuse_resume(run, resume)

    def model() -> None:
        goes_on = resume_folder(resume) is not None or (resume != "never" and bool(checkpoints(run)))
        if not goes_on:  # on resume, the checkpoint helps to find moved parts
            _check_parts(recipe.model, recipe.adapter)

    return {
        "run folder": folder,
        "deepspeed file": lambda: _check_file(recipe.train.zero),
        "packages": lambda: refuse_lacking(recipe),
        "data": lambda: check_data(recipe.data),
        "caches": lambda: _check_caches(recipe),
        "model": model,
    }


def _check_file(zero: str) -> None:
    if zero.endswith(".json"):
        read_preset(zero)


def check_settings(recipe: Recipe, *, tasks: Sequence[str] | None = None) -> None:
    """Refuse a recipe that cannot run on any machine, as far as this can be decided without its files."""
    check_names(recipe)
    own = Path(recipe.train.zero)
    if own.suffix != ".json" or own.is_file():
        check_zero(recipe)
    _check_measuring(recipe, tasks)


def check_names(recipe: Recipe) -> None:
    """Refuse names that no registry holds; only a name that is not usual imports its registry."""
    model, train = recipe.model, recipe.train
    require_template(model.chat_template)
    check_adapter_names(recipe.adapter)
    for key in ("name", "fuse_with"):
        _require_library(f"model.vision.{key}", getattr(model.vision, key, None) or "")
    if model.projector.kind not in usual_names.PROJECTOR_KINDS:
        from mm_moslora.models.projectors.projector import projector_class

        projector_class(model.projector.kind)
    if model.attention not in usual_names.ATTENTION:
        from mm_moslora.kernels.attention.attention_choice import require_attention

        require_attention(model.attention)
    if train.compile is not None and train.compile not in usual_names.COMPILE_BACKENDS:
        from mm_moslora.models.memory_efficient.kernel_selection import require_backend

        require_backend(train.compile)
    if not import_words():  # else the table with those of imported files is asked when the run begins
        _require_rewards(recipe.grpo.rewards)
    columns = sorted(set().union(*READ.values(), READ_OF_OBJECTIVE[recipe.objective]))
    for source in (*recipe.data.train, *recipe.data.validation):
        if odd := [key for key in source.columns if key not in columns]:
            raise ConfigError(
                f"columns of {source.path} gives a column to {odd[0]!r}, expected a field of records: "
                f"{', '.join(columns)}.{suggestion(odd[0], columns)}"
            )


def _require_rewards(names: Sequence[str]) -> None:
    known = usual_names.REWARDS
    if odd := [name for name in names if name not in known]:
        raise ConfigError(
            f"grpo.rewards holds {odd[0]!r}, expected any of {', '.join(known)}, or a reward that a file of "
            f"--import FILE.py adds.{suggestion(odd[0], known)}"
        )


def check_adapter_names(adapter: AdapterConfig) -> None:
    """Refuse a method of PEFT or an option of it, or a word for targets, that does not exist; see `check_names`."""
    targets, words = adapter.targets, {"all-linear", str(type(adapter)().targets)}
    is_word = isinstance(targets, str) and targets.replace("-", "_").isidentifier()
    if is_word and targets not in words and (hint := suggestion(str(targets), words)):
        raise ConfigError(
            f"adapter.targets is {targets!r}, expected {' or '.join(sorted(words))}, or a list of names of layers."
            f"{hint}"
        )
    if adapter.peft:
        from mm_moslora.models.trainable_parts import adapter_config

        adapter_config(adapter)


def _require_library(key: str, name: str) -> None:
    library, colon, _ = name.partition(":")
    libraries = usual_names.TOWER_LIBRARIES
    if colon and library not in libraries and not Path(name).exists():
        raise ConfigError(
            f"{key} is {name!r}, expected a folder, a hub id, or a model of {' or '.join(libraries)} such as "
            f"timm:MODEL.{suggestion(library, libraries)}"
        )


def check_data(config: DataConfig) -> None:
    """Refuse data sources with missing files."""
    for key, sources in (("data.train", config.train), ("data.validation", config.validation)):
        if sources or key == "data.train":
            try:
                require_sources(sources)
            except DataError as error:
                raise DataError(f"{key}: {error}") from error


def check_zero(recipe: Recipe) -> None:
    """Refuse settings of a run that the engine in `train.zero` does not take; `plan` asks the same."""
    train, adapter, optimizer = recipe.train, recipe.adapter, recipe.optim.optimizer
    traits = OPTIMIZERS[optimizer]
    if train.zero == "none":
        if train.precision == "fp16":
            raise ConfigError(
                "train.precision is fp16, which needs loss scaling; plain torch (train.zero none) has none. "
                "Choose bf16 or fp32, or zero0 to zero3."
            )
        return
    if train.zero == "auto":  # ZeRO-1 or 2
        return
    preset = read_preset(train.zero)
    settings = preset.get("zero_optimization", {})
    offload = settings.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise ConfigError(
            f"train.zero {train.zero} keeps the optimiser's state on a disk (offload_optimizer.device nvme), where "
            "checkpoints cannot read it. Choose cpu; weights may be there (offload_param)."
        )
    stage = settings.get("stage", 0)
    if recipe.objective != "sft":
        _check_zero_of_trl(recipe, settings)
    if traits.whole_because and stage:
        raise ConfigError(
            f"optim.optimizer is {optimizer}, and train.zero {train.zero} is a ZeRO-{stage}, which gives a rank flat "
            f"parts of parameters: {traits.whole_because}. Choose zero0, none or auto, or optim.optimizer adamw, whose "
            "states ZeRO divides over the ranks."
        )
    offloads = isinstance(offload, dict) and offload.get("device") == "cpu" and stage == 3
    share = offload.get("ratio", "auto") if offloads else "auto"
    if share not in ("auto", 1) and not wants_cpu_adam(preset):
        raise ConfigError(
            f"train.zero {train.zero} keeps a share of the optimiser's state on the GPU (offload_optimizer.ratio "
            f"{share}), which only DeepSpeed's own AdamW can. Set zero_force_ds_cpu_optimizer to true, or leave ratio "
            "out."
        )
    if train.compile is not None and stage == 3:
        raise ConfigError(
            f"train.compile is {train.compile!r} with train.zero {train.zero}. Compiled layers are tried on ZeRO-0 to "
            "2 and plain torch; the hooks by which ZeRO-3 fetches weights break their graphs. Take zero2, or leave "
            "train.compile out."
        )
    if stage == 3 and adapter.peft:
        raise ConfigError(
            f"adapter.peft is {adapter.peft.get('type')}, and train.zero {train.zero} is a ZeRO-3, which cuts the "
            "weights up before PEFT's methods have read them. Choose zero0 to zero2."
        )


def _check_zero_of_trl(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Refuse what TRL's trainers were not tried with, or cannot."""
    zero = recipe.train.zero
    groups = {key: value for key, value in settings.items() if key.startswith("offload_") and isinstance(value, dict)}
    odd = [key for key, group in groups.items() if group.get("device", "none") != "none"]
    odd += [key for key, value in settings.items() if key.startswith(("zero_quantized_", "cpu_offload")) and value]
    found = ""
    if not settings.get("stage"):
        found = "is a ZeRO-0, which divides nothing. Leave it out: ranks train data-parallel"
    elif odd:
        found = f"sets {', '.join(odd)}, with which TRL's trainers are not tried. Choose zero1, zero2 or zero3"
    elif recipe.data.pack_tokens:
        found = "is set with data.pack_tokens, with which it is not tried. Leave one of them out"
    if found:
        raise ConfigError(f"objective is {recipe.objective}, and train.zero {zero} {found}.")


def _check_measuring(recipe: Recipe, tasks: Sequence[str] | None) -> None:
    validate, held_out = recipe.validate, bool(recipe.data.held_out)
    if validate.general_text is not None and not Path(validate.general_text).exists():
        raise TrainingError(
            f"validate.general_text is {validate.general_text!r}, and nothing is there. Check its path."
        )
    if validate.samples and not held_out:
        raise TrainingError(
            f"validate.samples is {validate.samples}, but data.validation names no source and none of "
            "data.train has hold_out. Add one."
        )
    best = validate.best
    if best is None:
        return
    if not recipe.train.validate_every:
        raise TrainingError(
            f"validate.best is {best!r}, but train.validate_every is 0, so nothing is measured before the end. Set it "
            "to a number of steps."
        )
    losses = [LOSS, ACCURACY] if held_out else []
    if not losses and (not validate.tasks or best in (LOSS, ACCURACY)):
        nor = "" if best in (LOSS, ACCURACY) else " and validate.tasks no task"
        raise TrainingError(
            f"validate.best is {best!r}, but data.validation names no source and none of data.train has hold_out{nor}, "
            "so that nothing is measured for it. Name one."
        )
    prefixes = [f"eval/{name}/" for name in tasks or ()] if validate.tasks else []
    if best not in losses and not best.startswith(tuple(prefixes) or ("eval/",) * bool(validate.tasks)):
        expected = [*losses, *(f"{prefix}METRIC" for prefix in prefixes or ["eval/TASK/"] * bool(validate.tasks))]
        raise TrainingError(
            f"validate.best is {best!r}, which is not measured; expected one of {', '.join(expected)}."
            f"{suggestion(best, expected)}"
        )


def _check_caches(recipe: Recipe) -> None:
    vision = recipe.model.vision
    folders = {"data.cache": recipe.data.cache, "model.vision.feature_cache": vision and vision.feature_cache}
    for key, name in folders.items():
        if name and Path(name).expanduser().is_file():
            raise ConfigError(
                f"{key} is {name!r}, which is a file; expected a folder, which is created if it is missing."
            )


def _check_parts(model: ModelConfig, adapter: AdapterConfig) -> None:
    """Check the files that a run starts from, by their names alone."""
    require_model("model.language", model.language)
    require_model("model.vlm", model.vlm)
    for key in ("name", "fuse_with"):
        name = getattr(model.vision, key, None)
        if name and not name.startswith(("open_clip:", "timm:")):
            require_model(f"model.vision.{key}", name)
    if model.vision is not None and model.projector.weights:
        require_projector(model.projector.weights)
    if adapter.weights and model.has_adapters and not is_adapter(adapter.weights):
        adapter_folder(adapter.weights)  # may raise a more specific error
        raise AdapterError(
            f"adapter.weights is {adapter.weights!r}, which holds no adapter. Give a run folder, a checkpoint or an "
            "adapter folder."
        )


def check_libraries(recipe: Recipe, *, fresh: bool = True) -> None:
    """Refuse what the libraries or this machine do not support; `fresh`: the run starts from the recipe's weights."""
    from mm_moslora.kernels.attention.attention_choice import require_attention
    from mm_moslora.models.memory_efficient.kernel_selection import require_backend
    from mm_moslora.models.precision import resolve_precision
    from mm_moslora.models.trainable_parts import adapter_config, start_folder
    from mm_moslora.models.vision.timm_open_clip_tower import require_named
    from mm_moslora.training.engine import check_engine
    from mm_moslora.training.engine.optimizers import require_optimizer
    from mm_moslora.utils import distributed

    model, train = recipe.model, recipe.train
    if not fresh:
        check_zero(recipe)  # a resumed run may have another engine than its recipe names
    check_engine(train, precision=resolve_precision(train.precision), max_grad_norm=recipe.optim.max_grad_norm)
    require_optimizer(recipe.optim.optimizer, distributed.device())
    if train.compile is not None:
        require_backend(train.compile)
    require_attention(model.attention)
    if model.vision is not None and model.language is not None:
        for name in (model.vision.name, model.vision.fuse_with):
            require_named(name)
    if model.has_adapters:
        adapter_config(recipe.adapter)
        if fresh and recipe.adapter.weights:
            start_folder(recipe.adapter)


def check_model(recipe: Recipe, model: PreTrainedModel, *, layers: int) -> None:
    """Refuse settings that a model does not support; `layers` are those of the whole model, which may have a few."""
    import torch

    from mm_moslora.kernels.attention.attention_choice import choose_attention
    from mm_moslora.models.batching.row_probe import rows_of
    from mm_moslora.models.pretrained_vlm import tower_path
    from mm_moslora.models.trainable_parts import refuse_checkpointing
    from mm_moslora.models.vlm import is_multimodal, needs_padding
    from mm_moslora.training.engine.model_execution import refuse_row_shares

    train, decoder = recipe.train, model.get_decoder()
    kind = decoder.config.model_type
    if not needs_padding(model) and (train.micro_batch > 1 or recipe.data.pack_tokens):
        rows = rows_of(model, recipe.model.attention)
        if not rows.apart:
            why = "see each other" if rows.moved is not None else f"may see each other; a probe failed ({rows.fault})"
            raise ConfigError(
                f"In a {kind} model the conversations of one row {why}. Set train.micro_batch to 1 and "
                "data.pack_tokens to 0, so that a row holds one conversation."
            )
    if again := train.gradient_checkpointing:
        refuse_checkpointing(decoder, None if again is True else again, layers=layers)
    if train.vision_gradient_checkpointing and is_multimodal(model):
        refuse_checkpointing(cast("PreTrainedModel", model.get_submodule(tower_path(model))), layers=0)
    attention = choose_attention(model, recipe.model.attention, device=torch.device("cpu")).name
    refuse_row_shares(model, train.sequence_parallel, attention=attention)
