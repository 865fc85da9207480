"""Whole methods: recipes of stages (`fastalign run`), and the list of those that ship (`fastalign methods`)."""
