"""The model card of an exported folder: what it is made of, how it was trained, on which data, and how it scored."""

from __future__ import annotations

import glob
import math
from pathlib import Path
from typing import Any

import yaml

from mm_moslora import __version__
from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.models.assembly import Parts
from mm_moslora.models.load_model import recipe_of
from mm_moslora.models.vlm import VlmForConditionalGeneration, is_multimodal
from mm_moslora.reporting.verdicts import score_text
from mm_moslora.utils.errors import MoSLoRAError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.identity import sha256_of
from mm_moslora.utils.run_paths import BASE, MANIFEST, find_checkpoint

_HASHED_BYTES = 2**33
"""Larger data files are named without a hash."""


def write_card(
    assembly: Parts, folder: Path, *, source: Path, licence: str | None = None, adapter_of: str | None = None
) -> Path:
    """Write `README.md`; without a licence those of the parts hold. `adapter_of`: the base of an adapter for PEFT."""
    checkpoint = find_checkpoint(source)
    recipe = recipe_of(checkpoint) if (checkpoint / MANIFEST).is_file() else None
    front = yaml.safe_dump(_front(assembly, recipe, licence, adapter_of), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {recipe.name if recipe else source.resolve().name}",
        _made_of(assembly, licence, adapter_of),
    ]
    if recipe is not None:
        data = {f"`{Path(source.path).name}`": _hash_of(source) for source in recipe.data.train}
        parts += [_training(checkpoint, recipe), _table("Data", data), _results(checkpoint)]
        parts.append(f"## Recipe\n\n```yaml\n{recipe.to_yaml()}```")
    path = folder / "README.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _bases(assembly: Parts) -> dict[str, str]:
    """The parts that have a name of their own."""
    return {part: str(assembly.base[part]) for part in ("vlm", "language", "vision") if assembly.base.get(part)}


def _front(assembly: Parts, recipe: Recipe | None, licence: str | None, adapter_of: str | None) -> dict[str, Any]:
    sees = is_multimodal(assembly.model)
    hub_names = [name for name in _bases(assembly).values() if not Path(name).exists() and name.count("/") == 1]
    front: dict[str, Any] = {
        "library_name": "transformers" if adapter_of is None else "peft",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["moslora", "mm_moslora"],
        "license": licence or "other",
    }
    if licence is None:
        front["license_name"] = "licences-of-the-parts"
    if hub_names:
        front["base_model"] = hub_names
    names = [source.path.removeprefix("hf:") for source in recipe.data.train] if recipe else []
    hub_data = [name for name in names if name.count("/") == 1 and not Path(name).exists()]
    return front | ({"datasets": hub_data} if hub_data else {})


def _made_of(assembly: Parts, licence: str | None, adapter_of: str | None) -> str:
    rows = [f"| {part} | `{name}` |" for part, name in _bases(assembly).items()]
    model = type(assembly.model).__name__
    loads = f"It loads as `{model}`." if adapter_of is None else _of_an_adapter(model, adapter_of)
    if isinstance(assembly.model, VlmForConditionalGeneration):
        loads += " Install `mm-moslora` and `import mm_moslora.models` first."
    terms = f"Licence: {licence}." if licence else "The licences of these parts hold for it; look them up before use."
    return "\n".join(
        [f"Tuned with MoSLoRA (arXiv 2406.11909) by mm_moslora {__version__}. {loads}", "", "| part | name |",
         "| --- | --- |", *rows, "", terms]
    )  # fmt: skip


def _of_an_adapter(model: str, base: str) -> str:
    inside = Path(base).name == BASE and Path(base).is_dir()
    auto = "AutoPeftModelForCausalLM" if model.endswith("ForCausalLM") else "AutoPeftModel"
    loads = f"It is an adapter for stock PEFT, of a `{model}`: `peft.{auto}.from_pretrained(FOLDER)` loads both."
    if inside:
        loads += (
            " The base, with the trained projector, lies in `base`. Where this folder was moved, load `FOLDER/base` "
            "with transformers and put `peft.PeftModel.from_pretrained(base, FOLDER)` on it, or write the new "
            "place into `base_model_name_or_path` of `adapter_config.json`."
        )
    return loads


def _training(checkpoint: Path, recipe: Recipe) -> str:
    manifest = read_json(checkpoint / MANIFEST)
    counters = manifest["counters"]
    trained = sum(math.prod(shape) for shape in manifest["trainable"].values())
    adapter = recipe.adapter
    kind = f"PEFT's {adapter.peft['type']}" if adapter.peft else f"mixer {adapter.mixer_init}"
    rows = {
        "optimiser steps": f"{manifest['step']:,}",
        "tokens": f"{int(counters.get('tokens', 0)):,}",
        "supervised tokens": f"{int(counters.get('supervised_tokens', 0)):,}",
        "pictures": f"{int(counters.get('images', 0)):,}",
        "trained parameters": f"{trained:,}",
        "adapter": f"rank {adapter.rank}, alpha {adapter.alpha:g}, {kind}",
        "seed": str(recipe.train.seed),
    }
    return _table("Training", rows)


def _hash_of(source: SourceConfig) -> str:
    path = Path(source.path)
    if not path.is_file() or path.stat().st_size > _HASHED_BYTES:
        return f"weight {source.weight:g}"
    return f"weight {source.weight:g}, sha256 `{sha256_of(path)}`"


def _results(checkpoint: Path) -> str:
    """Scores that evaluations left in the run's folder."""
    rows = {}
    # Not `rglob`, which fails when a folder goes meanwhile: the run may be training on.
    for name in sorted(glob.glob("**/results.json", root_dir=checkpoint.parent, recursive=True)):
        file = checkpoint.parent / name
        try:
            for item in read_json(file, below=checkpoint.parent)["results"]:
                if item["score"] is None:
                    continue
                unit = item.get("about", {}).get("unit", "")
                mean, low, high = (
                    score_text(item[key], unit, named=key == "score").removesuffix(" %")
                    for key in ("score", "low", "high")
                )
                part = item.get("about", {}).get("selection", {}).get("name", "all")
                what = ", ".join([item["protocol"], item["mode"], *([part] if part != "all" else [])])
                name = f"{file.parent.name}: {item['task']} ({what})"
                if name in rows:  # the file of another data set has this name
                    name += f" [{str(item.get('about', {}).get('data', {}).get('sha256'))[:8]}]"
                rows[name] = f"{mean} [{low}, {high}], n {item['n']}"
        except (OSError, LookupError, TypeError, ValueError, AttributeError, MoSLoRAError):
            continue  # of another release, or damaged
    return _table("Results (percent where no score is named; 95 % intervals)", rows) if rows else ""


def _table(title: str, rows: dict[str, str]) -> str:
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])
