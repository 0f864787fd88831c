"""`MoSLoRAConfig`: PEFT's `LoraConfig` with a mixer, and the configurations in adapter folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from mm_moslora.adapters.adapter_options import AdapterOptions
from mm_moslora.adapters.folder_format import OWN_CONFIG, OWN_TYPE, STOCK_CONFIG, downloaded, read_json, read_manifest
from mm_moslora.adapters.folders.permitted_options import permitted_options
from mm_moslora.adapters.folders.save_folder import complete_folder
from mm_moslora.adapters.mixer import MixerInit
from mm_moslora.utils.errors import AdapterError, suggestion


class MoSLoRAConfig(AdapterOptions):
    """LoRA with a mixer between A and B: ``y = W0 x + s * B M A dropout(x)`` (arXiv 2406.11909).

    Every field of `peft.LoraConfig` keeps its meaning; `peft.get_peft_model` takes it as it is.

    Raises:
        AdapterError: an unknown mixer, a rank below 1, or an option that contradicts the mixer.
    """

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` for stock PEFT; called by `PeftModel.save_pretrained` after the weights.

        When the weights with mixers lie in the folder already, the folder becomes the double folder of `save_adapter`:
        stock PEFT would otherwise load them, drop the mixers and compute wrong results silently.
        """
        complete_folder(Path(save_directory), self, auto_mapping=kwargs.get("auto_mapping_dict"))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MoSLoRAConfig:
        """Read the configuration of an adapter folder.

        Args:
            pretrained_model_name_or_path: a folder of `save_adapter`, or of stock PEFT (then: frozen identity mixer).
            **kwargs: as for `peft.LoraConfig.from_pretrained`, for folders of other libraries.

        Raises:
            AdapterError: a damaged file, an adapter of another method, or mixers whose configuration is lost.
        """
        folder = downloaded(pretrained_model_name_or_path, (OWN_CONFIG,), subfolder=subfolder, **kwargs)
        if folder is not None and (folder / OWN_CONFIG).is_file():
            return config_from_dict(read_manifest(folder)["config"])
        if folder is not None:
            raise AdapterError(
                f"{folder} holds mixers and no configuration of them ({OWN_CONFIG}). Copy the whole folder, or save "
                "the adapter again; load_adapter alone reads folders of the MoSLoRA authors."
            )
        source = Path(pretrained_model_name_or_path, subfolder or "")
        data = read_json(source / STOCK_CONFIG) if (source / STOCK_CONFIG).is_file() else None
        kind = "LORA" if data is None else data.get("peft_type")
        if data is not None and kind == OWN_TYPE:
            return config_from_dict(data)
        if kind != "LORA":
            raise AdapterError(
                f"{source} holds an adapter of peft_type {kind!r}, expected LORA. Load it with PEFT itself."
            )
        stock = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(stock, LoraConfig):  # from the hub
            raise AdapterError(
                f"{source} holds a {type(stock).__name__}, expected a LoraConfig. Load it with PEFT itself."
            )
        return from_lora_config(stock)


def config_from_dict(data: Mapping[str, Any]) -> MoSLoRAConfig:
    """The configuration of `config_to_dict`."""
    names = {item.name for item in dataclasses.fields(MoSLoRAConfig)}
    unknown = sorted(set(data) - names)
    if unknown:
        raise AdapterError(
            f"The adapter's configuration has unknown keys {unknown}.{suggestion(unknown[0], names)} It was written by "
            "another version; update mm-moslora or peft."
        )
    values = {key: value for key, value in data.items() if key not in ("peft_type", "runtime_config")}
    config = MoSLoRAConfig(**values)
    permitted_options(MoSLoRAConfig, values, "The adapter's configuration")
    return config


def from_lora_config(
    config: LoraConfig,
    *,
    mixer_init: MixerInit = "identity",
    mixer_trainable: bool = False,
    mixer_pattern: Mapping[str, str] | None = None,
) -> MoSLoRAConfig:
    """MoSLoRA with the options of plain LoRA; the identity that does not train is the same plain LoRA."""
    values = {name: getattr(config, name) for name in lora_fields()}
    permitted_options(LoraConfig, values, "The adapter's configuration")
    values["mixer_pattern"] = dict(mixer_pattern or {})
    return MoSLoRAConfig(**values, mixer_init=mixer_init, mixer_trainable=mixer_trainable)


def lora_fields() -> set[str]:
    """The options of stock PEFT's `LoraConfig` that a folder may hold."""
    return {item.name for item in dataclasses.fields(LoraConfig)} - {"runtime_config", "peft_type"}
