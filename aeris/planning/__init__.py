"""What a run would take on a machine, before it is queued: memory, bytes, seconds, and which layout is best."""
