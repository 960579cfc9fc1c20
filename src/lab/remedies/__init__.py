"""Failures and remedies: which remedy undoes how much of which failure."""
