"""A run directory's life: built from a config, started, saved, interrupted, resumed, finished."""
