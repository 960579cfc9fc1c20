"""Reads the records of many runs."""
