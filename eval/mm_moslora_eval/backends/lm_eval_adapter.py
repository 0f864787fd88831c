"""Checkpoints of mm_moslora in lm-evaluation-harness: an `HFLM` around the merged language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.package_requirements import install_command


def lm_eval_model(folder: Path, *, batch_size: int = 8, dtype: str = "auto") -> Any:
    """An `lm_eval.models.huggingface.HFLM` of a run, a checkpoint or an export of mm_moslora, adapters merged.

    Give it to `lm_eval.simple_evaluate(model=...)`. Of a vision-language model only the language model is evaluated.

    Args:
        folder: any folder that `mm_moslora.models.load_model.load` reads.
        batch_size: requests per forward pass.
        dtype: fp32, bf16, fp16 or auto.

    Raises:
        EvalError: lm-eval is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise EvalError(f"lm-eval is not installed ({error}); run: {install_command('lm-eval')}") from error
    from mm_moslora.data.preprocessing_print import check_preprocessing
    from mm_moslora.models.load_model import load
    from mm_moslora.models.precision import dtype_of, resolve_precision
    from mm_moslora.utils import distributed

    assembly = load(folder, dtype=dtype_of(resolve_precision(dtype)))  # type: ignore[arg-type]
    check_preprocessing(folder, assembly)
    model: Any = assembly.model.to(distributed.device())  # type: ignore[arg-type]
    # The harness chooses a backend by the configuration's type and has none for a vision-language model.
    return HFLM(pretrained=model, tokenizer=assembly.tokenizer, backend="causal", batch_size=batch_size)
