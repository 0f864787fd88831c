"""Vision towers and their features."""
