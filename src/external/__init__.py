"""External models: a user's own model in place of the built-in transformer."""
