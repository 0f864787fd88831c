"""Debian packages without root: download with apt where it exists, unpack with dpkg-deb or in pure Python."""

from __future__ import annotations

import io
import lzma
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from mm_moslora.launch.child_processes import output_of
from mm_moslora.quickstart.asset_cache import Asset, Say, run_download, safe_relative, silent, verify
from mm_moslora.utils.errors import AssetError
from mm_moslora.utils.package_requirements import install_command

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def fetch_deb(asset: Asset, folder: Path, say: Say = silent) -> Path:
    """Download the package of `asset` with apt into `folder` and verify it.

    Raises:
        AssetError: apt is missing or fails, or the file differs from the pinned one.
    """
    if shutil.which("apt-get") is None:
        raise AssetError(
            f"{asset.name} {asset.version} is a Debian package and this system has no apt-get. Download the .deb from "
            "Debian's package pages on any computer and pass its path (--stamps-deb FILE)."
        )
    say(f"downloading {asset}")
    folder.mkdir(parents=True, exist_ok=True)
    remedy = "run `apt-get update`, or pass the path of the .deb (--stamps-deb FILE)"
    run_download(["apt-get", "download", f"{asset.name}={asset.version}"], asset, remedy=remedy, cwd=folder)
    packages = sorted(folder.glob("*.deb"))
    if len(packages) != 1:
        raise AssetError(f"apt-get left {[item.name for item in packages]} for {asset.name}; expected one .deb.")
    verify(packages[0], asset)
    return packages[0]


def unpack_deb(package: Path, folder: Path) -> None:
    """Unpack the files of a .deb under `folder`.

    Raises:
        AssetError: the file is not a .deb, or is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("dpkg-deb"):
        done = output_of(["dpkg-deb", "-x", package.absolute(), folder.absolute()])
        if done.returncode:
            raise AssetError(f"{package.name} cannot be unpacked: {done.stderr.strip()}. Download it again.")
        return
    unpack_deb_in_python(package, folder)


def unpack_deb_in_python(package: Path, folder: Path) -> None:
    """Unpack a .deb (an ar archive around a tar) without dpkg: ordinary files only, never outside `folder`."""
    for name, payload in _ar_members(package):
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(_decompress(name, payload)), mode="r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    target = folder / safe_relative(member.name.removeprefix("./"), package)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source = archive.extractfile(member)
                    assert source is not None
                    with source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
            return
    raise AssetError(f"{package.name} has no data.tar inside, so it is not a complete package. Download it again.")


def _ar_members(package: Path) -> Iterator[tuple[str, bytes]]:
    with package.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise AssetError(f"{package.name} is not a Debian package (it does not start as an ar archive).")
        while header := file.read(_AR_HEADER):
            if len(header) < _AR_HEADER or header[58:60] != b"`\n":
                raise AssetError(f"{package.name} is damaged: broken member header. Download it again.")
            size = int(header[48:58])
            payload = file.read(size)
            if len(payload) < size:
                raise AssetError(f"{package.name} ends early: {len(payload)} of {size} bytes. Download it again.")
            file.read(size % 2)  # members are padded to even offsets
            yield header[:16].decode("ascii", "replace").strip().rstrip("/"), payload


def _decompress(name: str, payload: bytes) -> bytes:
    if name.endswith(".xz"):
        return lzma.decompress(payload)
    if name.endswith(".gz"):
        import gzip

        return gzip.decompress(payload)
    if name.endswith(".zst"):
        return _zstd(payload)
    if name == "data.tar":
        return payload
    raise AssetError(f"The package's {name} uses an unsupported compression; install dpkg.")


def _zstd(payload: bytes) -> bytes:
    try:
        from compression import zstd  # Python >= 3.14

        return bytes(zstd.decompress(payload))
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError as error:
        raise AssetError(
            "The package is compressed with zstd, and Python's zstandard is not installed. "
            f"Install it: {install_command('zstandard')}"
        ) from error
    return bytes(zstandard.ZstdDecompressor().decompressobj().decompress(payload))
