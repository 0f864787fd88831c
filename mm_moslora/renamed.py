"""Modules and names of earlier versions: importing one says where it is today."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import NoReturn

_PACKAGE = "mm_moslora."
_HARNESS = "mm_moslora_eval."
MODULES = {
    _PACKAGE + "data.chat.judged_records": "data.preferences.judged_records",
    _PACKAGE + "data.chat.preference_records": "data.preferences.preference_records",
    _PACKAGE + "data.preference_set": "data.preferences.preference_set",
    _PACKAGE + "data.sources.record_source": "data.sources.record_file",
    _PACKAGE + "models.import_checkpoint": "models.importing.import_checkpoint",
    _PACKAGE + "models.import_xtuner": "models.importing.import_xtuner",
    _PACKAGE + "reporting.comparison_charts": "reporting.comparison.comparison_charts",
    _PACKAGE + "reporting.comparison_curves": "reporting.comparison.comparison_curves",
    _PACKAGE + "reporting.comparison_page": "reporting.comparison.comparison_page",
    _PACKAGE + "serve.inference.token_sampling": "models.decoding.token_sampling",
    _PACKAGE + "training.token_budget": "training.metrics.token_budget",
    _PACKAGE + "training.precision": "models.precision",
    _PACKAGE + "utils.heartbeat": "launch.heartbeat",
    _HARNESS + "run.llm_judge": _HARNESS + "run.judging.llm_judge",
}
"""Module of before -> module that holds its names now, of the harness or below `mm_moslora`."""
NAMES = {
    _PACKAGE + "adapters.adapter_inspection": {
        "draw": "reporting.lens_maps.draw_lens", "table": "reporting.lens_maps.measures_table",
    },
    _PACKAGE + "batch": {
        "RowShare": "models.memory_efficient.row_share.RowShare",
        "WHOLE_ROW": "models.memory_efficient.row_share.WHOLE_ROW",
    },
    _PACKAGE + "compare.comparison_plan": {"Settings": "ComparisonSettings"},
    _PACKAGE + "compare.comparison_run": {"Comparison": "ArmComparison"},
    _PACKAGE + "data.chat.chat_template": {
        "Plan": "TemplatePlan", "Piece": "data.chat.guarded_tokens.TextSpan",
        "TextSpan": "data.chat.guarded_tokens.TextSpan", "Tokens": "data.chat.guarded_tokens.Tokens",
    },
    _PACKAGE + "data.chat.records": {
        "RecordFile": "data.sources.record_file.RecordFile", "RecordSource": "data.sources.record_file.RecordSource",
    },
    _PACKAGE + "data.epoch_order": {
        "pack": "data.sequence_packing.pack", "fill_rate": "data.sequence_packing.fill_rate",
    },
    _PACKAGE + "data.training_set": {
        "encode_record": "data.record_examples.encode_record",
        "placeholders_of": "data.record_examples.placeholders_of",
        "cache_places": "source_caches",
    },
    _PACKAGE + "launch.jobs": {"Engine": "JobEngine"},
    _PACKAGE + "launch.slurm_job": {"Job": "SlurmJob"},
    _PACKAGE + "models.memory_efficient.decoder_layers": {
        name: f"models.memory_efficient.loss_head.{name}" for name in ("LossHead", "head_loss_sum", "token_loss_sum")
    },
    _PACKAGE + "models.decoding.prefix_cache": {
        "shared_prefix_attention": "models.decoding.shared_prefix.shared_prefix_attention",
    },
    _PACKAGE + "models.model_paths": {
        "is_comparable": "models.weights_fingerprint.is_comparable", "is_same": "models.weights_fingerprint.is_same",
    },
    _PACKAGE + "planning.doctor": {"Finding": "Diagnosis"},
    _PACKAGE + "planning.recipe_data": {
        "view_recipe": "planning.record_views.view_recipe", "view_page": "planning.record_views.view_page",
    },
    _PACKAGE + "planning.run_plan": {"Plan": "RunPlan"},
    _PACKAGE + "reporting.run_data": {"Score": "reporting.run_rows.Score"},
    _PACKAGE + "serve.inference.continuous_batching": {
        "Engine": "GenerationEngine", "Job": "GenerationJob", "Piece": "AnswerPart",
    },
    _PACKAGE + "tracking": {"Sample": "SampleAnswer"},
    _PACKAGE + "tracking.tracker": {"Sample": "SampleAnswer"},
    _PACKAGE + "training.engine": {
        "Engine": "TrainingEngine", "Piece": "ParameterShard", "weights_place": "weights_device",
    },
    _PACKAGE + "training.resume": {
        "find_resume": "training.checkpointing.resume_choice.find_resume",
        "choose_checkpoint": "training.checkpointing.resume_choice.choose_checkpoint",
    },
    _PACKAGE + "training.run_setup": {"exclusive": "training.supervision.run_folder.exclusive"},
    _PACKAGE + "utils.files": {
        name: f"utils.folder_marks.{name}"
        for name in ("PAGE_SIGN", "in_construction", "output_file", "refuse_full_folder", "refuse_strangers")
    },
    _PACKAGE + "utils.file_locks": {"held": "lock_file"},
    _HARNESS + "backends.vlmevalkit_example": {"MoSLoRAModel": "VLMEvalKitModel"},
    _HARNESS + "eval_commands": {"compare": "compare_runs"},
    _HARNESS + "protocol.task_prompt": {"Prompt": "TaskPrompt"},
    _HARNESS + "run.answer_views": {"Selection": "DocumentSelection"},
    _HARNESS + "run.evaluate_suite": {"Comparison": "PairedComparison", "evaluate_held": "evaluate"},
    _HARNESS + "run.judging.llm_judge": {
        "GRADERS": _HARNESS + "run.judging.answer_graders.GRADERS",
        "judged": _HARNESS + "run.judging.judged_scores.judged",
    },
    _HARNESS + "run.stored_types": {"Sample": "StoredSample"},
    _HARNESS + "run.task_runner": {
        name: _HARNESS + f"run.run_claim.{name}" for name in ("claim_run", "hold_run", "open_run")
    },
    _HARNESS + "scoring.estimates": {"Estimate": "ScoreEstimate"},
}  # fmt: skip
"""Module -> name of before -> what replaces it: a name of the same module, or one below `mm_moslora`."""


def _placed(name: str) -> str:
    return name if name.startswith(_HARNESS) else _PACKAGE + name


def _missing(module: str, name: str) -> NoReturn:
    """A module's `__getattr__`."""
    new = NAMES[module].get(name)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = _placed(new) if "." in new else f"{module}.{new}"
    # An AttributeError would lose its text: `from MODULE import NAME` replaces it.
    raise ImportError(f"{module}.{name} is {new} now; CHANGELOG.md has a table of what moved.", name=name)


class _Renames(MetaPathFinder):
    """Comes before Python's own finders; it adds `__getattr__` to modules that lost a name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MODULES:
            new = _placed(MODULES[fullname])
            raise ModuleNotFoundError(
                f"{fullname} is {new} now; CHANGELOG.md has a table of what moved.", name=fullname
            )
        spec = PathFinder.find_spec(fullname, path, target) if fullname in NAMES else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                module.__dict__.setdefault("__getattr__", partial(_missing, fullname))

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Answer imports of earlier names from now on."""
    if not any(isinstance(finder, _Renames) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Renames())
