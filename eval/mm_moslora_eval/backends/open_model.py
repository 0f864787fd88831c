"""Opens the model that `--model` names: a folder of mm_moslora, `hf:ID`, a service, stored answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.hardware import keep_freed_memory
from mm_moslora.utils.identity import sha256_of, sha256_of_values
from mm_moslora.utils.run_paths import MANIFEST, find_checkpoint

if TYPE_CHECKING:
    import torch

    from mm_moslora.models.assembly import Parts
    from mm_moslora_eval.backends.openai_endpoint import Endpoint, ServiceSettings
    from mm_moslora_eval.protocol.model_interface import Model

Precision = Literal["auto", "fp32", "bf16", "fp16"]


KINDS = ("hf", "replay", "openai")
_FORMS = "FOLDER, hf:ID, openai:URL#MODEL or replay:FILE"


def is_local(name: str) -> bool:
    """Whether this process itself computes the answers."""
    kind, separator, _ = name.partition(":")
    return not separator or kind not in ("replay", "openai")


def check_name(name: str) -> None:
    """Check the name of a model before anything is imported or read."""
    if not name:
        raise EvalError(f"No model was given. Add --model {_FORMS}.")
    kind, separator, _ = name.partition(":")
    if separator and kind in KINDS:
        return
    if not Path(name).is_dir():
        raise EvalError(
            f"--model {name!r} is not a folder. FOLDER is that of a run, a checkpoint or an export; known: {_FORMS}."
        )
    find_checkpoint(Path(name))


def name_with_files(name: str) -> str:
    """The name of a model, and of one on this machine a hash of its files that is found without loading them.

    The manifest of a checkpoint holds the hashes of its files; of an export the names and sizes count.
    """
    kind, separator, rest = name.partition(":")
    if not name or (separator and kind in ("hf", "openai")):
        return name
    path = Path(rest) if separator and kind == "replay" else find_checkpoint(Path(name))
    file = path / MANIFEST if path.is_dir() else path
    if file.is_file():
        return f"{name}, files {sha256_of(file)[:12]}"
    sizes = sorted((str(item.relative_to(path)), item.stat().st_size) for item in path.rglob("*") if item.is_file())
    return f"{name}, files {sha256_of_values(sizes)[:12]}"


def open_model(
    name: str,
    *,
    precision: Precision = "auto",
    reference: bool = False,
    untuned: bool = False,
    features: Path | None = None,
    service: ServiceSettings | None = None,
    other_preprocessing: bool = False,
) -> Model:
    """Load a model.

    Args:
        name: `FOLDER` (a run, a checkpoint or an export), `hf:ID_OR_FOLDER`, `openai:URL#MODEL`, `replay:FILE`.
        precision: dtype of the weights; auto: bf16 on an accelerator that has it, else fp32.
        reference: one question at a time, with no shared computation.
        untuned: load the model from which a run or checkpoint started: its recipe's parts before any step.
        features: folder of the vision tower's features of pictures, which are encoded once for all models with it.
        service: limits, prices and patience with a service.
        other_preprocessing: accept that pictures or prompts are prepared otherwise than in training.

    Raises:
        EvalError: the name has another form, or there is no loadable model.
        ModelError: the folder holds no model of mm_moslora.
    """
    check_name(name)
    kind, separator, rest = name.partition(":")
    kind = kind if separator else ""
    if kind != "openai" and service and service.expect_preprocessing is not None:
        raise EvalError(
            f"--expect-preprocessing is for openai:URL#MODEL of `mm-moslora serve`, and the model is {name!r}. A "
            "folder is compared with its training without it."
        )
    if kind == "openai":
        from mm_moslora_eval.backends.openai_endpoint import EndpointModel, ServiceSettings

        chosen = service or ServiceSettings()
        endpoint = chosen.endpoint(name)
        if chosen.expect_preprocessing is not None:
            _require_preprocessing(endpoint, chosen.expect_preprocessing)
        return EndpointModel(endpoint, reference=reference)
    if kind == "replay":
        from mm_moslora_eval.backends.replay_model import ReplayModel

        return ReplayModel(Path(rest))
    dtype = _weights_dtype(precision)
    if kind == "hf":
        from mm_moslora_eval.backends.transformers_model import TransformersModel

        return TransformersModel.from_pretrained(
            rest, dtype=dtype, reference=reference, other_preprocessing=other_preprocessing
        )
    return _open_folder(
        name, dtype=dtype, reference=reference, untuned=untuned, features=features,
        other_preprocessing=other_preprocessing,
    )  # fmt: skip


def _weights_dtype(precision: Precision) -> torch.dtype:
    from mm_moslora.models.precision import dtype_of, resolve_precision
    from mm_moslora.utils import distributed

    if distributed.device().type == "cpu":
        keep_freed_memory()
    return dtype_of(resolve_precision(precision))


def _open_folder(
    name: str, *, dtype: torch.dtype, reference: bool, untuned: bool, features: Path | None, other_preprocessing: bool
) -> Model:
    """The model of a run, a checkpoint or an export, shown as in its training."""
    from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
    from mm_moslora.data.preprocessing_print import check_preprocessing, trained_videos
    from mm_moslora.models.load_model import load
    from mm_moslora.models.vision.feature_store import FeatureStore
    from mm_moslora.models.vlm import has_own_forward
    from mm_moslora.utils import distributed

    folder = find_checkpoint(Path(name))
    if untuned and not (folder / MANIFEST).is_file():
        raise EvalError(f"{name} is an export, which has no model before tuning. Give a run or a checkpoint.")
    assembly = _before_tuning(folder, dtype) if untuned else load(folder, dtype=dtype)
    name = f"{name}, before tuning" if untuned else name
    if check_preprocessing(folder, assembly, accepted=other_preprocessing):
        name = f"{name}, other preprocessing"
    frames, fps, whole = trained_videos(folder)
    assembly.model.to(distributed.device())  # type: ignore[arg-type]
    if has_own_forward(assembly.model):
        from mm_moslora_eval.backends.transformers_model import TransformersModel

        encoder = ConversationEncoder.of(assembly)
        return TransformersModel(
            assembly.model, assembly.processor, name=name, reference=reference, encoder=encoder,
            boxes=assembly.box_form, whole_videos=whole,
            trained_frames=frames, trained_fps=fps,
        )  # fmt: skip
    from mm_moslora_eval.backends.local_model import LocalModel

    store = None if features is None or reference else FeatureStore.of(assembly.model, features)
    return LocalModel(assembly, name=name, reference=reference, store=store, trained_frames=frames, trained_fps=fps)


def _before_tuning(folder: Path, dtype: torch.dtype) -> Parts:
    """The model from which a run or a checkpoint started."""
    from mm_moslora.models.assembly import load_parts
    from mm_moslora.models.load_model import model_of, recipe_of
    from mm_moslora.utils.distributed import seed_everything

    seed_everything(recipe_of(folder).train.seed)  # a new projector is drawn as in the run
    config = model_of(folder)
    if (weights := recipe_of(folder).model.projector.weights) and config.projector.weights is None:
        raise EvalError(f"{weights} (model.projector.weights) is no longer what {folder} began with. Restore it.")
    return load_parts(config, dtype=dtype)


def _require_preprocessing(endpoint: Endpoint, folder: Path) -> None:
    """Refuse a server that does not publish the preprocessing of a folder."""
    from mm_moslora.data.preprocessing_print import preprocessing_digest

    if not (expected := preprocessing_digest(folder)):
        raise EvalError(f"{folder} has no preprocessing.json to compare with.")
    said = endpoint.get(f"/models/{quote(endpoint.model)}")
    found = said.get("preprocessing") if isinstance(said, dict) else None
    where = f"{endpoint.model} at {endpoint.url}"
    if not isinstance(found, str):
        raise EvalError(
            f"{where} publishes no digest of its preprocessing, expected {expected} of {folder}. `mm-moslora serve` "
            "does, unless it was started with --other-preprocessing. Compare another server by `compare` of "
            "`mm_moslora.data.preprocessing_print`."
        )
    if found != expected:
        raise EvalError(
            f"{where} prepares pictures or prompts otherwise than the training of {folder}: its digest is "
            f"{found[:80]}, expected {expected}. Serve {folder}, or expect the folder that is served."
        )
