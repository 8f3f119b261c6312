"""What is asked of every pair: sites, metric, positions, directions; and what every effect looks like."""
