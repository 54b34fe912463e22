"""Windows, shifts, identity-keyed noise, pipeline steps and checkpoints for any window transformer.

This package knows tensors, windows and ranks, and nothing of what the images show. It is used from its files:
`windows` (geometry), `layout` (what a model is handed), `noise`, `schedule`, `pipeline`, `checkpoint`,
`backend` (the device).
"""
