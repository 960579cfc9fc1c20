"""Records of many runs, read."""
