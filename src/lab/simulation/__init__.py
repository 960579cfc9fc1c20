"""Simulated studies: how often the analysis is wrong, what it sees, and what that costs."""
