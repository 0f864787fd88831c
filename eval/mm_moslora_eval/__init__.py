"""mm_moslora_eval: benchmarks as protocols, crash-safe storage of answers, scores with error bars."""

import mm_moslora  # noqa: F401  (silences libraries that are imported later)
