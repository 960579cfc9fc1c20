"""Turns typed arguments into a checked configuration, or into a one-line error."""
