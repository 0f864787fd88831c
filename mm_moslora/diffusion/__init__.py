"""MoSLoRA in diffusion models: recipes, one training loop, export; on diffusers."""
