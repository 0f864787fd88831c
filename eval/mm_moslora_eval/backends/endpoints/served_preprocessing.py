"""Whether a server prepares pictures and prompts as a training did, by the digest that `mm-moslora serve` publishes."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.backends.openai_endpoint import Endpoint


def require_preprocessing(endpoint: Endpoint, folder: Path) -> None:
    """Refuse a server that does not publish the preprocessing of a folder.

    Args:
        endpoint: the server, and the name of its model.
        folder: a run, a checkpoint or an export.

    Raises:
        EvalError: the server publishes another digest or none, or the folder has no fingerprint.
        ModelError: there is no model, or its fingerprint cannot be read.
    """
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
