"""Hand an adapter to programs that know no mixer: fold it, and lay it out as each of them reads it.

::

    peft        adapter_config.json + adapter_model.safetensors, every option of LoRA kept
    vllm        the same with one rank, one scaling and module names as targets, which is what vLLM's loader accepts
    diffusers   pytorch_lora_weights.safetensors with `unet.` or `transformer.` names, for `load_lora_weights`
    kohya       one .safetensors file with `lora_unet_...`, `lora_te1_...` names and alphas, for A1111 and ComfyUI
    gguf        one .gguf file for llama.cpp's `--lora`

In all but the first the scaling s is a part of B, and alpha equals the rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from mm_moslora.adapters.folder_format import (
    DIFFUSERS_WEIGHTS,
    PREFIX,
    STOCK_CONFIG,
    STOCK_WEIGHTS,
    PlainPair,
    adapted_path,
    target_paths,
)
from mm_moslora.adapters.folders.authors_format import read_tensors
from mm_moslora.adapters.folders.folder_tensors import fold_state_dict, mixer_matrices
from mm_moslora.adapters.folders.foreign_formats import AdapterFolder
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.folders.save_folder import stock_config
from mm_moslora.adapters.tree import is_inner
from mm_moslora.kernels.lora.lora_math import fold
from mm_moslora.utils.errors import AdapterError, suggestion
from mm_moslora.utils.files import output_file, replace_text, replacing
from mm_moslora.utils.run_paths import writing

Layout = Literal["peft", "vllm", "diffusers", "kohya", "gguf"]
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of diffusers' pipelines that load LoRA."""
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
"""Kohya's names of the components; the first text encoder is `lora_te` where there is one only."""
_KOHYA_SIGN = b"lora_down"


def export_adapter(
    folder: str | Path,
    out: str | Path,
    *,
    layout: Layout,
    component: str = "unet",
    beside: Sequence[str] = (),
    model_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter folder in another program's layout.

    Args:
        folder: an adapter folder of any kind that `load_adapter` reads.
        out: folder to write into (made if missing), or the .gguf or Kohya's file. An export for diffusers or Kohya
            keeps what the file there holds of other components: one file for a UNet and its text encoders.
        layout: see the module's text.
        component: diffusers and kohya only: which part of the pipeline it adapts, one of `COMPONENTS`.
        beside: kohya only: the components that the file will hold in the end, which decides on `lora_te`.
        model_config: gguf only: the `config.json` of the language model, or of the model around it, as a mapping.

    Returns:
        The file or folder written.

    Raises:
        AdapterError: unknown layout, or an adapter that the layout cannot express.
        ConfigError: the folder holds an adapter already.
        OSError: `out` cannot be written.
    """
    if layout not in get_args(Layout):
        known = get_args(Layout)
        raise AdapterError(f"The layout is {layout!r}, expected one of {', '.join(known)}.{suggestion(layout, known)}")
    if component not in COMPONENTS:
        hint = suggestion(component, COMPONENTS)
        raise AdapterError(f"The component is {component!r}, expected one of {', '.join(COMPONENTS)}.{hint}")
    content = read_folder(folder)
    target = Path(out)
    if layout == "gguf":
        output_file(target)
        from mm_moslora.adapters.folders.gguf_adapter import write_gguf

        if model_config is None:
            raise AdapterError("A gguf file needs the language model's configuration. Pass model_config.")
        return write_gguf(target, plain_pairs(content), model_config)
    if layout == "kohya":
        return _write_kohya(target, plain_pairs(content), component, beside)
    config: dict[str, Any] | None = None
    if layout == "peft":
        tensors = fold_state_dict(content.tensors, mixer_form=content.config.mixer_form)
        config = stock_config(content.config, target_paths(content.tensors), None)
    elif layout == "vllm":
        tensors, config = _vllm_files(content)
    else:
        written = target / DIFFUSERS_WEIGHTS
        others = read_tensors(written) if written.is_file() else {}
        tensors = {name: factor for name, factor in others.items() if name.partition(".")[0] != component}
        tensors |= {
            f"{component}.{path}.{name}": factor
            for path, pair in plain_pairs(content).items()
            for name, factor in (("lora_A.weight", pair.A), ("lora_B.weight", pair.B))
        }
    if config is not None:  # a file for diffusers may hold other components, which are kept
        for name in (STOCK_WEIGHTS, STOCK_CONFIG):
            output_file(target / name)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        name = DIFFUSERS_WEIGHTS if config is None else STOCK_WEIGHTS
        with replacing(target / name) as part:
            save_file(tensors, part, metadata={"format": "pt"})
        if config is not None:
            replace_text(target / STOCK_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return target


def _write_kohya(target: Path, pairs: Mapping[str, PlainPair], component: str, beside: Sequence[str]) -> Path:
    """Write or complete Kohya's file."""
    if component not in KOHYA:
        raise AdapterError(
            f"Kohya's layout names the layers of a UNet and of CLIP's text encoders; it has no names for "
            f"{component!r} as diffusers builds it. Export with layout='diffusers', which ComfyUI reads, too."
        )
    output_file(target, sign=_KOHYA_SIGN)
    name = "lora_te" if component == "text_encoder" and "text_encoder_2" not in beside else KOHYA[component]
    others = read_tensors(target) if target.is_file() else {}
    tensors = {key: value for key, value in others.items() if not key.startswith(f"{name}_")}
    for path, pair in pairs.items():
        # transformers 5 has no `text_model` module in the first text encoder; Kohya's names keep it
        inner = f"text_model.{path}" if component != "unet" and not path.startswith("text_") else path
        key = f"{name}_{inner.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": pair.A, f"{key}.lora_up.weight": pair.B}
        tensors[f"{key}.alpha"] = torch.tensor(float(len(pair.A)))
    with writing(target), replacing(target) as part:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"format": "pt"})
    return target


