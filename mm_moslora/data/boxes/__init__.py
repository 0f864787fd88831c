"""Boxes and points of records: their forms in texts, and where they lie in what the model sees."""
