#!/usr/bin/env python
"""Teach a diffusion model one subject with MoSLoRA; the same as `mm-moslora diffusion train`.

python examples/dreambooth.py tiny_subject      random weights and drawn pictures, seconds on a CPU
python examples/dreambooth.py sdxl_subject      SDXL as in the paper, on a GPU
"""

import sys

from mm_moslora.cli.cli_app import run

if __name__ == "__main__":
    sys.exit(run(["diffusion", "train", *sys.argv[1:]]))
