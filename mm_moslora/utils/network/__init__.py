"""Downloads within limits, and the hub."""
