"""Code that shipped task files name; the task files themselves are YAML."""
