"""Turns statistics into charts, tables and one page."""
