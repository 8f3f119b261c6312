"""Exact effects of every unit, at the speed of the matrix unit."""
