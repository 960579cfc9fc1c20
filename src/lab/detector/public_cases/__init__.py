"""Failures of training that people reported in public, each rebuilt small."""
