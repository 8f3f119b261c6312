"""Command-line programs: each parses its flags and calls jaxmed."""

import os

# transformers serves configs and tokenizers here; its advice to install torch does not apply.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
