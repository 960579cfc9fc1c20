"""A saved model made again: rebuilt, matched by names, checked."""
