"""Turns a command line into one checked, typed configuration of a run."""
