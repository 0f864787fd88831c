"""The verbs that convert models: `export` and `import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mm_moslora.cli.shared_options import OtherPreprocessing, quiet_libraries
from mm_moslora.utils.errors import ConfigError, ModelError
from mm_moslora.utils.file_locks import new_folder
from mm_moslora.utils.folder_marks import refuse_full_folder
from mm_moslora.utils.run_paths import MANIFEST, adapter_folder, find_checkpoint

if TYPE_CHECKING:
    from mm_moslora.models.assembly import Parts

Dtype = Literal["fp32", "bf16", "fp16"]
Layout = Literal["llava", "hf", "lora", "vllm", "diffusers", "kohya", "gguf"]
DENOISERS: tuple[Literal["unet", "transformer"], ...] = ("unet", "transformer")
_SHOWN = 10
"""Tensors of a kind that `verify` names."""
Component = Literal["unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3"]


def export(
    model: Path,
    output: Path,
    *,
    to: Layout = "llava",
    dtype: Dtype = "fp32",
    base: str | None = None,
    component: Component = "unet",
    licence: str | None = None,
    push: str | None = None,
    other_preprocessing: OtherPreprocessing = False,
) -> int:
    """Export a tuned model, its adapter merged; prints the largest difference from the written files, read back.

    Parameters
    ----------
    model
        A run, a checkpoint, an export, or an adapter folder of any trainer.
    output
        New folder; kohya: the .safetensors file.
    to
        llava: a folder that stock transformers loads, or a refusal with the reason. hf: one folder with any parts.
        lora: the adapter folded to plain LoRA for PEFT's Auto classes; it names its base, and the base of an assembled
        model is written to `base`. vllm, diffusers: the adapter alone in the format of these two (written and checked
        without the model). kohya: that of a diffusion model as a file for AUTOMATIC1111 and ComfyUI. gguf: model.gguf
        and mmproj.gguf for llama.cpp (fp32 or fp16).
    dtype
        Dtype of the written weights.
    base
        For an adapter folder: the model it was trained on, where the folder does not name it.
    component
        diffusers, kohya: the part of the pipeline to which the adapter belongs, where it is of no run.
    licence
        For the model card, as the hub knows it (apache-2.0, ...); without it the card points to the parts' licences.
    push
        Upload what was written to this repository of the Hugging Face hub, OWNER/NAME; a new one is private.
    """
    if push is not None:  # before minutes of loading
        from mm_moslora.utils.network.hub_access import check_login, upload

        check_login(push)
    status = _export(
        model, output, to=to, dtype=dtype, base=base, component=component, licence=licence,
        other_preprocessing=other_preprocessing,
    )  # fmt: skip
    if push is not None and status == 0:
        print(f"Uploaded: {upload(output, push)}")
    return status


def _export(
    model: Path,
    output: Path,
    *,
    to: Layout,
    dtype: Dtype,
    base: str | None,
    component: Component,
    licence: str | None,
    other_preprocessing: bool,
) -> int:
    if to in ("vllm", "diffusers", "kohya"):
        return _hand_on_adapter(model, output, to=to, component=component)
    find_checkpoint(model)
    refuse_full_folder(output)  # before minutes of loading
    if to == "gguf" and dtype == "bf16":
        raise ConfigError("GGUF files are written in fp32 or fp16 here, and --dtype is bf16. Choose one of these.")
    quiet_libraries()
    from mm_moslora.data.preprocessing_print import check_preprocessing
    from mm_moslora.models.load_model import load

    # An assembled base is not published anywhere, so it is written with plain LoRA, too, in full precision.
    packed: Literal["dense", "reload", "keep"] = (
        "dense" if to != "lora" else "reload" if _writes_base(model) else "keep"
    )
    assembly = load(model, merge=False, base=base, packed=packed)
    check_preprocessing(model, assembly, accepted=other_preprocessing)
    if to == "lora":
        return _hand_on_lora(assembly, model, output, dtype=dtype, licence=licence)
    return _hand_on_merged(assembly, model, output, to=to, dtype=dtype, licence=licence)


def _hand_on_adapter(
    model: Path, output: Path, *, to: Literal["vllm", "diffusers", "kohya"], component: Component
) -> int:
    folder = adapter_folder(model)
    for name in DENOISERS:
        if (folder / name).is_dir():  # of a diffusion run
            component, folder = name, folder / name
    if to != "kohya":
        refuse_full_folder(output)
    quiet_libraries()
    from mm_moslora.adapters.folders.export_adapter import export_adapter, largest_difference

    if to == "kohya":
        print(export_adapter(folder, output, layout=to, component=component))
        return 0
    from mm_moslora.data.preprocessing_print import stored_preprocessing, write_preprocessing

    with new_folder(output) as part:
        export_adapter(folder, part, layout=to, component=component)
        difference = largest_difference(folder, part, layout=to, component=component)
        if to == "vllm" and (folder.parent / MANIFEST).is_file():
            write_preprocessing(stored_preprocessing(folder.parent), part)
    reader = "vllm serve --enable-lora" if to == "vllm" else "pipeline.load_lora_weights"
    print(f"{output}: the adapter alone, folded to plain LoRA, for {reader}.")
    if to == "vllm" and (folder.parent / MANIFEST).is_file() and _writes_base(model):
        print("Its base was assembled here and is not in it: --to llava writes the whole model, merged, for vLLM.")
    print(
        f"Largest difference of a layer's update, read back, from the adapter's: {difference:.1e} of its largest entry"
    )
    return 0


def _hand_on_lora(assembly: Parts, model: Path, output: Path, *, dtype: Dtype, licence: str | None) -> int:
    from mm_moslora.data.preprocessing_print import hand_on_preprocessing
    from mm_moslora.models.export.export_huggingface import export_lora
    from mm_moslora.models.export.model_card import write_card
    from mm_moslora.models.model_sizes import is_packed
    from mm_moslora.models.precision import dtype_of

    with new_folder(output) as part:
        lora = export_lora(assembly, part, dtype=dtype_of(dtype), final=output)
        write_card(assembly, part, source=model, licence=licence, adapter_of=lora.base)
        hand_on_preprocessing(model, assembly, part)
    print(f"{output}: plain LoRA for stock PEFT, and the unfolded factors beside it. Base: {lora.base}")
    print(f"Loads with peft.{lora.loader}" + ("." if lora.stock else " after `import mm_moslora.models`."))
    difference = lora.max_logit_difference
    print(f"Largest logit difference between the live adapter and stock PEFT on this folder: {difference}")
    if is_packed(assembly.model):
        print("This holds on the base in 4 or 8 bits, as it was trained; a dense one rounds otherwise.")
    return 0


def _hand_on_merged(
    assembly: Parts, model: Path, output: Path, *, to: Layout, dtype: Dtype, licence: str | None
) -> int:
    from mm_moslora.data.preprocessing_print import hand_on_preprocessing
    from mm_moslora.models.export.export_huggingface import export_model, merge_adapter, refuse_own_class
    from mm_moslora.models.export.model_card import write_card
    from mm_moslora.models.precision import dtype_of

    if to == "gguf":
        from mm_moslora.models.export.gguf_model import refuse_gguf

        refuse_gguf(assembly)  # before minutes of merging
    elif to == "llava":
        refuse_own_class(assembly.model)
    moved = merge_adapter(assembly, dtype_of("fp32" if to == "gguf" else dtype))
    if moved is None:
        print("There is no adapter to merge: the weights are written as they are.")
    else:
        rounded = "" if dtype == "fp32" or to == "gguf" else f", rounding to {dtype} included"
        print(f"adapter merged: largest logit difference from the live adapter {moved}{rounded}")
    with new_folder(output) as part:
        if to == "gguf":
            from mm_moslora.models.export.gguf_model import export_gguf

            files = export_gguf(assembly, part, half=dtype == "fp16")
            names = ", ".join(path.name for path in (files.text, files.mmproj) if path)
            lines = [f"{names}, largest tensor difference {files.largest_difference:.2e}"]
            if files.mmproj:
                lines.append(
                    "llama.cpp builds with its issue 25814 misplace CLIP's CLS token; use a build with the fix."
                )
        else:
            result = export_model(assembly, part, require_stock=to == "llava")
            lines = [f"{result.architecture}, largest logit difference {result.max_logit_difference}"]
            if result.copied:
                lines.append(
                    f"{len(result.copied)} tensors of the base that its class does not load are copied as they are, "
                    f"the first is {result.copied[0]}."
                )
            if not result.stock:
                lines.append("Loads with transformers after `import mm_moslora.models`.")
        write_card(assembly, part, source=model, licence=licence)
        hand_on_preprocessing(model, assembly, part)
    print(f"{output}: " + "\n".join(lines))
    return 0


def verify(base: Path, adapter: Path, merged: Path) -> int:
    """Prove from files alone that a merged model is base + adapter, tensor by tensor; exit code 1 where it is not.

    Parameters
    ----------
    base
        Folder of the base model, with safetensors.
    adapter
        Adapter folder of any trainer (LoRA, rsLoRA, DoRA, MoSLoRA), or a checkpoint or run with one.
    merged
        Folder of the merged model, with safetensors.
    """
    quiet_libraries()
    from mm_moslora.adapters.folders.verify_merge import verify_merge

    proof = verify_merge(base, adapter_folder(adapter), merged)
    for old, new in proof.renamed.items():
        print(f"renamed: {old or '(nothing)'} -> {new or '(nothing)'}")
    counts = {"base": proof.base, "base + fold": proof.folded, "tied": proof.tied}
    print(f"{', '.join(f'{len(names)} {kind}' for kind, names in counts.items() if names)}.")
    if proof.folded:
        print(f"Largest difference from the fold: {proof.largest:.2g} of its rounding bound.")
    if proof.vanished:
        print(f"The update of {len(proof.vanished)} tensors is below the rounding of their dtype and vanished.")
    faults = {
        "left as it was, though the adapter changes it": proof.unmerged,
        "different": [f"{name}: {how}" for name, how in proof.different.items()],
        "lost": proof.lost,
        "not in the base": proof.extra,
    }
    for fault, names in faults.items():
        if names:
            print(f"{fault}: {len(names)}")
            print("".join(f"  {name}\n" for name in names[:_SHOWN]), end="")
            print(f"  and {len(names) - _SHOWN} more\n" if len(names) > _SHOWN else "", end="")
    print("The merge is proved." if proof.proved else "The merge is not proved.")
    return 0 if proof.proved else 1


def _writes_base(model: Path) -> bool:
    """Whether a run's base is assembled and therefore not published anywhere."""
    from mm_moslora.models.load_model import recipe_of

    checkpoint = find_checkpoint(model)
    return (checkpoint / MANIFEST).is_file() and recipe_of(checkpoint).model.vision is not None


