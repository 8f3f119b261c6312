"""Models of known answer, numerical error, and speed."""
