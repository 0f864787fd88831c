"""mm_moslora_eval: benchmarks as protocols, answers that survive a crash, scores with error bars."""

import mm_moslora  # noqa: F401  (keeps libraries quiet that are imported later)
