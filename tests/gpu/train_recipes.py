"""Trains the recipes on its command line; a process of torchrun or alone."""

from __future__ import annotations

import sys

from ranks import train_recipes

if __name__ == "__main__":
    sys.exit(train_recipes(sys.argv[1:]))
