"""Models that are not ours, for `model=external`: each a file to begin one of your own from."""
