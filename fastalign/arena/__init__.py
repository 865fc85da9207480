"""A task with a known reward on which methods are judged, and the demonstrations on it."""
