"""Models that are the user's own."""
