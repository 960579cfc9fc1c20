"""Turns records into statistics and verdicts."""
