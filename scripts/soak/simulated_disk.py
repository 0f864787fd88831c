"""A file system that may lose unsynced data: it records the real code's disk operations, then simulates the state after
a crash.

The rules are the weakest that POSIX allows. Names belong to folders, contents to files. `fsync` of a file saves its
content but not its name; `fsync` of a folder saves the names in it. An unsynced change of names may or may not survive,
independently or in order. An unsynced content may be complete, truncated, empty or zeros.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from mm_moslora.utils import files, folder_marks


@dataclass
class File:
    """A file: its content, and the part of it that is synced."""

    content: bytes
    safe: bytes | None = None


@dataclass
class Folder:
    """A folder: synced names, and unsynced changes; a change is a list of (name, node or None)."""

    safe: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[list[tuple[str, File | Folder | None]]] = field(default_factory=list)

    def now(self) -> dict[str, File | Folder]:
        """The names that a program sees."""
        return _applied(self.safe, self.changes)

    def sync(self) -> None:
        """Sync all names."""
        self.safe, self.changes = self.now(), []


def _applied(names: dict, changes: list) -> dict:
    names = dict(names)
    for change in changes:
        for name, node in change:
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node
    return names


Operation = tuple[str, tuple]
"""A method of `SimulatedDisk` and its arguments."""


class SimulatedDisk:
    """Replays recorded operations and crashes."""

    def __init__(self) -> None:
        self.root = Folder()
        self.reported = 0

    def report(self, step: int) -> None:
        """Record that the program reports this checkpoint as committed."""
        self.reported = step

    def _folder(self, parts: tuple[str, ...]) -> Folder:
        node: File | Folder = self.root
        for part in parts:
            assert isinstance(node, Folder)
            node = node.now()[part]
        assert isinstance(node, Folder)
        return node

    def make(self, path: Path) -> None:
        """mkdir."""
        self._folder(path.parts[:-1]).changes.append([(path.name, Folder())])

    def write(self, path: Path, content: bytes) -> None:
        """Create a file."""
        self._folder(path.parts[:-1]).changes.append([(path.name, File(content))])

    def sync(self, path: Path) -> None:
        """fsync of a file or folder."""
        node = self.root if path == Path() else self._folder(path.parts[:-1]).now()[path.name]
        if isinstance(node, Folder):
            node.sync()
        else:
            node.safe = node.content

    def rename(self, path: Path, target: Path) -> None:
        """One atomic change of names."""
        assert path.parent == target.parent
        parent = self._folder(path.parts[:-1])
        parent.changes.append([(path.name, None), (target.name, parent.now()[path.name])])

    def unlink(self, path: Path) -> None:
        """Remove one file or empty folder."""
        self._folder(path.parts[:-1]).changes.append([(path.name, None)])

    def crash(self, target: Path, rng: random.Random) -> None:
        """Write a possible state after a power loss into a real folder."""
        ordered = rng.random() < 0.5  # as with a journal; otherwise independently
        likely = rng.choice((0.1, 0.5, 0.9, 1.0))
        self._leave(self.root, target, rng, ordered=ordered, likely=likely)

    def _leave(self, folder: Folder, target: Path, rng: random.Random, *, ordered: bool, likely: float) -> None:
        target.mkdir(parents=True, exist_ok=True)
        if ordered:
            surviving = folder.changes[: sum(rng.random() < likely for _ in folder.changes)]
        else:
            surviving = [change for change in folder.changes if rng.random() < likely]
        for name, node in _applied(folder.safe, surviving).items():
            if isinstance(node, Folder):
                self._leave(node, target / name, rng, ordered=ordered, likely=likely)
            else:
                (target / name).write_bytes(node.safe if node.safe is not None else _torn(node.content, rng))


def _torn(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((content, b"", content[: len(content) // 2], bytes(len(content))))


@contextmanager
def recording(run: Path) -> Iterator[list[Operation]]:
    """Record the checkpoint code's operations below a run folder while it performs them."""
    operations: list[Operation] = []
    real_sync, real_rename, real_replace, real_remove = files.sync, files.rename, files.replace_text, files.remove
    real_mkdir, real_mark, real_discard = Path.mkdir, files.mark, files.discard

    def inside(path: Path) -> Path:
        return path.relative_to(run)

    def sync(path: Path) -> None:
        real_sync(path)
        operations.append(("sync", (inside(path),)))

    def rename(path: Path, target: Path) -> None:
        real_rename(path, target)
        operations.append(("rename", (inside(path), inside(target))))

    def replace_text(path: Path, text: str) -> None:
        temporary = inside(path).with_name(f".{path.name}.tmp")
        operations.append(("write", (temporary, text.encode())))
        operations.append(("sync", (temporary,)))
        operations.append(("rename", (temporary, inside(path))))
        real_replace(path, text)

    def remove(folder: Path, *, mark: str = folder_marks.MARK) -> None:
        gone = sorted(folder.rglob("*"), key=lambda path: -len(path.parts)) if folder.exists() else []
        operations.extend(("unlink", (inside(path),)) for path in gone if path != folder / mark)
        real_remove(folder, mark=mark)
        operations.extend(("unlink", (inside(path),)) for path in ([folder / mark, folder] if gone else []))

    def mark_folder(folder: Path, kind: str) -> None:
        operations.append(("write", (inside(folder / folder_marks.MARK), f"{kind}\n".encode())))
        operations.append(("sync", (inside(folder / folder_marks.MARK),)))
        real_mark(folder, kind)

    def mkdir(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        real_mkdir(path, mode, parents, exist_ok)
        operations.extend(("make", (inside(folder),)) for folder in reversed(new) if run in folder.parents)

    def discard(path: Path) -> None:
        real_discard(path)
        operations.append(("unlink", (inside(path),)))

    with (
        patch.object(files, "discard", discard),
        patch.object(files, "sync", sync),
        patch.object(files, "rename", rename),
        patch.object(files, "replace_text", replace_text),
        patch.object(files, "remove", remove),
        patch.object(files, "mark", mark_folder),
        patch.object(Path, "mkdir", mkdir),
    ):
        yield operations


def note_file(operations: list[Operation], run: Path, path: Path, content: bytes) -> None:
    """Write a real file and record it."""
    path.write_bytes(content)
    operations.append(("write", (path.relative_to(run), content)))


if __name__ == "__main__":
    print(f"{__doc__}\nA part of the scripts beside it; there is nothing to run.")
