"""Units held still while a model answers: which, at what values, what is like them, effects."""
