"""Metrics as pure functions of strings and numbers: no torch, no numpy, no files.

Where a reference implementation has a bug, the corrected behaviour is the default and the reference's is a function
named after it (`vlmevalkit`, `lmms_eval`, `llava`, `official`).
"""
