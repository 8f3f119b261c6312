"""One file per program: its settings, and the order of things."""
