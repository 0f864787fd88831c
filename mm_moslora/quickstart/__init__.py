"""The main job on real parts from package registries: what `mm-moslora quickstart` runs."""
