"""`mm-moslora doctor`: finds problems of this machine before a run, each with a remedy.

No check starts a process group or builds anything. A library that does not import is a finding, not a failure.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from mm_moslora.config import ModelConfig, Recipe, needs
from mm_moslora.kernels.triton_availability import LIGER_RANGE, fits, installed_liger, why_not_triton
from mm_moslora.utils.errors import MoSLoRAError, reason_of
from mm_moslora.utils.hardware import available_memory, extensions_folder, stale_locks, usable_cores
from mm_moslora.utils.package_requirements import (
    declared,
    declared_anywhere,
    install_command,
    installed_version,
    range_of,
)

Status = Literal["ok", "warn", "bad"]

USES = {
    "deepspeed": "train.zero zero0 to zero3; one process trains with train.zero none",
    "datasets": "data of the hub, parquet and arrow files",
    "pyarrow": "data of the hub, parquet and arrow files",
    "open-clip-torch": "open_clip: vision towers",
    "timm": "timm's vision towers, and init",
    "matplotlib": "adapters inspect --plot",
    "wandb": "track.trackers: [wandb]",
    "tensorboard": "track.trackers: [tensorboard], the default",
    "gguf": "the quickstart, and export --to gguf",
    "onnx": "the quickstart",
    "rich": "doctor, plan and eval show",
    "psutil": "launch on a host file",
}
"""Use of every dependency that an ordinary run does not need."""


ROOM_GIB = 10.0
"""Free disk below which a run may fail at its first checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The result of one check."""

    name: str
    status: Status = "ok"
    detail: str
    remedy: str = ""
    """The remedy; empty when nothing is wrong."""


def diagnose(folder: Path | None = None, recipe: Recipe | None = None) -> list[Diagnosis]:
    """Check this machine for runs in `folder` (None: the current one)."""
    # Only packages that the recipe needs count as needed; without one, a missing package is bad only if every run needs
    # it.
    checks: list[Callable[[], Iterator[Diagnosis]]] = [
        _python,
        partial(_libraries, recipe),
        partial(_accelerator, recipe),
        partial(_engine, recipe),
        _precision,
        _kernels,
        _compiler,
        _extension_locks,
        partial(_disk, folder or Path.cwd()),
        _memory,
        _threads,
        _wandb,
    ]
    return findings_of(checks, what="the check failed", remedy="Reinstall the library that the error names.")


def findings_of(
    checks: Sequence[Callable[[], Iterator[Diagnosis]]], *, what: str, remedy: str, failed: Status = "bad"
) -> list[Diagnosis]:
    """The findings of all checks; one that raises, as of a broken library, is a finding and hides no other."""
    findings: list[Diagnosis] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            name = getattr(check, "func", check).__name__.strip("_").replace("_", " ")
            detail = f"{what}: {type(error).__name__}: {reason_of(error)}"
            findings.append(Diagnosis(name=name, status=failed, detail=detail, remedy=remedy))
    return findings


def check_version(package: str, version: str | None, *, use: str = "", needed: bool | None = None) -> Diagnosis:
    """Judge a library's version (None: not installed) and `use`; `needed` None: needed exactly if `use` is empty."""
    wanted = next((range_of(item) for item in declared_anywhere() if item.name == package), "")
    vital = needed if needed is not None else not use
    for_what = f" (for {use})" if use else ""
    remedy = install_command(package)
    if version is None:
        if needed is False:
            return Diagnosis(name=package, detail=f"not installed; not needed here{for_what}")
        status: Status = "bad" if vital else "warn"
        return Diagnosis(name=package, status=status, detail=f"not installed{for_what}", remedy=remedy)
    try:
        parsed = Version(version)
    except InvalidVersion:
        return Diagnosis(name=package, status="warn", detail=f"{version}, which is not a version number", remedy=remedy)
    plain = Version(parsed.public)  # 2.13.0+cpu is 2.13.0
    supported = SpecifierSet(wanted, prereleases=True)
    if plain not in supported:
        # A floor excludes releases with wrong results or known vulnerabilities; what is newer is only not tested.
        old = any(part.operator == ">=" and not part.contains(plain, prereleases=True) for part in supported)
        what = "below the lowest supported release" if old else "outside the tested range"
        status = "bad" if old and vital else "warn"
        return Diagnosis(name=package, status=status, detail=f"{version}, {what} ({wanted}){for_what}", remedy=remedy)
    return Diagnosis(name=package, detail=version)


