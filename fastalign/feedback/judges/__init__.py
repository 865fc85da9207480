"""Judges: which of two responses is better, and how good one is."""
