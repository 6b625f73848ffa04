"""The cells of a comparison's grid, and its directory with their records."""
