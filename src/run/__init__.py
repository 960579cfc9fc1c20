"""One run: parts put together, and its life from an empty folder to a record."""
