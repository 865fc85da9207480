"""Models as the trainer runs them: packed, with heads, as references."""
