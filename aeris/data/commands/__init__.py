"""What `python -m aeris.data` can do, a file for each word after it."""