def _python() -> Iterator[Diagnosis]:
    yield Diagnosis(name="python", detail=f"{platform.python_version()}, {sys.executable}")


def _libraries(recipe: Recipe | None) -> Iterator[Diagnosis]:
    """Every dependency, and the optional packages that the recipe needs."""
    wanted = {need.package: need.setting for need in needs(recipe)} if recipe is not None else {}
    names = [item.name for item in declared()]
    if not names:
        yield Diagnosis(
            name="packages", status="warn", detail="mm-moslora is not installed, so its ranges are unknown",
            remedy="pip install . in the checkout",
        )  # fmt: skip
        return
    for package in [*names, *(name for name in wanted if name not in names)]:
        use, needed = USES.get(package, ""), None
        if recipe is not None:
            needed = package in wanted or package not in USES
            use = wanted.get(package, use)
        yield check_version(package, installed_version(package), use=use, needed=needed)


def _accelerator(recipe: Recipe | None) -> Iterator[Diagnosis]:
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
        built = torch.cuda.get_arch_list()
        too_old = sorted({device.name for device in devices if not _runs(built, (device.major, device.minor))})
        if not too_old:
            yield _mixed_cards([device.name for device in devices], names)
            return
        yield Diagnosis(
            name="accelerator", status="bad",
            detail=f"{names}: torch {torch.__version__} holds no kernels for {', '.join(too_old)} (it has "
            f"{', '.join(built)})",
            remedy="Take other cards (CUDA_VISIBLE_DEVICES), or a torch build for these.",
        )  # fmt: skip
    elif Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        built = torch.version.cuda or "no CUDA"
        yield Diagnosis(
            name="accelerator", status="warn",
            detail=f"an NVIDIA driver is installed, but torch finds no GPU (torch is built for {built})",
            remedy="Install a torch build for this driver, and look at CUDA_VISIBLE_DEVICES and nvidia-smi.",
        )  # fmt: skip
    elif recipe is None:
        yield Diagnosis(name="accelerator", detail="none; the CPU is used")
    else:
        yield Diagnosis(
            name="accelerator", status="warn", detail="none; the recipe would train on the CPU",
            remedy="Go on where the model is small; `mm-moslora plan` tells which GPUs hold a larger one.",
        )  # fmt: skip


def _runs(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether kernels for these architectures (sm_90, compute_120) run on a card of this compute capability."""
    for name in built:
        kind, _, digits = name.partition("_")
        major, minor = divmod(int(re.sub(r"\D", "", digits) or 0), 10)
        binary = kind == "sm" and major == capability[0] and minor <= capability[1]
        if binary or (kind == "compute" and (major, minor) <= capability):
            return True
    return not built


def _mixed_cards(names: Sequence[str], detail: str) -> Diagnosis:
    if len(set(names)) < 2:
        return Diagnosis(name="accelerator", detail=detail)
    return Diagnosis(
        name="accelerator", status="warn", detail=f"different cards: {detail}",
        remedy="Every step waits for the slowest card, and a micro-batch must fit the smallest. Choose equal cards "
        "(CUDA_VISIBLE_DEVICES, or a SLURM constraint).",
    )  # fmt: skip


def check_parts(config: ModelConfig) -> None:
    """Read the configurations of a recipe's base, and the weights of its projector: what a run stops at first."""
    from mm_moslora.models.assembly import load_parts, load_projector
    from mm_moslora.models.model_paths import hub_names
    from mm_moslora.utils.network.hub_access import hub_or_cache

    with hub_or_cache(*hub_names(config)):
        parts = load_parts(config, weights="shapes")
    if config.vision is not None and config.projector.weights:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            load_projector(parts.model.model.multi_modal_projector, Path(config.projector.weights))


def _engine(recipe: Recipe | None) -> Iterator[Diagnosis]:
    """Whether DeepSpeed, PEFT and the other libraries here take the recipe's settings."""
    if recipe is None:
        return
    from mm_moslora.training.preflight import check_libraries
    from mm_moslora.utils import distributed

    try:
        check_libraries(recipe.for_ranks(distributed.world_size()), fresh=False)
    except MoSLoRAError as error:
        yield Diagnosis(name="settings", status="bad", detail=str(error), remedy="Change the recipe, or the machine.")
    else:
        yield Diagnosis(name="settings", detail="the libraries here take the recipe's settings")


def _precision() -> Iterator[Diagnosis]:
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        detail = "the GPU supports bf16" if fast else "the GPU does not support bf16; precision auto is fp32"
        yield Diagnosis(name="bf16", status="ok" if fast else "warn", detail=detail)
        return
    text = _read(Path("/proc/cpuinfo"))
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if re.search(rf"\b{flag}\b", text)]
    none = "this CPU has neither amx_bf16 nor avx512_bf16: precision auto is fp32, and bf16 would be slower"
    yield Diagnosis(name="bf16", detail=f"this CPU multiplies bf16 fast ({', '.join(flags)})" if flags else none)