def import_model(
    source: Path, output: Path, *, vision: str | None = None, language: str | None = None, parts: bool = False
) -> int:
    """Import a checkpoint of LLaVA's own code (whole model, projector or LoRA).

    Parameters
    ----------
    source
        Folder or .bin file.
    output
        New folder for the parts, with the whole model in `model`.
    vision
        The vision tower, where the source names none or names another place.
    language
        The language model from which the source was trained, where it is needed.
    parts
        Write only the parts: `projector.safetensors` for model.projector.weights, and `language`
        where the source changes it.
    """
    if not source.exists():
        raise ModelError(f"There is no {str(source)!r}; expected a folder or a .bin file.")
    quiet_libraries()
    from mm_moslora.models.assembly import load_parts
    from mm_moslora.models.export.export_huggingface import export_model
    from mm_moslora.models.import_checkpoint import import_parts, whole_config

    imported = import_parts(source, output, language=language)
    summary = f"{imported.kind}, {imported.projector} projector, {imported.tensors} tensors"
    print(f"{output}: {summary}, largest difference {imported.largest_difference:.2e}")
    if parts:
        return 0
    whole = load_parts(whole_config(imported, vision=vision, language=None if imported.language else language))
    result = export_model(whole, output / "model")
    print(f"{result.folder}: {result.architecture}, largest logit difference {result.max_logit_difference}")
    return 0
