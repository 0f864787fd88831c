"""MoSLoRA in diffusion models: recipes, pictures, training, validation pictures, export; on diffusers and accelerate.

The recipe needs no diffusers; everything else does, and says how to install it (`need_diffusers`).
"""
