"""Other people's models in, other architectures out: imports, exports, conversions."""
