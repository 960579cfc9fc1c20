"""A step or a checkpoint examined after the fact."""
