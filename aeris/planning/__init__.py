"""What a run would take on a machine, before it is queued: memory, bytes, seconds, and the best layouts."""
