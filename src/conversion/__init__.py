"""Imports models of other projects, converts architectures, and exports models."""
