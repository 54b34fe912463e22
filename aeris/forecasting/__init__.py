"""A trained run forward in time: opened, stepped, over members, dates and ranks."""
