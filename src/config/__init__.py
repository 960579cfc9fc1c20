"""From a command line to one checked, typed configuration of a run."""
