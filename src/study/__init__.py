"""From many records to statistics, figures and one report. Reads run folders and nothing else."""
