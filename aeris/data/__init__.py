"""Weather data: names of variables, our HDF5 store, samples from it, and making it from other layouts."""

from aeris.data.store import Store, StoreError, packaged_sample

__all__ = ["Store", "StoreError", "packaged_sample"]
