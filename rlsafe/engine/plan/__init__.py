"""What a run will do and what it will cost, before any model is loaded."""
