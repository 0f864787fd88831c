"""Pictures are drawn by matplotlib in its default style, whatever lies in the working folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRAW = """
import sys
from pathlib import Path
from mm_moslora.reporting.{module} import *
from mm_moslora.reporting.svg_charts import Series
{call}
assert Path.cwd() == Path(sys.argv[1])
import matplotlib
assert matplotlib.rcParamsOrig["text.usetex"] is False
"""
CALLS = {
    "lens_maps": "draw_lens([{'path': 'a.0.q', 'norm_update': 1.0, 'pair_energy': [[1.0]], 'singular_values': [1.0],"
    " 'effective_rank': 1.0}], Path('a.png'), most=1)",
    "svg_charts": "line_chart([Series(name='a', points=[(0.0, 1.0), (1.0, 2.0)])], title='a')",
}


@pytest.mark.slow
@pytest.mark.parametrize("module", CALLS)
@pytest.mark.parametrize("content", [None, b"text.usetex: True"])
def test_a_matplotlibrc_in_the_working_folder_is_not_read(module: str, content: bytes | None, tmp_path: Path) -> None:
    if content is None:
        os.mkfifo(tmp_path / "matplotlibrc")  # whoever reads it waits for ever
    else:
        (tmp_path / "matplotlibrc").write_bytes(content)
    code = DRAW.format(module=module, call=CALLS[module])
    words = [sys.executable, "-P", "-c", code, str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
