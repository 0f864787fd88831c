"""What a run forgets, between its first step and its end."""
