"""Measurements of speed. Each prints a table; kept results are in benchmarks/results/."""
