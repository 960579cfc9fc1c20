"""One run: assembling its parts, and its life from an empty folder to a record."""
