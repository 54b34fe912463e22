"""The AERIS network: a pixel-level Swin diffusion transformer.

It takes a layout and knows nothing of ranks or files.
"""
