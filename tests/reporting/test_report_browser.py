"""The report in a real browser: its script runs, nothing overflows, both colour schemes are readable."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, MISSING, browsing
from PIL import Image

from mm_moslora.reporting import build_report

READ = """(() => {
  const chart = [...document.querySelectorAll('.chart[data-series]')].at(-1), svg = chart.querySelector('svg');
  const box = svg.getBoundingClientRect(), readout = chart.querySelector('.readout'), read = [readout.textContent];
  svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * (52 + 374 / 2) / 440}));
  read.push(readout.textContent);
  for (const key of ['Home', 'ArrowRight']) svg.dispatchEvent(new KeyboardEvent('keydown', {key}));
  return [...read, readout.textContent, chart.querySelector('.cursor').getAttribute('x1')];
})()"""


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_the_page_is_readable_and_its_script_works(tmp_path: Path, run_folder: Path) -> None:
    page, shot = build_report(run_folder, tmp_path / "report.html"), tmp_path / "shot.png"
    with browsing(tmp_path / "profile") as tab:
        for scheme, other in (("light", "Dark"), ("dark", "Light")):
            tab.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            for width in (400, 1280):
                tab.open(page.as_uri(), width=width)
                assert tab.run("document.documentElement.scrollWidth") <= width
                assert tab.run("document.documentElement.scrollHeight") > 2000
            assert tab.run("document.getElementById('scheme').textContent") == other
            tab.screenshot(shot)
            grey = Image.open(shot).convert("L")
            assert (grey.getpixel((5, 5)) < 60) == (scheme == "dark")
            low, high = grey.getextrema()
            assert high - low > 150, "the text stands out"
        last, under_pointer, by_key, cursor = tab.run(READ)
        assert last.startswith("Last: ")
        assert under_pointer.startswith("Step 20")
        assert by_key == "Step 4: gradient norm 1"
        assert float(cursor) < 60
        assert tab.errors == []
