"""Command-line programs: each parses its flags and calls jaxmed."""
