"""Functions of vocabulary rows."""
