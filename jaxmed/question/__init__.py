"""What is asked of every pair: sites, metric, positions, directions; what effects look like."""
