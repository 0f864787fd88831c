"""Image processing, processors and image tokens."""
