"""Losses of pairs, lists and single responses."""
