"""Simulated atmospheres: the SPEEDY general circulation model writes years of data, and true ensembles."""
