"""Reporting: what a run looks like. Reads what the run has made; nothing below this floor knows of it."""
