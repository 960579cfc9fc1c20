"""From many records to statistics, charts and one report. Reads only run folders."""
