"""What every run of a comparison imports; the fork server imports it once, so that a run starts at once."""

import logging

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

import mm_moslora_eval.local  # noqa: E402
import mm_moslora_eval.open_model  # noqa: E402
import mm_moslora_eval.suite  # noqa: E402, F401

import mm_moslora.models.load  # noqa: E402
import mm_moslora.training.loop  # noqa: E402, F401
