"""Scores of ensemble forecasts: metrics, spectra, extremes, climatology, and tables and pictures of them."""
