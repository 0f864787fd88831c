"""Learning from pairs of a chosen and a rejected answer (`objective: dpo`), with TRL's trainer and MoSLoRA."""
