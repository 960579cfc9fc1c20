"""Saved models: rebuilt from a checkpoint, matched to a module by names, and checked."""
