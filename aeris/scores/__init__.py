"""Scores of ensemble forecasts: metrics, spectra, baselines, and the tables and pictures made of them."""
