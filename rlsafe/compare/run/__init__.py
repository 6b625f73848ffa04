"""Running the cells of a grid: in this process, in several, or on a Ray cluster."""