def _kernels() -> Iterator[Diagnosis]:
    from mm_moslora.models.precision import dtype_of, resolve_precision

    torch = importlib.import_module("torch")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    reason = why_not_triton(device, dtype_of(resolve_precision("auto")))
    if reason is None:
        detail = "Triton's run between the matrix products of lean decoder layers, and for adapter dropout"
    else:
        detail = f"PyTorch's own run between the matrix products of lean decoder layers: {reason}"
    liger = installed_liger()
    if liger is not None and not fits(liger):
        detail += f"; model.kernels liger needs liger-kernel{LIGER_RANGE}, and {liger} is installed"
    yield Diagnosis(name="kernels", status="warn" if on_gpu and reason is not None else "ok", detail=detail)


def _compiler() -> Iterator[Diagnosis]:
    compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
    ninja = shutil.which("ninja") or (importlib.util.find_spec("ninja") and "ninja")
    present = [name for name, path in (("a C++ compiler", compiler), ("ninja", ninja)) if path]
    detail = f"{' and '.join(present) or 'neither compiler nor ninja'} here; none is needed (AdamW is torch's own)"
    yield Diagnosis(name="compiler", detail=detail)


def _extension_locks() -> Iterator[Diagnosis]:
    root = extensions_folder(os.environ)
    locks = stale_locks(root) if root.is_dir() else []
    if not locks:
        yield Diagnosis(name="build locks", detail=f"no stale lock below {root}")
        return
    yield Diagnosis(
        name="build locks", status="warn", detail=f"a killed build left {', '.join(map(str, locks))}",
        remedy=f"If nothing is being built now: rm {' '.join(map(str, locks))}",
    )  # fmt: skip


def _disk(folder: Path) -> Iterator[Diagnosis]:
    for name, path, least in (
        ("disk for runs", folder, ROOM_GIB),
        ("disk for temporary files", Path(tempfile.gettempdir()), 1.0),
    ):
        while not path.exists() and path != path.parent:
            path = path.parent
        free = shutil.disk_usage(path).free / 2**30
        remedy = "" if free >= least else "Free some space, or set train.output (TMPDIR) to a larger disk."
        detail = f"{free:.1f} GiB free at {path.resolve()}"
        yield Diagnosis(name=name, status="warn" if remedy else "ok", detail=detail, remedy=remedy)


def _memory() -> Iterator[Diagnosis]:
    available = available_memory() / 2**30
    detail = f"{available:.1f} GiB available" if available else "unknown on this system"
    remedy = "The quickstart needs 6 GiB; close other programs or use --smoke." if 0 < available < 6 else ""
    yield Diagnosis(name="memory", status="warn" if remedy else "ok", detail=detail, remedy=remedy)


def _threads() -> Iterator[Diagnosis]:
    cores = usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS")
    policy = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")  # every verb sets it where the shell does not
    detail = f"{cores} cores, OMP_NUM_THREADS {threads or 'not set'}, OMP_WAIT_POLICY {policy}"
    remedies = []
    if threads and threads.isdigit() and int(threads) > cores:
        remedies.append(f"export OMP_NUM_THREADS={cores}")
    if policy.lower() != "passive":
        remedies.append("unset OMP_WAIT_POLICY  # waiting threads then leave the cores to others")
    yield Diagnosis(name="threads", status="warn" if remedies else "ok", detail=detail, remedy="\n".join(remedies))


def _wandb() -> Iterator[Diagnosis]:
    from mm_moslora.tracking.wandb_tracker import has_credentials

    detail = "no key: runs that ask for wandb are kept offline"
    if mode := os.environ.get("WANDB_MODE"):
        detail = f"WANDB_MODE is {mode}"
    elif has_credentials():
        detail = "a key is present: runs that ask for wandb go online"
    yield Diagnosis(name="wandb login", detail=detail)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
