"""From typed words to a checked configuration, or to one line of error."""