@torch.no_grad()
def largest_difference(
    folder: str | Path, out: str | Path, *, layout: Literal["vllm", "diffusers"], component: str = "unet"
) -> float:
    """How far the adapters in an export, read back, are from those of the folder that it was written from.

    Every layer's ``s B M A x`` is computed from both, in float64, for eight random x.

    Args:
        folder: the adapter folder.
        out: what `export_adapter` wrote.
        layout: in which layout.
        component: diffusers only: the one it was written for.

    Returns:
        The largest difference of an entry, over the largest entry of its layer; the largest of all layers.

    Raises:
        AdapterError: one of the two cannot be read, or the export lacks a layer.
    """
    content = read_folder(folder)
    written = read_tensors(Path(out) / (DIFFUSERS_WEIGHTS if layout == "diffusers" else STOCK_WEIGHTS))
    prefix = f"{component}." if layout == "diffusers" else PREFIX
    found = {name.removeprefix(prefix): factor for name, factor in written.items() if name.startswith(prefix)}
    generator = torch.Generator().manual_seed(0)
    mixers = mixer_matrices(content.tensors, mixer_form=content.config.mixer_form)
    worst = 0.0
    for path in target_paths(content.tensors):
        A, B = (content.tensors.get(f"{PREFIX}{path}{part}") for part in (".lora_A.weight", ".lora_B.weight"))
        own_A, own_B = (found.get(f"{path}{part}") for part in (".lora_A.weight", ".lora_B.weight"))
        if A is None or B is None or own_A is None or own_B is None:
            raise AdapterError(f"{out} has no factors for {path}, which {folder} adapts. Export it again.")
        x = torch.randn(A[0].numel(), 8, generator=generator, dtype=torch.float64)
        expected = _update(A, mixers.get(f"{PREFIX}{path}"), B, x) * content.config.scaling_for(path)
        difference = (_update(own_A, None, own_B, x) - expected).abs().max()
        worst = max(worst, float(difference / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)))
    return worst


def _update(A: Tensor, M: Tensor | None, B: Tensor, x: Tensor) -> Tensor:
    return B.flatten(1).to(x.dtype) @ (fold(A.to(x.dtype), M).flatten(1) @ x)


def plain_pairs(content: AdapterFolder) -> dict[str, PlainPair]:
    """The folded factors by module path, with the scaling in B.

    Raises:
        AdapterError: the adapter holds more than A, M and B of layers that a LoRA reader knows.
    """
    inner = next((name for name in content.tensors if is_inner(name) and "lora_" in name), None)
    if inner:
        raise AdapterError(
            f"The adapter holds {inner!r}, of an nn.MultiheadAttention, which only PEFT knows as an adapted layer. "
            "Export with layout='peft' (--to lora), or merge."
        )
    if content.config.changes_base:
        init = content.config.init_lora_weights
        raise AdapterError(
            f"The adapter began with init_lora_weights={init!r}, which changed the base; on the unchanged one it would "
            "be wrong. Export with layout='peft' (--to lora), or merge."
        )
    folded = fold_state_dict(content.tensors, mixer_form=content.config.mixer_form)
    pairs: dict[str, PlainPair] = {}
    used = set()
    for name, A in folded.items():
        path = adapted_path(name)
        if path is None or not name.endswith(".lora_A.weight"):
            continue
        B_name = f"{PREFIX}{path}.lora_B.weight"
        used |= {name, B_name}
        scaling = content.config.scaling_for(path)
        pairs[path] = PlainPair(A=A.float().contiguous(), B=(folded[B_name].float() * scaling).contiguous())
    extra = sorted(folded.keys() - used)
    if extra:
        raise AdapterError(
            f"The adapter holds {extra[0]!r}, which this layout cannot express (DoRA, embeddings, modules_to_save and "
            "biases stay with PEFT). Export with layout='peft' (--to lora), or merge."
        )
    return pairs


def _vllm_files(content: AdapterFolder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    pairs = plain_pairs(content)
    wide = next((path for path, pair in pairs.items() if pair.A.ndim != 2), None)
    if wide:
        raise AdapterError(
            f"{wide} is a convolution, which vLLM does not adapt. Export with layout='peft' (--to lora), or merge."
        )
    rank = max(len(pair.A) for pair in pairs.values())
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        A, B = torch.zeros(rank, *pair.A.shape[1:]), torch.zeros(len(pair.B), rank)
        A[: len(pair.A)], B[:, : len(pair.A)] = pair.A, pair.B
        tensors |= {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}
    names = sorted({path.rpartition(".")[2] for path in pairs})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, task_type="CAUSAL_LM", inference_mode=True)
    return tensors, {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
