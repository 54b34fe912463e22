"""AERIS: pixel-level Swin diffusion models of the weather."""
