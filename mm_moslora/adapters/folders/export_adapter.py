"""Hand an adapter to programs that know no mixer: fold it, and lay it out as each of them reads it.

::

    peft        adapter_config.json + adapter_model.safetensors, every option of LoRA kept
    vllm        the same with one rank, one scaling and module names as targets, which is what vLLM's loader accepts
    diffusers   pytorch_lora_weights.safetensors with `unet.` or `transformer.` names, for `load_lora_weights`
    kohya       one .safetensors file with `lora_unet_...`, `lora_te1_...` names and alphas, for A1111 and ComfyUI

In all but the first the scaling s is a part of B, and alpha equals the rank.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_moslora.adapters.folder_format import (
    DIFFUSERS_WEIGHTS,
    PREFIX,
    STOCK_CONFIG,
    STOCK_WEIGHTS,
    PlainPair,
    adapted_path,
    mixers_in,
    read_tensors,
    target_paths,
)
from mm_moslora.adapters.folders.folder_tensors import fold_state_dict
from mm_moslora.adapters.folders.foreign_formats import AdapterFolder
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.folders.save_folder import config_to_dict, stock_config
from mm_moslora.kernels.lora.lora_math import fold
from mm_moslora.utils.errors import AdapterError, suggestion
from mm_moslora.utils.files import replacing, staging
from mm_moslora.utils.folder_marks import output_file
from mm_moslora.utils.run_paths import writing

Layout = Literal["peft", "vllm", "diffusers", "kohya"]
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of diffusers' pipelines that load LoRA."""
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
"""Kohya's names of the components; the first text encoder is `lora_te` where there is one only."""


def export_adapter(
    folder: str | Path | Mapping[str, str | Path], out: str | Path, *, layout: Layout, component: str = "unet"
) -> Path:
    """Write an adapter folder in another program's layout.

    Args:
        folder: an adapter folder of any kind that `load_adapter` reads; for diffusers and Kohya also several, by
            component: one file holds those of a UNet and its text encoders.
        out: folder to write into (made if missing), or Kohya's file. No file is replaced.
        component: diffusers and kohya only: which part of the pipeline one folder adapts, one of `COMPONENTS`.

    Returns:
        The file or folder written.

    Raises:
        AdapterError: unknown layout, or an adapter that the layout cannot express.
        ConfigError: a file is there already.
        OSError: `out` cannot be written.
    """
    if layout not in get_args(Layout):
        hint = suggestion(layout, get_args(Layout))
        raise AdapterError(f"The layout is {layout!r}, expected one of {', '.join(get_args(Layout))}.{hint}")
    folders = folder if isinstance(folder, Mapping) else {component: folder}
    for name in folders:
        if name not in COMPONENTS:
            hint = suggestion(name, COMPONENTS)
            raise AdapterError(f"The component is {name!r}, expected one of {', '.join(COMPONENTS)}.{hint}")
    target = Path(out)
    if layout in ("diffusers", "kohya"):
        return _write_components(
            {name: plain_pairs(read_folder(path, component=name)) for name, path in folders.items()}, target, layout
        )
    if len(folders) != 1:
        raise AdapterError(
            f"{layout} holds one adapter, and {len(folders)} folders were given. Export them one by one."
        )
    content = read_folder(*folders.values())
    if layout == "peft":
        tensors = fold_state_dict(content.tensors)
        config = stock_config(content.config, target_paths(content.tensors), None)
    else:
        tensors, config = _vllm_files(content)
    names = (STOCK_WEIGHTS, STOCK_CONFIG)
    for name in names:
        output_file(target / name)
    with writing(target), staging(target, names) as staged:
        save_file(tensors, staged / STOCK_WEIGHTS, metadata={"format": "pt"})
        (staged / STOCK_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def _write_components(pairs: Mapping[str, Mapping[str, PlainPair]], out: Path, layout: Layout) -> Path:
    """Write the file of diffusers or Kohya with all components."""
    tensors: dict[str, Tensor] = {}
    for component, layers in pairs.items():
        tensors |= (
            _kohya_tensors(component, layers, alone="text_encoder_2" not in pairs)
            if layout == "kohya"
            else {
                f"{component}.{path}.{name}": factor
                for path, pair in layers.items()
                for name, factor in (("lora_A.weight", pair.A), ("lora_B.weight", pair.B))
            }
        )
    target = output_file(out if layout == "kohya" else out / DIFFUSERS_WEIGHTS)
    with writing(out), replacing(target) as part:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"format": "pt"})
    return out


def _kohya_tensors(component: str, pairs: Mapping[str, PlainPair], *, alone: bool) -> dict[str, Tensor]:
    """One component under Kohya's names; `alone`: there is one text encoder."""
    if component not in KOHYA:
        raise AdapterError(
            f"Kohya's layout names the layers of a UNet and of CLIP's text encoders; it has no names for "
            f"{component!r} as diffusers builds it. Export with layout='diffusers', which ComfyUI reads, too."
        )
    name = "lora_te" if component == "text_encoder" and alone else KOHYA[component]
    tensors: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        # transformers 5 has no `text_model` module in the first text encoder; Kohya's names keep it
        inner = f"text_model.{path}" if component != "unet" and not path.startswith("text_") else path
        key = f"{name}_{inner.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": pair.A, f"{key}.lora_up.weight": pair.B}
        tensors[f"{key}.alpha"] = torch.tensor(float(len(pair.A)))
    return tensors


@torch.no_grad()
def largest_difference(
    folder: str | Path, out: str | Path, *, layout: Literal["vllm", "diffusers"], component: str = "unet"
) -> float:
    """The largest relative difference of ``s B M A x``, in float64, between an export read back and its folder."""
    content = read_folder(folder, component=component)
    written = read_tensors(Path(out) / (DIFFUSERS_WEIGHTS if layout == "diffusers" else STOCK_WEIGHTS))
    prefix = f"{component}." if layout == "diffusers" else PREFIX
    exported = {name.removeprefix(prefix): factor for name, factor in written.items() if name.startswith(prefix)}
    generator = torch.Generator().manual_seed(0)
    mixers = mixers_in(content.tensors)
    worst = 0.0
    for path in target_paths(content.tensors):
        A, B = (content.tensors.get(f"{PREFIX}{path}{part}") for part in (".lora_A.weight", ".lora_B.weight"))
        own_A, own_B = (exported.get(f"{path}{part}") for part in (".lora_A.weight", ".lora_B.weight"))
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
    """The folded factors by module path, with the scaling in B."""
    if content.config.changes_base:
        init = content.config.init_lora_weights
        raise AdapterError(
            f"The adapter began with init_lora_weights={init!r}, which changed the base; on the unchanged one it would "
            "be wrong. Export with layout='peft' (--to lora), or merge."
        )
    folded = fold_state_dict(content.tensors)
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
    return tensors, config_to_dict(config)


def layers_read_as_experts(model: nn.Module, config: LoraConfig) -> list[str]:
    """Layers that PEFT, where this package is not imported, takes for experts by their names, and leaves out."""
    read = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(read, model=model, conversions=None)
    except ValueError:  # some of the names that belong together are missing
        read.target_modules = []
    return sorted(set(config.target_modules or ()) - set(read.target_modules or ()))
