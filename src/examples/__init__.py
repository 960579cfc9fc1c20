"""Examples of external models for `model=external`; each file can serve as a template."""
