"""Settings with which spread fits error: what is tried, how one is chosen, what is kept."""
