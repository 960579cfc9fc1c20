"""From records to statistics and verdicts."""
