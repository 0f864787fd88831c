"""The report in a real browser: its script runs, nothing overflows, both colour schemes are readable."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from mm_moslora.reporting import build_report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


def _browse(tmp_path: Path, page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--allow-file-access-from-files", "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            f"--user-data-dir={tmp_path / 'profile'}", *arguments, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip


def test_the_script_runs_without_console_messages(tmp_path: Path, run_folder: Path) -> None:
    page = build_report(run_folder, tmp_path / "report.html")
    result = _browse(tmp_path, page, "--dump-dom")
    assert "CONSOLE" not in result.stderr, result.stderr
    (button,) = re.findall(r"<button[^>]*>(\w+)</button>", result.stdout)
    assert button in ("Dark", "Light")
    assert "hidden" not in re.findall(r"<button[^>]*>", result.stdout)[0].replace("aria-hidden", "")
    assert "<title>Demo run" in result.stdout


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(tmp_path: Path, run_folder: Path, width: int) -> None:
    build_report(run_folder, tmp_path / "report.html")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="report.html" style="width:{width}px;height:800px;border:0"></iframe><script>'
        'onload=()=>{const d=document.getElementById("f").contentDocument.documentElement;'
        "document.title=`wide ${d.scrollWidth} tall ${d.scrollHeight}`}</script>"
    )
    result = _browse(tmp_path, frame, "--dump-dom", "--window-size=1400,900")
    found = re.search(r"wide (\d+) tall (\d+)", result.stdout)
    assert found is not None, result.stdout[:500]
    assert int(found[1]) <= width
    assert int(found[2]) > 2000


@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)])
def test_both_colour_schemes_are_readable(tmp_path: Path, run_folder: Path, scheme: int, dark: bool) -> None:
    page = build_report(run_folder, tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    _browse(
        tmp_path,
        page,
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1280,900",
        f"--screenshot={shot}",
    )
    grey = Image.open(shot).convert("L")
    background = grey.getpixel((5, 5))
    assert isinstance(background, int)
    assert (background < 60) == dark
    low, high = grey.getextrema()
    assert high - low > 150  # the text stands out
