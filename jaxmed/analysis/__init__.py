"""What effects mean: estimands, joint sets, circuits, screening, statistics, controls."""
