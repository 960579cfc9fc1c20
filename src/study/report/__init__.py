"""From statistics to charts, tables and one page."""
