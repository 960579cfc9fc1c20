"""The laboratory book: studies in experiments/, what was predicted of them, and what they show."""
