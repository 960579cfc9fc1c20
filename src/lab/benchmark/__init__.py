"""Measures the speed of a training step against a lower bound and against transformers."""
