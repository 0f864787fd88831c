"""The imports of every run of a comparison; the fork server does them once, so that runs start fast."""

import logging

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import mm_moslora_eval.backends.local_model  # noqa: E402
import mm_moslora_eval.backends.open_model  # noqa: E402
import mm_moslora_eval.run.evaluate_suite  # noqa: E402, F401

import mm_moslora.models.load_model  # noqa: E402
import mm_moslora.training.training_loop  # noqa: E402, F401
