"""The laboratory book: the studies in experiments/, their predictions and their results."""
