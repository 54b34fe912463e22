"""Readers of other projects' files, one module per layout; `aeris.data.sources` finds out which it is."""
