"""Reports: figures, pages, and all sentences that a reader sees."""
