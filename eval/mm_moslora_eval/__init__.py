"""mm_moslora_eval: benchmarks as protocols, answers that survive a crash, scores with error bars."""
