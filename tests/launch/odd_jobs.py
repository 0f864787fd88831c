"""Commands of jobs in tests: `python -m tests.launch.odd_jobs KIND FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from mm_moslora.launch.child_processes import end_with_parent


def main() -> None:
    end_with_parent()
    kind, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')} {Path.cwd()}\n")
    count = len((folder / "starts").read_text().splitlines())
    if kind == "dies" or (kind == "dies-twice" and count < 3):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "fails":
        print("this went wrong", file=sys.stderr)
        sys.exit(4)
    if kind == "forgets":
        sys.exit(0)
    if kind == "ignores":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / "ready").touch()
    if kind == "saves":
        signal.signal(signal.SIGTERM, lambda *_: save(folder))
        (folder / "ready").touch()
    deadline = time.monotonic() + 120
    while kind in ("saves", "ignores", "stays") and not (folder / "done").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (folder / "output.part").write_text(kind)
    (folder / "output.part").rename(folder / "output")


def save(folder: Path) -> None:
    (folder / "saved").touch()
    sys.exit(75)


if __name__ == "__main__":
    main()
