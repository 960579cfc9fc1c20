"""Measures early warning and diagnosis on planted failures and on healthy runs."""
