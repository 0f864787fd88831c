"""Models: vision encoders, projectors, assembly, export."""
