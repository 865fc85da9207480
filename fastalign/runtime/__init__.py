"""Pointers, dispatch, checks, and what crosses processes: everything below the ops."""
